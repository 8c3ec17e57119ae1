"""Checkpoints: written, published, read, and compared with the config."""
