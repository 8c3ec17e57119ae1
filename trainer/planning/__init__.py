"""Estimates of `headrace plan`, made before there is a run."""
