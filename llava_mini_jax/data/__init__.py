"""Between files of people and arrays of a batch: media, text, sets, digits, batches, each its
own room.
"""
