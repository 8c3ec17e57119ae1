"""The contract on disk: configs, shard format, manifest, run state and errors. Imports no torch."""
