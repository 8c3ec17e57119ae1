"""A Hugging Face model, laid out and loaded stage by stage."""
