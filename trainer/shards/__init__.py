"""Bytes of shard directories to decoded rows: storage, cache, retries, quarantine."""
