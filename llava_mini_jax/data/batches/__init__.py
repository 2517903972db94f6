"""Samples to batches of fixed shape, in a run's order; imports the other data rooms and models'
shapes.
"""
