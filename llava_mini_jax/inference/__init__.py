"""KV cache, sampling and generation."""
