"""The paper's tables trained anew: what they compare, how it is run, and the pages it becomes."""
