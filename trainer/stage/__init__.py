"""One pipeline stage: forward pass, head, objectives, cached decoding."""
