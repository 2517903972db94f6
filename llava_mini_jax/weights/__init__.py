"""Reading and writing weights: Hugging Face layouts both ways, and Orbax checkpoints."""
