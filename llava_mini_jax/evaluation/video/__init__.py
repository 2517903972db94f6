"""Video benchmarks, one file each; import rules, judge, layouts, and of the rest the digits
world and plots.
"""
