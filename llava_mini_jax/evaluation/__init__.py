"""Benchmarks: what one is, and its files; rules, judge, image, video and run are rooms of their
own, each of which imports what stands before it here, never one after.
"""
