"""How scorers read answers: letters, words, tasks; imports benchmark, layouts and names of
videos.
"""
