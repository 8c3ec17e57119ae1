"""Adapters: where they sit, what they start from, and their names."""
