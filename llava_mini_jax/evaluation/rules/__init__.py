"""How scorers read answers: letters, words, tasks; imports benchmark and layouts."""
