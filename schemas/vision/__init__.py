"""Vision-language models: the numbers of their image processors, which both halves go by."""
