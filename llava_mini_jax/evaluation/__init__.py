"""Benchmarks: what one is and its files; rules, judge, image, video and run are rooms of their
own.
"""
