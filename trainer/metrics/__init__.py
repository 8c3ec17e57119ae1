"""Metrics of steps and evaluations, and the places that they are written to."""
