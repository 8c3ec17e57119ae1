"""The commands, the demo, and generators of documents. May import everything else."""
