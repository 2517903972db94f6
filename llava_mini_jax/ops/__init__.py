"""Array functions that know nothing of models."""
