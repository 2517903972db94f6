"""Tiny models of each family as transformers wrote them (tests/golden/backbones), opened here."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.weights import lazy_params

FOLDER = Path(__file__).parent / "golden" / "backbones"
LANGUAGE_MODELS = tuple(
    sorted(path.parent.name for path in FOLDER.glob("[!l]*/generation_config.json"))
    + sorted(path.parent.name for path in FOLDER.glob("llama*/generation_config.json"))
)
TOWERS = ("clip", "siglip", "siglip2")


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name / "expected.npz") as arrays:
        return dict(arrays)


@functools.cache
def opened(llm: str, vision: str = "clip") -> tuple[LlamaConfig, LlavaMini]:
    """(the language model's config, unrolled parameters) by the way that conversions take."""
    bundle, lazy = lazy_params.start_from_parts(
        FOLDER / vision,
        FOLDER / llm,
        dialect="paper",
        grid=1,
        prefusion_layers=1,
        prefusion_init="copy",
        seed=0,
        dtype=None,
    )
    return bundle.model.llm, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), lazy)
