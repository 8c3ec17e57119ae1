"""Pipeline engines, transfers between stages, and generation through the stages."""
