"""The demo, benchmarks, plots, and generators of documents."""
