"""Image benchmarks, one file each; import rules, judge and layouts."""
