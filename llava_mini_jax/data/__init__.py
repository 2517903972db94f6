"""Between files of people and arrays of a batch: media, text, digits, sets and batches, each its
own room; sample and prompt, which all of them may import.
"""
