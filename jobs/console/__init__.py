"""What commands show on the terminal: bars, tables, and rows of shards."""
