"""Stages, optimiser, loss, step, checkpoints and the loop; imports data, weights and cost, never
inference.
"""
