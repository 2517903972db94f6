"""Images and videos, from a file or bytes to uint8 parts; imports errors alone."""
