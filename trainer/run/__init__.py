"""Steps, reports, checkpoints: a training run from start to end."""
