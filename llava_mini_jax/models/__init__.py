"""CLIP, projector, compressor, LLaMA, pre-fusion, and their composition; imports ops and params
alone.
"""
