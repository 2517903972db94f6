"""What the paper looks at inside a model (sections 3 and 6.2, appendices A and F); imports
evaluation and below.
"""
