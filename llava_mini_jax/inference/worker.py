"""A thread that drives an engine: requests come from other threads, and answers go back to them."""
