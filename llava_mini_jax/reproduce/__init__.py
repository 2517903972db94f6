"""The paper's tables trained anew, and the release's recorded outputs verified; imports all but
cli.
"""
