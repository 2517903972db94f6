"""Image benchmarks, one file each."""
