"""Pictures for models with a vision tower: families, decoding, positions, the tower on a stage."""
