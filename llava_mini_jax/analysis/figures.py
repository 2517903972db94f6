"""Images of the analyses, as PNG files.

AttentionByLayer --> attention.png (figure 2), entropy.png (figure 3), maps.png (figure 4)
images and maps of queries --> compression.png (figure 12)
    scores by blinded layers --> drop.png (figure 5)
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_mini_jax.analysis.attention import KINDS, AttentionByLayer
from llava_mini_jax.plots import COLOURS, pyplot, save


def attention(found: AttentionByLayer, path: Path) -> Path:
    """Figure 2: a panel for each kind of querying token, its attention to each kind by layer."""
    label = "share of a token's attention"
    return _panels(found.attention_LJK, found, label, "Attention by layer", path)


def entropy(found: AttentionByLayer, path: Path) -> Path:
    """Figure 3: how evenly a kind is attended to, from each kind of querying token."""
    label = "entropy / log n (1 = all alike)"
    return _panels(found.evenness_LJK, found, label, "Evenness of attention within a kind", path)


def _panels(
    values_LJK: np.ndarray, found: AttentionByLayer, label: str, title: str, path: Path
) -> Path:
    plt = pyplot()
    asking = [j for j in range(len(KINDS)) if found.tokens_J[j]]
    figure, axes = plt.subplots(
        1,
        len(asking),
        figsize=(3.6 * len(asking) + 1.6, 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    layers = np.arange(1, len(values_LJK) + 1)
    for axis, j in zip(axes[0], asking, strict=True):
        for k, (kind, colour) in enumerate(zip(KINDS, COLOURS, strict=True)):
            # Behind a causal mask some kinds never see others.
            if np.nanmax(np.append(values_LJK[:, j, k], 0)) > 0:
                axis.plot(layers, values_LJK[:, j, k], "o-", ms=3.5, color=colour, label=kind)
        axis.set(title=f"from {KINDS[j]}", xlabel="layer of the LLM", ylim=(-0.03, 1.03))
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(label)
    handles = {}
    for axis in axes[0]:
        handles |= {n: h for h, n in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, title="to", loc="outside right center")
    figure.suptitle(f"{title}, mean over {found.examples} examples")
    return save(figure, path)


def maps(found: AttentionByLayer, path: Path) -> Path:
    """Figure 4: the attention of the first example in every layer, on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    plt, layers = pyplot(), len(found.map_LGG)
    columns = min(8, layers, math.ceil(math.sqrt(2 * layers)))
    lines = math.ceil(layers / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(2.1 * columns + 1.9, 2.25 * lines + 1.3),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    kinds = found.map_kinds_G
    borders = np.flatnonzero(np.diff(kinds)) + 0.5
    image = None
    for number, axis in enumerate(axes.flat):
        if number >= layers:
            axis.set_axis_off()
            continue
        # A logarithmic scale has no 0, which is what masked positions have.
        shown = np.clip(found.map_LGG[number], 1e-4, 1)
        image = axis.imshow(shown, norm=LogNorm(1e-4, 1), cmap="viridis", interpolation="nearest")
        for border in borders:
            axis.axvline(border, color="white", lw=0.6)
            axis.axhline(border, color="white", lw=0.6)
        axis.set_title(f"layer {number + 1}", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes, label="attention, mean over heads", aspect=30)
    figure.supxlabel(f"key position: {_order(kinds)}", fontsize=9)
    figure.supylabel("query position, first at the top", fontsize=9)
    figure.suptitle("Attention of one example; white lines part the kinds", fontsize=11)
    return save(figure, path)


def _order(kinds_G: np.ndarray) -> str:
    """The kinds from first to last: "instruction | vision | instruction | response"."""
    starts = [0, *(np.flatnonzero(np.diff(kinds_G)) + 1)]
    return " | ".join(KINDS[kinds_G[start]] for start in starts)


def drop(scores: dict[str, float], title: str, label: str, path: Path) -> Path:
    """Figure 5: the score with each range of layers blinded, against that of none."""
    plt = pyplot()
    blinded = {name: value for name, value in scores.items() if name != "none"}
    figure, axis = plt.subplots(
        figsize=(max(4.5, 0.8 * len(blinded) + 2), 3.8), layout="constrained"
    )
    bars = axis.bar(list(blinded), list(blinded.values()), color=COLOURS[0], width=0.6)
    axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.axhline(scores["none"], color="black", ls="--", lw=1, label=f"none: {scores['none']:.1f}")
    axis.set(title=title, xlabel="layers in which text does not see vision tokens", ylabel=label)
    axis.margins(y=0.15)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, path)


def compression(
    pictures: Sequence[np.ndarray],
    maps_IQYX: Sequence[np.ndarray],
    names: Sequence[str],
    path: Path,
    *,
    queries: int,
) -> Path:
    """Figure 12: each image, the mean over all queries, and the first `queries` one by one."""
    plt = pyplot()
    single = min(queries, maps_IQYX[0].shape[0]) if maps_IQYX[0].shape[0] > 1 else 0
    columns, lines = 2 + single, len(pictures)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(2.3 * columns + 1.4, 2.5 * lines + 0.7),
        squeeze=False,
        layout="constrained",
    )
    image, top = None, _top(maps_IQYX)
    for line, (picture, found_QYX, name) in enumerate(zip(pictures, maps_IQYX, names, strict=True)):
        shown = [("mean of the queries" if single else "the query", found_QYX.mean(axis=0))]
        shown += [(f"query {q + 1}", found_QYX[q]) for q in range(single)]
        axes[line][0].imshow(picture)
        axes[line][0].set_title(name, fontsize=9)
        for axis, (title, map_YX) in zip(axes[line][1:], shown, strict=True):
            # Against average pooling, so that maps of any number of patches compare.
            against = map_YX * map_YX.size
            extent = (0, picture.shape[1], picture.shape[0], 0)
            axis.imshow(picture.mean(axis=2), cmap="gray", extent=extent, vmin=0, vmax=255)
            image = axis.imshow(
                against,
                cmap="inferno",
                # Where nothing is looked at, the image shows.
                alpha=np.clip(0.15 + against / top, 0, 0.8),
                extent=extent,
                interpolation="nearest",
                vmin=0,
                vmax=top,
            )
            axis.set_title(title, fontsize=9)
        for axis in axes[line]:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.colorbar(image, ax=axes, label="weight of a patch (1 = average pooling)", aspect=30)
    return save(figure, path)


def _top(maps_IQYX: Sequence[np.ndarray]) -> float:
    """One scale for all images; single hot patches may be above it."""
    return float(max(2.0, *(np.percentile(m * m[0].size, 99.5) for m in maps_IQYX)))
