"""Conversations, templates and tokenizers: from turns to ids and labels; imports the ground
alone.
"""
