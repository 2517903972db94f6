"""matplotlib, where it is installed: without a screen, saved as PNG files."""

from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError

COLOURS = ("tab:blue", "tab:red", "tab:green")  # of lines that stand side by side
DPI = 120


def pyplot() -> Any:
    """matplotlib without a screen; InputError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "plots need matplotlib, which is not installed: pip install 'llava-mini-jax[plots]',"
            " or pass --no-plots"
        ) from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
    return path
