"""Files of tensors, read lazily and without running anything in them; knows no model."""
