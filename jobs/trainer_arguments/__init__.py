"""Tables of arguments of transformers' Trainer, and of what is built on it."""
