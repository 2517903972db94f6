"""Stages, optimiser, loss, step and loop."""
