"""From files on disk to batches of fixed shape."""
