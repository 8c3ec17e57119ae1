"""Streams shards into pipeline stages and fine-tunes, exactly resumable."""
