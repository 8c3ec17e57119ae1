"""Exports of what was trained, in the formats that other programs read."""
