"""Order of the rows, and their way to the ranks."""
