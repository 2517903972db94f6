"""Every family of decoders against transformers' own logits, through files and every way to run.

The folders were written by transformers (tests/golden/backbones); a variant that computes one
thing otherwise must be seen.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.models import decoder, llama, prefusion
from llava_mini_jax.ops import masks, norm, rope
from tests import golden_backbones, tiny
from tests.golden_backbones import LANGUAGE_MODELS

fast_compilation = tiny.fast_compilation

# float32 logits up to 16 of at most four layers, summed in another order than torch does: the
# largest difference seen is 2.5e-5.
ATOL = 1e-4
# The least that a wrong variant must differ by.
SEEN = 0.03


def inputs(name: str) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """(ids [B, T], which are no padding, logits [B, T, V])."""
    found = golden_backbones.expected(name)
    ids_BT = found["ids"]
    return (
        jnp.asarray(ids_BT),
        np.arange(ids_BT.shape[1]) < found["lengths"][:, None],
        found["logits"],
    )


def error(name: str, params: llama.Llama, cfg: llama.LlamaConfig) -> float:
    """The largest error of a logit; without jit, so that variants compile nothing."""
    ids_BT, valid_BT, expected = inputs(name)
    x_BTD = llama.embed(params, ids_BT, jnp.dtype("float32"))
    hidden_BTD = llama.apply(params, x_BTD, jnp.asarray(valid_BT), cfg)
    found = np.asarray(llama.logits(params, hidden_BTD))
    return float(np.abs(found - expected)[valid_BT].max())


def stacked(layers: tuple) -> Any:
    return jax.tree.map(lambda *one: jnp.stack(one), *layers)


@pytest.mark.parametrize("stack", ["unrolled", "scanned"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_are_those_of_transformers(name: str, stack: str) -> None:
    cfg, params = golden_backbones.opened(name)
    llm = params.llm
    if stack == "scanned":
        llm = llm.replace(layers=stacked(llm.layers))
    assert error(name, llm, cfg) < ATOL


def scaled(name: str, **changes: Any) -> dict[str, Any]:
    cfg, _ = golden_backbones.opened(name)
    assert cfg.rope.scaling is not None
    scaling = dataclasses.replace(cfg.rope.scaling, **changes)
    return {"rope": dataclasses.replace(cfg.rope, scaling=scaling)}


def plain(name: str) -> dict[str, Any]:
    cfg, _ = golden_backbones.opened(name)
    return {"rope": dataclasses.replace(cfg.rope, scaling=None)}


WRONG_CONFIGS = [
    ("mistral", lambda: {"window": 4}),
    ("mistral", lambda: {"window": 6}),
    ("mistral", lambda: {"window": None}),
    ("qwen2_window", lambda: {"window": 6}),
    ("qwen2_window", lambda: {"window": 8}),
    ("smollm3", lambda: {"nope_layers": ()}),
    ("smollm3", lambda: {"nope_layers": (2,)}),
    ("smollm3_yarn", lambda: {"nope_layers": (1,)}),
    ("llama_2", lambda: {"rope": rope.RopeConfig(theta=10500.0, scaling=None)}),
    ("llama_linear", lambda: scaled("llama_linear", factor=3.1)),
    ("llama_3_1", lambda: scaled("llama_3_1", factor=8.5)),
    ("llama_3_1", lambda: scaled("llama_3_1", high_freq_factor=3.5)),
    ("qwen2_yarn", lambda: plain("qwen2_yarn")),
    ("qwen2_yarn", lambda: scaled("qwen2_yarn", factor=4.5)),
    ("qwen2_yarn", lambda: scaled("qwen2_yarn", truncate=False)),
    ("qwen2_yarn", lambda: scaled("qwen2_yarn", attention_factor=1.0)),
    ("smollm3_yarn", lambda: scaled("smollm3_yarn", attention_factor=1.1)),
    ("qwen3", lambda: {"norm_eps": 1e-2}),
]


@pytest.mark.parametrize(("name", "change"), WRONG_CONFIGS)
def test_a_wrong_config_is_seen(name: str, change: Any) -> None:
    cfg, params = golden_backbones.opened(name)
    assert error(name, params.llm, dataclasses.replace(cfg, **change())) > SEEN


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        *(("qwen2", f"{one}_bias") for one in "qv"),
        *(("qwen2_yarn", f"{one}_bias") for one in "qkv"),
        *(("qwen3", f"{one}_norm") for one in "qk"),
    ],
)
def test_a_bias_or_norm_that_is_left_out_is_seen(name: str, lost: str) -> None:
    cfg, params = golden_backbones.opened(name)
    layers = tuple(one.replace(**{lost: None}) for one in params.llm.layers)
    assert error(name, params.llm.replace(layers=layers), cfg) > SEEN


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "smollm2", "smollm3"])
def test_a_head_that_is_not_tied_is_seen(name: str) -> None:
    cfg, params = golden_backbones.opened(name)
    assert cfg.tied_head and params.llm.lm_head is None
    head = np.roll(params.llm.embed_tokens, 1, axis=0)
    assert error(name, params.llm.replace(lm_head=head), cfg) > SEEN


def test_a_norm_behind_the_rotation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(layer, x_BTNH, norm_H, angles_BTH, cfg):
        return norm.rms_norm(rope.rotate(x_BTNH, angles_BTH), norm_H, cfg.norm_eps)

    cfg, params = golden_backbones.opened("qwen3")
    monkeypatch.setattr(decoder, "_placed", other)
    assert error("qwen3", params.llm, cfg) > SEEN


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "smollm3_yarn", "qwen3"])
def test_pre_fusion_in_two_parts_is_the_whole_of_it(name: str) -> None:
    """Its blocks have the family's window, norms and layers without positions."""
    cfg, params = golden_backbones.opened(name)
    own = prefusion.Prefusion(layers=params.llm.layers)
    rng = np.random.default_rng(0)
    image_ISD, text_IFD = (
        jnp.asarray(rng.standard_normal((2, size, cfg.width)), jnp.float32) for size in (7, 6)
    )
    fuse_IF = np.ones((2, 6), bool)
    whole, _, mask = prefusion.apply_whole(own, image_ISD, text_IFD, fuse_IF, cfg)
    assert int(np.asarray(mask)[0, -1].sum()) == (cfg.window or 13)
    tail, memory = prefusion.prefuse_image(own, image_ISD, 2, cfg, remat="none")
    text = prefusion.prefuse_text(own, memory, text_IFD, cfg, remat="none")
    np.testing.assert_allclose(tail, whole[:, 5:7], atol=ATOL)
    np.testing.assert_allclose(text, whole[:, 7:], atol=ATOL)
    scanned = prefusion.Prefusion(layers=stacked(params.llm.layers))
    _, again = prefusion.prefuse_image(scanned, image_ISD, 2, cfg, remat="full")
    np.testing.assert_allclose(
        prefusion.prefuse_text(scanned, again, text_IFD, cfg, remat="full"), text, atol=ATOL
    )


def test_layers_that_differ_do_not_run_in_parts() -> None:
    cfg, params = golden_backbones.opened("smollm3")
    x_BTD, valid = jnp.zeros((1, 3, cfg.width)), jnp.ones((1, 3), bool)
    with pytest.raises(ValueError, match=r"2 of 4 layers run by themselves \(inside_layers\)"):
        llama.run_whole(params.llm.layers[:2], x_BTD, valid, cfg)


def test_rows_mean_the_same_with_padding_in_front(name: str = "mistral") -> None:
    cfg, params = golden_backbones.opened(name)
    ids_BT, _, expected = inputs(name)
    padded = jnp.pad(ids_BT[:1], ((0, 0), (4, 0)))
    valid = jnp.asarray(np.arange(padded.shape[1]) >= 4)[None]
    x_BTD = llama.embed(params.llm, padded, jnp.dtype("float32"))
    hidden = llama.apply(params.llm, x_BTD, valid, cfg)
    found = llama.logits(params.llm, hidden)[:, 4:]
    np.testing.assert_allclose(found, expected[:1], atol=ATOL, rtol=0)
    assert masks.causal(valid, cfg.window).sum(axis=-1).max() == cfg.window
