"""Data sets on disk as samples in LLaVA's form, audited, packed and named; imports media, text
and digits.
"""
