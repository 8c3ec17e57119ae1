"""Passes over a whole corpus: tasks, deduplication, mixing, limits, shards."""
