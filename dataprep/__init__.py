"""Raw text to shards of shuffled token ids, once and offline. Never imports torch or transformers."""
