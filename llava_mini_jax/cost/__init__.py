"""What a run takes: FLOPs, bytes, time, by formula, by the compiler, by the clock; imports
inference.
"""
