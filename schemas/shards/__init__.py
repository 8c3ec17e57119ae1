"""The format of a shard directory: manifest, columns, checks."""
