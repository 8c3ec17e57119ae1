"""Raw text to shards of shuffled token ids, once and offline. Imports no torch."""
