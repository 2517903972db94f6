"""CLIP, projector, compressor, LLaMA, pre-fusion, and their composition."""
