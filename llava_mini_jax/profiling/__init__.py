"""What runs cost: FLOPs by formula, and what a device could do."""
