"""Rows to tensors, and tensors to the ranks."""
