"""Files of tensors, read lazily and without running anything in them; imports errors alone, and
so knows no model.
"""
