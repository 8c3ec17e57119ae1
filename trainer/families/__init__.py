"""Parts of model families beside their layers, and what goes to these: records by model type."""
