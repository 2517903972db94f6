"""A loaded model that answers: requests, sessions, sampling, decoding; imports weights, data and
models.
"""
