"""Row formats: how the rows of a source become token ids, and which of them are trained."""
