"""Checkpoints whose weights are quantized already: one file for each format."""
