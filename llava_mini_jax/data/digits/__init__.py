"""The built-in world of handwritten digits: its pages and questions; imports errors and sample."""
