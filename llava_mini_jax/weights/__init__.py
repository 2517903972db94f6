"""Published model folders both ways: names, Hugging Face's json, import, export, rounding;
imports tensorfiles, config and what they stand on.
"""
