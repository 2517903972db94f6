"""A model asked and scored: answers files, settings, reports, eval.py; imports inference and no
benchmark by name.
"""
