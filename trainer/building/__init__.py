"""A config to a filled stage: the cut, the model without memory, its weights."""
