"""Weights cut among the ranks of a stage, and what these ranks exchange."""
