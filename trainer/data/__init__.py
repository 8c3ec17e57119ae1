"""Which rows come when, and how they reach the ranks."""
