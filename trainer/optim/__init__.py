"""Optimizers and their states, schedules, gradients, restarts, regularizers."""
