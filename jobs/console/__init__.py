"""Views on the terminal: bars, tables, and rows of shards."""
