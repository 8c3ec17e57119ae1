"""The config of `headrace train`, and the state of a run."""
