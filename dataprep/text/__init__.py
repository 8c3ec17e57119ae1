"""Tokenizers, chat templates, and the samples that texts become."""
