"""Samples to batches of fixed shape, in a run's order; imports the data rooms and models'
shapes.
"""
