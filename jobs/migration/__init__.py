"""Converters from the configs of other systems to ours."""
