"""The config of `headrace prepare`."""
