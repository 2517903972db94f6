"""`python -m llava_mini_jax` is `llava-mini`."""

from llava_mini_jax.cli import main

if __name__ == "__main__":
    main()
