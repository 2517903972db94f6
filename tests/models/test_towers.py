"""CLIP's and SigLIP's towers against transformers' own hidden states, and a LLaVA with a SigLIP.

The folders were written by transformers (tests/golden/backbones); images of 14 pixels have three
patches of 4 along a side and a margin. A variant that computes one thing otherwise must be seen.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.data.media.images import preprocess
from llava_mini_jax.models import clip
from llava_mini_jax.models.clip import Clip, ClipConfig
from llava_mini_jax.params import unstack
from llava_mini_jax.weights.folders import open_model, open_parts
from llava_mini_jax.weights.hf_processor import image_settings, read_processor
from llava_mini_jax.weights.import_hf import load_params
from tests import golden_backbones, tiny
from tests.golden_backbones import FOLDER, TOWERS

fast_compilation = tiny.fast_compilation

# float32 sums of values of order 1 through three layers; the largest difference seen is 2e-6.
ATOL = 2e-5
SEEN = 0.001  # the least that a wrong variant must differ by; gelu's two forms differ by 0.0017
# Logits up to 7; the largest difference seen is 4e-6.
LOGITS_ATOL = 5e-5
GREY_LEVEL = 1.01 / 127.5  # one, normalised: Pillow's versions round differently


def opened(name: str) -> tuple[ClipConfig, Clip]:
    cfg, _, _ = open_parts(FOLDER / name, FOLDER / "llama_2")
    _, params = golden_backbones.opened("llama_2", name)
    return cfg, params.vision


def features(params: Clip, cfg: ClipConfig, name: str) -> np.ndarray:
    pixels = jnp.asarray(golden_backbones.expected(name)["pixels"])
    return np.asarray(clip.apply(params, pixels, cfg, jnp.dtype("float32")))


def patches(hidden: np.ndarray, cfg: ClipConfig) -> np.ndarray:
    assert hidden.shape[1] == cfg.positions
    return hidden[:, cfg.class_token :]


@pytest.mark.parametrize("name", TOWERS)
def test_features_are_the_hidden_states_of_transformers(name: str) -> None:
    cfg, params = opened(name)
    expected = golden_backbones.expected(name)
    assert (cfg.grid, cfg.select_layer, cfg.used_layers) == (3, -2, 2)
    found = features(params, cfg, name)
    np.testing.assert_allclose(found, patches(expected["before"], cfg), atol=ATOL)
    # All layers: transformers' last hidden state is that in front of the final norm.
    every = params.replace(layers=(*params.layers, *unstack(params.unread_layers)))
    last = dataclasses.replace(cfg, select_layer=-1)
    found = features(every, last, name)
    np.testing.assert_allclose(found, patches(expected["last"], cfg), atol=ATOL)


def test_which_towers_these_are() -> None:
    own = {
        name: (c.class_token, c.pre_norm, c.patch_bias)
        for name in TOWERS
        for c, _ in [opened(name)]
    }
    assert own["clip"] == (True, True, False)
    assert own["siglip"] == own["siglip2"] == (False, False, True)
    assert [opened(name)[0].resample for name in TOWERS] == ["bicubic", "bicubic", "bilinear"]


WRONG = [
    ("clip", {"activation": "gelu"}, {}),
    ("clip", {"norm_eps": 1e-2}, {}),
    ("clip", {"pre_norm": False}, {"pre_norm": None}),
    ("siglip", {"activation": "quick_gelu"}, {}),
    ("siglip", {"activation": "gelu"}, {}),
    ("siglip", {"norm_eps": 1e-2}, {}),
    ("siglip", {"patch_bias": False}, {"patch_bias": None}),
]


@pytest.mark.parametrize(("name", "change", "lost"), WRONG, ids=str)
def test_a_wrong_tower_is_seen(name: str, change: dict[str, Any], lost: dict[str, None]) -> None:
    cfg, params = opened(name)
    found = features(params.replace(**lost), dataclasses.replace(cfg, **change), name)
    expected = patches(golden_backbones.expected(name)["before"], cfg)
    assert np.abs(found - expected).max() > SEEN


def test_the_margin_stands_behind_the_patches(name: str = "siglip") -> None:
    """To the right and below, as a convolution without padding leaves it."""
    cfg, params = opened(name)
    pixels = golden_backbones.expected(name)["pixels"]
    shown = [
        np.pad(pixels[:, y : y + 12, x : x + 12], ((0, 0), (0, 2), (0, 2), (0, 0)))
        for y, x in ((0, 0), (2, 2))
    ]
    found = [clip.apply(params, jnp.asarray(one), cfg, jnp.dtype("float32")) for one in shown]
    expected = patches(golden_backbones.expected(name)["before"], cfg)
    np.testing.assert_allclose(found[0], expected, atol=ATOL)
    assert np.abs(found[1] - expected).max() > SEEN


@pytest.mark.parametrize("name", TOWERS)
def test_pixels_are_those_of_the_folders_processor(name: str) -> None:
    expected = golden_backbones.expected(name)
    processor = read_processor(FOLDER / name)
    config = image_settings(processor, 14, pad=False, grid=1)
    assert config.aspect == ("crop" if name == "clip" else "squeeze")
    picture = Image.fromarray(expected["picture"])
    cfg, _ = opened(name)

    def error(config: Any) -> float:
        pixels = clip.normalize(jnp.asarray(preprocess(picture, config)), cfg)
        return float(np.abs(pixels - expected["processed"]).max())

    # The widest of the three deviations' grey levels.
    allowed = GREY_LEVEL * 0.5 / min(cfg.std)
    assert error(config) <= allowed
    for wrong in (
        {"aspect": "squeeze" if name == "clip" else "crop"},
        {"resample": "bicubic" if name == "siglip2" else "bilinear"},
    ):
        assert error(dataclasses.replace(config, **wrong)) > 3 * allowed


# --- A LLaVA of transformers' own class -----------------------------------------------------------


def test_a_llava_of_siglip_and_qwen2() -> None:
    bundle, published = open_model(FOLDER / "llava_siglip_qwen2", compute_dtype="float32")
    cfg = bundle.model
    assert (cfg.llm.qkv_bias, cfg.vision.class_token, cfg.vision.used_layers) == (True, False, 3)
    params = load_params(bundle, published, dtype="float32", unrolled=False)
    expected = golden_backbones.expected("llava_siglip_qwen2")
    (ids,) = expected["ids"]
    image = ids == cfg.llm.vocab_size - 1
    first = int(np.argmax(image))
    # One mark in place of the image's positions.
    marked = np.concatenate([ids[:first], [tiny.MARK], ids[~image][first:]]).astype(np.int32)
    none = np.full(len(marked), -100, np.int32)
    example = Example(marked, marked >= 0, none, expected["pixels"][:, None], (1,))
    batch = tiny.batch([example], cfg, buckets=tiny.BUCKETS)
    found = np.asarray(tiny.logits(params, batch.inputs, cfg))[:, : len(ids)]
    np.testing.assert_allclose(found, expected["logits"], atol=LOGITS_ATOL)
    wrong = dataclasses.replace(
        cfg, vision=dataclasses.replace(cfg.vision, activation="quick_gelu")
    )
    other = np.asarray(tiny.logits(params, batch.inputs, wrong))[:, : len(ids)]
    assert np.abs(other - expected["logits"]).max() > 10 * LOGITS_ATOL
