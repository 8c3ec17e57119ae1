"""Engines that run work, the workspace, and what a person sees of the progress."""
