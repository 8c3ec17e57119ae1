"""Parts of a decoder layer: masks, attention, rotary embedding, norms, offload."""
