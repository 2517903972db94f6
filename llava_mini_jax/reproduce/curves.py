"""Rows of one method as a curve: the score over vision tokens, and over the FLOPs of a question.

Trained rows --label--> curves --> one image, two panels
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax import plots
from llava_mini_jax.reproduce.trained import SCORE, Trained

OWN = "LLaVA"  # labels that begin so are drawn thick
_MARKERS = "osD^v<>pPX*h"


def plot(
    title: str, trained: Sequence[Trained], metric: str, unit: tuple[str, float], path: Path
) -> None:
    """Means over seeds with their standard errors; a row without a score is left out."""
    plt = plots.pyplot()
    figure, (by_tokens, by_flops) = plt.subplots(
        1, 2, figsize=(12, 6.2), sharey=True, layout="constrained"
    )
    name, size = unit
    methods = _methods(trained)
    for number, (label, rows) in enumerate(methods.items()):
        look: dict[str, Any] = dict(
            label=label,
            color=plt.get_cmap("tab20")(number % 20),
            marker=_MARKERS[number % len(_MARKERS)],
            linewidth=2.5 if label.startswith(OWN) else 1.2,
            capsize=2,
        )
        means = [each.mean(SCORE) for each in rows]
        errors = [_error(each) for each in rows]
        by_tokens.errorbar([each.tokens for each in rows], means, errors, **look)
        by_flops.errorbar([each.flops / size for each in rows], means, errors, **look)
    by_tokens.set_xlabel("vision tokens of an image")
    by_tokens.set_xscale("symlog", linthresh=1)
    by_tokens.set_xlim(left=-0.1)
    counts = sorted({each.tokens or 0 for rows in methods.values() for each in rows})
    by_tokens.set_xticks(counts, [str(count) for count in counts])
    by_tokens.minorticks_off()
    by_flops.set_xlabel(f"{name} of an image and a question")
    by_tokens.set_ylabel(metric)
    for axis in (by_tokens, by_flops):
        axis.grid(alpha=0.3)
    handles, labels = by_tokens.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    figure.suptitle(title)
    plots.save(figure, path)


def _methods(trained: Sequence[Trained]) -> dict[str, list[Trained]]:
    """Rows with a score by label, in the order of their tokens."""
    found: dict[str, list[Trained]] = {}
    for each in trained:
        if each.tokens is not None and not math.isnan(each.mean(SCORE)):
            found.setdefault(each.row.label, []).append(each)
    return {label: sorted(rows, key=lambda each: each.tokens or 0) for label, rows in found.items()}


def _error(each: Trained) -> float:
    scores = list(each.scores[SCORE].values())
    return statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
