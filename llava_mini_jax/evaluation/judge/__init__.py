"""Another model as the judge of answers: its words, its server, its verdicts; knows no
benchmark.
"""
