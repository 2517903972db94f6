"""Array functions that know nothing of models; imports params and sharding."""
