"""Objectives: what is minimized, one class each."""
