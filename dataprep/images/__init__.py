"""Pictures of documents: found, opened, checked, and cut into the tiles of a vision family."""
