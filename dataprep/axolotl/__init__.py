"""Axolotl's dataset formats: the same ids and masks, without Axolotl."""
