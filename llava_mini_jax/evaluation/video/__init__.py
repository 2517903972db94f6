"""Video benchmarks, one file each."""
