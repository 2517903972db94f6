"""Benchmarks: runner and scoring."""
