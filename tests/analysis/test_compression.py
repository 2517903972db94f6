"""Maps of the compressor's queries."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.analysis import compression
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.compressors import apply
from llava_mini_jax.models.seen import Seen
from tests import tiny

fast_compilation = tiny.fast_compilation


def setup(dialect: str, **changes):
    cfg = tiny.model(dialect, **changes)
    return llava_mini.unrolled(tiny.on_device(tiny.weights(cfg))), cfg


def pixels(images: int, parts: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (images, parts, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(("dialect", "parts"), [("paper", 1), ("release", 1), ("paper", 5)])
def test_maps_are_what_mixes_the_patches(dialect, parts):
    """For the paper's form, map times patches are the tokens that the language model gets."""
    params, cfg = setup(dialect, grid=2)
    shown = pixels(3, parts)
    maps_IQYX = compression.maps(params, shown, cfg)
    side = 4 if parts == 1 else 8
    assert maps_IQYX.shape == (3, 4, side, side)
    np.testing.assert_allclose(maps_IQYX.sum(axis=(2, 3)), 1, atol=1e-5)
    if dialect == "paper":
        patches_ISD, tokens_IQD = llava_mini.encode_and_compress(params, jnp.asarray(shown), cfg)
        mixed = np.einsum(
            "IQP,IPD->IQD", maps_IQYX.reshape(3, 4, -1), patches_ISD[:, : side * side]
        )
        np.testing.assert_allclose(mixed, tokens_IQD, atol=1e-4)


def test_more_pictures_than_a_chunk_are_all_there():
    params, cfg = setup("paper")
    shown = pixels(compression.CHUNK + 3, 1)
    together = compression.maps(params, shown, cfg)
    np.testing.assert_allclose(together[-1:], compression.maps(params, shown[-1:], cfg), atol=1e-5)
    assert len(together) == len(shown)


@pytest.mark.parametrize(
    ("dialect", "grid", "blind"), [("release", 1, True), ("release", 2, False), ("paper", 1, False)]
)
def test_one_query_of_the_release_does_not_know_where_a_patch_lies(dialect, grid, blind):
    params, cfg = setup(dialect, grid=grid)
    width = cfg.compressor.width
    rng = np.random.default_rng(1)
    patches = rng.standard_normal((1, 16, width)).astype(np.float32)
    order = rng.permutation(16)
    straight = looked_at(params, patches, cfg)
    mixed = looked_at(params, patches[:, order], cfg)
    moved_along = np.abs(np.asarray(straight)[:, :, order] - np.asarray(mixed)).max() < 1e-6
    assert moved_along == blind
    assert (compression.position_note(cfg) is not None) == blind


def looked_at(params, patches, cfg):
    return apply(params.compressor, Seen(jnp.asarray(patches)), cfg.compressor).attention_IQP


def test_sub_images_are_put_together_as_they_were():
    whole = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    tiles = [whole[y : y + 4, x : x + 4] for y in (0, 4) for x in (0, 4)]
    assert (compression.assembled(np.stack([*tiles, tiles[0]])) == whole).all()
    assert (compression.assembled(whole[None]) == whole).all()


def test_evenness():
    assert compression.evenness(np.full((4, 4), 1 / 16)) == pytest.approx(1)
    assert compression.evenness(np.eye(16)[3].reshape(4, 4)) == 0


def test_models_without_queries_are_refused():
    params, cfg = setup("llava-1.5")
    with pytest.raises(InputError, match='"none", which has no queries'):
        compression.maps(params, pixels(1, 1), cfg)
    params, cfg = setup("paper")
    inside = dataclasses.replace(cfg, inside_layers=1, prefusion_layers=0)
    with pytest.raises(InputError, match="after layer 1"):
        compression.maps(params, pixels(1, 1), inside)
