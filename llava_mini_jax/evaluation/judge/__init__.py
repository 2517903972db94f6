"""Another model as the judge of answers: its words, its server, its verdicts; imports what a
benchmark is, and no benchmark.
"""
