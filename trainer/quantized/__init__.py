"""Frozen weights in few bits, one file for each format."""
