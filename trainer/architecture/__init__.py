"""A Hugging Face model: families, layout, names in files, reading and writing weights."""
