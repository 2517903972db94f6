"""CLIP, projector, compressor, LLaMA, pre-fusion, and their composition; imports ops, params and
sharding alone.
"""
