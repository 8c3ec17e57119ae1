"""Commands: the console script, the demo, and generators of documents. May import everything else."""
