"""Finished shard directories: verified, inspected, indexed, repartitioned."""
