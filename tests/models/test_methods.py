"""Every compressor as a model: rows alone and together, holes, gradients, layouts, refusals."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import config as configs
from llava_mini_jax import params as param_tree
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.recompute import refuse_inside
from llava_mini_jax.models import clip, compressors, llama, llava_mini
from llava_mini_jax.models.compressors import hd_grid, voco
from llava_mini_jax.models.compressors.fastv import FastVConfig
from llava_mini_jax.models.compressors.m3 import M3Config
from llava_mini_jax.models.compressors.prumerge import PruMergeConfig, outliers
from llava_mini_jax.models.compressors.prumerge_plus import PruMergePlusConfig
from llava_mini_jax.models.compressors.token_packer import pooled
from llava_mini_jax.models.compressors.visionzip import VisionZipConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.models.seen import PATCHES, Reads, Seen
from llava_mini_jax.training.loss import loss
from tests import tiny
from tests.tiny_compressors import METHODS, PRUMERGE

fast_compilation = tiny.fast_compilation
E = tiny.VISION.width

# float32 through a tower of three layers, a compressor and two LLM layers, logits of order 5.
ATOL = 1e-4

ADAPTIVE = [name for name, cfg in METHODS.items() if compressors.declare(cfg).adaptive]
INSIDE = [name for name, cfg in METHODS.items() if compressors.declare(cfg).inside]


INSIDE_LLM = {"prefusion_layers": 0}


def model(name: str, **changes) -> LlavaMiniConfig:
    cfg = METHODS[name]
    alone = compressors.declare(cfg).places == ("instead",) or name in INSIDE
    changes = {"prefusion_layers": 0 if alone else 1} | changes
    return tiny.model("paper", compressor=cfg, **changes)


def batch(cfg: LlavaMiniConfig, examples: list, side: str = "right"):
    return tiny.batch(examples, cfg, padding_side=side, buckets=BUCKETS)


BUCKETS = tiny.Buckets(lengths=(8, 64), images=(1, 2, 4))


def examples(cfg: LlavaMiniConfig) -> list:
    kinds = [{2: 1}, {0: 1, 5: 1}, {1: 1}, {}]
    return [tiny.example(i, 8, kinds[i], cfg, answer=3) for i in range(4)]


@functools.partial(jax.jit, static_argnames="cfg")
def logits(params, inputs, cfg):
    return llama.logits(params.llm, llava_mini.apply(params, inputs, cfg))


def text_logits(params, made, cfg) -> list[np.ndarray]:
    """Of each row, in the text's order."""
    found = np.asarray(logits(params, made.inputs, cfg))
    T, slots_BS = made.inputs.ids_BT.shape[1], made.inputs.slots_BS
    return [row[(slots >= 0) & (slots < T)] for row, slots in zip(found, slots_BS, strict=True)]


def close(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL)


@pytest.mark.parametrize("name", METHODS)
def test_rows_together_are_what_they_are_alone(name: str) -> None:
    cfg = model(name)
    params, rows = tiny.on_device(tiny.weights(cfg)), examples(cfg)
    together = text_logits(params, batch(cfg, rows), cfg)
    close(text_logits(params, batch(cfg, rows, "left"), cfg), together)
    alone = [text_logits(params, batch(cfg, [row]), cfg)[0] for row in rows]
    close(alone, together)


@pytest.mark.slow  # a model each
@pytest.mark.parametrize("name", METHODS)
def test_unrolled_layers_give_the_same(name: str) -> None:
    cfg = model(name)
    params, made = tiny.on_device(tiny.weights(cfg)), batch(cfg, examples(model(name))[:2])
    close(text_logits(llava_mini.unrolled(params), made, cfg), text_logits(params, made, cfg))


@pytest.mark.slow  # a model each
@pytest.mark.parametrize("name", ADAPTIVE)
def test_empty_slots_are_not_there(name: str) -> None:
    """The same as the language model on a sequence that was put together without them."""
    cfg = model(name, prefusion_layers=0)
    params, rows = tiny.on_device(tiny.weights(cfg)), examples(cfg)[:3]
    together = text_logits(params, batch(cfg, rows), cfg)
    valid = []
    for row, found in zip(rows, together, strict=True):
        seen = llava_mini.encode_vision(params, jnp.asarray(row.pixels), cfg)
        _, made = llava_mini.project_and_compress(params, seen, cfg)
        valid.append(np.asarray(made.valid_IQ).sum(axis=1))
        text = np.asarray(params.llm.embed_tokens)[np.maximum(row.ids, 0)]
        each = zip(np.asarray(made.tokens_IQE), np.asarray(made.valid_IQ), strict=True)
        pictures = iter([tokens[there] for tokens, there in each])
        parts = [next(pictures) if id_ < 0 else text[i][None] for i, id_ in enumerate(row.ids)]
        kinds = zip(parts, row.ids, strict=True)
        is_text = np.concatenate([np.full(len(part), id_ >= 0) for part, id_ in kinds])
        x_BSD = jnp.concatenate(parts)[None]
        hidden = llama.apply(params.llm, x_BSD, jnp.ones(x_BSD.shape[:2], bool), cfg.llm)
        np.testing.assert_allclose(llama.logits(params.llm, hidden)[0][is_text], found, atol=ATOL)
    counts = np.concatenate(valid)
    # Else the test would not know holes from tokens.
    assert len(set(counts)) > 1 and counts.min() < cfg.tokens_per_image(1)


@pytest.mark.slow  # a model each; without a cache: tests/inference/test_recompute.py
@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_answer_behind_empty_slots_is_predicted_from_the_last_token(name: str) -> None:
    """In stage 1 a caption follows its image at once."""
    cfg = model(name, prefusion_layers=0)
    params = tiny.on_device(tiny.weights(cfg))
    row = tiny.example(0, 4, {0: 1}, cfg, answer=3)
    made = batch(cfg, [row])
    value = loss(params, made, cfg)[0]
    seen = llava_mini.encode_vision(params, jnp.asarray(row.pixels), cfg)
    _, compressed = llava_mini.project_and_compress(params, seen, cfg)
    tokens = compressed.tokens_IQE[0][compressed.valid_IQ[0]]
    x_SD = jnp.concatenate([tokens, params.llm.embed_tokens[row.ids[1:]]])
    hidden = llama.apply(params.llm, x_SD[None], jnp.ones((1, len(x_SD)), bool), cfg.llm)
    scores = jax.nn.log_softmax(llama.logits(params.llm, hidden)[0].astype(jnp.float32))
    places = np.arange(len(tokens) - 1, len(x_SD) - 1)
    np.testing.assert_allclose(value, -scores[places, row.ids[1:]].mean(), rtol=1e-4)


@pytest.mark.slow  # a model each
@pytest.mark.parametrize("name", METHODS)
def test_everything_that_is_trained_has_a_gradient(name: str) -> None:
    cfg = model(name)
    params, made = tiny.on_device(tiny.weights(cfg)), batch(cfg, examples(cfg))
    _, grads = tiny.loss_and_grads(params, made, cfg)
    frozen = {"mqt": ("position",), "llama_vid": ("layers/1/text_mlp",)}.get(name, ())
    for path, grad in param_tree.paths(grads).items():
        if not path.startswith(("compressor/", "projector/", "prefusion/")):
            continue
        assert bool(jnp.isfinite(grad).all()), path
        still = any(part in path for part in frozen)
        # A softmax ignores what all of its keys have in common.
        ignored = path.endswith(("k_proj/bias", "key_proj/bias", "key_norm/bias"))
        assert ignored or bool((grad != 0).any()) != still, path


# ------------------------------------------------------------------------- what the tower computes


def flops(reads: Reads) -> float:
    pixels = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    params = llava_mini.unrolled(llava_mini.spec(tiny.model("paper"))).vision
    look = functools.partial(clip.look, cfg=tiny.VISION, dtype=jnp.float32, reads=reads)
    return _lowered(look, param_tree.abstract(params), pixels).cost_analysis()["flops"]


def _lowered(function, *arguments):
    return jax.jit(function).lower(*arguments)


def test_what_reads_nothing_more_adds_nothing_to_the_tower() -> None:
    pixels = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    params = param_tree.abstract(clip.spec(tiny.VISION))

    def text(reads: Reads | None) -> str:
        if reads is None:
            see = functools.partial(clip.apply, cfg=tiny.VISION, dtype=jnp.float32)
        else:
            see = functools.partial(clip.look, cfg=tiny.VISION, dtype=jnp.float32, reads=reads)
        lines = _lowered(lambda p, x: jax.tree.leaves(see(p, x))[0], params, pixels).as_text()
        return lines

    assert text(PATCHES) == text(None)
    assert text(Reads(question=True)) == text(None)
    assert text(Reads(levels=(1,))) != text(None)  # two loops where there was one


def test_the_tower_computes_just_what_is_read() -> None:
    bare, (S, N, H) = flops(PATCHES), (17, 4, 8)
    assert flops(Reads(levels=(0, 1, 2))) == bare
    assert flops(Reads(class_token=True)) == bare
    heads = flops(Reads(heads_of=2)) - bare
    products = 2 * E * N * H * (S + 1)  # all keys, and one query
    assert products <= heads < 1.1 * products + 12 * S * E  # a norm, and biases


@pytest.mark.parametrize("level", [0, 1, 2])
def test_levels_are_hidden_states(level: int) -> None:
    cfg = dataclasses.replace(tiny.VISION, select_layer=level)
    whole = tiny.on_device(tiny.weights(tiny.model("paper")).vision)
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 3)), jnp.float32)
    seen = clip.look(whole, pixels, tiny.VISION, jnp.float32, Reads(levels=(level, 2)))
    shorter = dataclasses.replace(whole, layers=jax.tree.map(lambda a: a[:level], whole.layers))
    expected = clip.apply(shorter, pixels, cfg, jnp.float32)
    np.testing.assert_allclose(seen.levels[0], expected, atol=1e-5)
    np.testing.assert_array_equal(seen.levels[1], seen.patches_IPE)


# ------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_token_packer_samples_as_torch_does(scale: int) -> None:
    """torch.nn.functional.interpolate(size=side / scale, mode="bilinear"), without antialias."""
    side = 12
    x = np.random.default_rng(0).standard_normal((1, side * side, 2)).astype(np.float32)
    found = np.asarray(pooled(jnp.asarray(x), side, scale)).reshape(side // scale, -1, 2)
    image = x.reshape(side, side, 2)
    for y, z in np.ndindex(side // scale, side // scale):
        at = [(place + 0.5) * scale - 0.5 for place in (y, z)]
        low = [math.floor(a) for a in at]
        share = [a - b for a, b in zip(at, low, strict=True)]
        expected = sum(
            (share[0] if dy else 1 - share[0])
            * (share[1] if dx else 1 - share[1])
            * image[min(low[0] + dy, side - 1), min(low[1] + dx, side - 1)]
            for dy in (0, 1)
            for dx in (0, 1)
        )
        np.testing.assert_allclose(found[y, z], expected, atol=1e-6)


def test_mqts_tokens_are_the_first_of_more() -> None:
    few, more = (dataclasses.replace(METHODS["mqt"], count=count) for count in (3, 9))
    params = tiny.on_device(tiny.weights(tiny.model("paper", compressor=more, prefusion_layers=0)))
    seen = Seen(jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, E)), jnp.float32))
    a, b = (compressors.apply(params.compressor, seen, cfg).tokens_IQE for cfg in (few, more))
    np.testing.assert_allclose(a, b[:, :3], atol=1e-6)


def test_outliers_are_numpys() -> None:
    a = np.random.default_rng(0).gamma(0.5, size=(20, 49)).astype(np.float32)
    first, third = np.percentile(a, [25, 75], axis=1, keepdims=True)
    expected = (a > third + 1.5 * (third - first)).sum(axis=1)
    np.testing.assert_array_equal(outliers(jnp.asarray(a)), expected)
    assert expected.min() > 0 and expected.max() <= 49 // 4


def test_equal_attention_has_no_outliers() -> None:
    for value in (1 / 577, 0.1, 1 / 3):
        assert int(outliers(jnp.full((1, 576), value, jnp.float32))[0]) == 0


def prumerge_seen(scores: np.ndarray) -> Seen:
    """An image of P patches whose attention is the softmax of scores, in one head."""
    P = len(scores)
    keys = np.zeros((1, P + 1, 1, 4), np.float32)
    keys[0, 1:, 0, 0], keys[0, 1:, 0, 1] = scores, np.linspace(0, 1, P)
    query = np.array([[[2.0, 0, 0, 0]]], np.float32)  # scale is 4 ** -0.5
    patches = np.random.default_rng(0).standard_normal((1, P, 3)).astype(np.float32)
    return Seen(jnp.asarray(patches), query_INH=jnp.asarray(query), keys_ISNH=jnp.asarray(keys))


@pytest.mark.parametrize("kind", [PruMergeConfig, PruMergePlusConfig])
@pytest.mark.parametrize("variant", ["release", "clean"])
def test_without_an_outlier_the_extra_token_is_the_only_one(kind, variant: str) -> None:
    seen = prumerge_seen(np.zeros(16))
    made = compressors.apply(None, seen, kind(**PRUMERGE | dict(variant=variant)))
    assert made.valid_IQ.sum() == 1
    np.testing.assert_allclose(made.tokens_IQE[0, 0], seen.patches_IPE[0].sum(0) / 17, atol=1e-6)


def test_clean_prumerge_plus_keeps_each_patch_once_and_reaches_the_last() -> None:
    scores = np.zeros(16)
    scores[[15, 4]] = 5, 4
    clean = dataclasses.replace(METHODS["prumerge_plus"], ratio=0.25)
    made = compressors.apply(None, prumerge_seen(scores), clean)
    # 15, 4 and the first two others; every fourth from 2 on is 2, 6, 10, 14; the extra token.
    assert made.tokens_IQE.shape == (1, 9, 3)
    assert made.valid_IQ[0].sum() == 9
    scores[[2, 6]] = 3, 2
    made = compressors.apply(None, prumerge_seen(scores), clean)
    assert made.valid_IQ[0].sum() == 7  # 15, 4, 2, 6, 10, 14 and the extra token
    release = dataclasses.replace(clean, variant="release")
    assert compressors.apply(None, prumerge_seen(scores), release).valid_IQ is None


# ------------------------------------------------------------------- inside the language model


def test_later_text_knows_a_picture_by_its_voco_tokens_alone() -> None:
    cfg = METHODS["voco"]
    placed = compressors.Placed(
        valid_BS=jnp.ones((1, 12), bool),
        visual_BS=jnp.asarray([[0, 0, *[1] * 7, 0, 0, 0]], bool),
        place_BS=jnp.arange(12)[None] - 2,
        patches=4,
    )
    until = np.asarray(voco.seen_until(placed, cfg))[0]
    # Four patches and the token between: up to the second VoCo token, in position 8.
    assert until.tolist() == [12, 12, *[8] * 5, 12, 12, 12, 12, 12]
    release = dataclasses.replace(cfg, variant="release")
    until = np.asarray(voco.seen_until(placed, release))[0]
    assert until.tolist() == [8, 8, *[8] * 5, 12, 12, 12, 12, 12]
    without = dataclasses.replace(placed, visual_BS=jnp.zeros((1, 12), bool))
    assert (np.asarray(voco.seen_until(without, release)) == 12).all()


def test_fastvs_two_variants_answer_alike_and_never_lose_text_in_silence() -> None:
    mask = model("fastv")
    drop, whole = (
        dataclasses.replace(mask, compressor=dataclasses.replace(mask.compressor, **changes))
        for changes in (dict(variant="drop"), dict(keep=16))
    )
    params, rows = tiny.on_device(tiny.weights(mask)), [examples(mask)[0], examples(mask)[2]]

    def answers(cfg: LlavaMiniConfig) -> list[np.ndarray]:
        return [row[-1] for row in text_logits(params, batch(cfg, rows), cfg)]

    close(answers(drop), answers(mask))
    none = tiny.model("paper", compressor="none", prefusion_layers=0)
    close(answers(whole), answers(none))
    moved = [np.abs(a - b).max() for a, b in zip(answers(mask), answers(none), strict=True)]
    assert max(moved) > 10 * ATOL
    # A row of text that is longer than what a row with an image leaves.
    long = tiny.example(9, 60, {}, mask, answer=3)
    found = text_logits(params, batch(drop, [rows[0], long]), drop)
    assert np.isnan(found[1]).any() and not np.isnan(found[0][-1]).any()


def test_who_keeps_no_cache() -> None:
    window = dataclasses.replace(tiny.LLM, window=9)
    unkept = [model("fastv"), tiny.model("paper", window, compressor=METHODS["voco"], **INSIDE_LLM)]
    for cfg in unkept:
        assert not cfg.keeps_cache
        with pytest.raises(
            InputError, match="continues inside the language model and decodes with"
        ):
            refuse_inside(cfg)
    for name in set(METHODS) - {"fastv", "llama_vid"}:
        assert model(name).keeps_cache
        refuse_inside(model(name))


# ------------------------------------------------------------------------------------- refusals


BAD = {
    "voco, a count": (
        lambda: dataclasses.replace(METHODS["voco"], count=0),
        "voco has no 0 tokens",
    ),
    "voco, a token that the LLM lacks": (
        dict(compressor=dataclasses.replace(METHODS["voco"], token_id=32000), prefusion_layers=0),
        "has a token of id 32000, but the LLM knows",
    ),
    "fastv, pre-fusion": (
        dict(compressor=METHODS["fastv"], prefusion_layers=1),
        "continues inside the LLM: set prefusion_layers and inside_layers to 0",
    ),
    "fastv, more than there are": (
        lambda: compressors.tokens(FastVConfig(layer=1, keep=17, variant="mask"), 4),
        "no 17 of 16 patches to keep",
    ),
    "fastv, behind the last layer": (
        dict(compressor=FastVConfig(layer=2, keep=5, variant="drop"), prefusion_layers=0),
        "acts before layer 2, counted from 0, of an LLM of 2: give an earlier layer",
    ),
    "m3, a count": (dict(compressor=M3Config(count=5)), "m3 has no 5 tokens of 4 x 4.* 1, 4, 16"),
    "mqt, a count": (
        lambda: dataclasses.replace(METHODS["mqt"], count=10),
        "mqt has no 10 tokens; give 1 to 9",
    ),
    "token_packer, a scale": (
        dict(compressor=dataclasses.replace(METHODS["token_packer"], scale=3)),
        "scale 3 does not divide 4 x 4 patches; use one of 1, 2, 4",
    ),
    "token_packer, a level": (
        dict(compressor=dataclasses.replace(METHODS["token_packer"], levels=(3,))),
        "level 3 is read of a tower of 3 layers that runs up to level 2",
    ),
    "prumerge, a variant": (
        lambda: dataclasses.replace(METHODS["prumerge"], variant="fast"),
        'variant "fast" is unknown; use release or clean',
    ),
    "prumerge, neighbours": (
        dict(compressor=dataclasses.replace(METHODS["prumerge"], neighbours=16)),
        "16 patches have no 16 neighbours each",
    ),
    "prumerge, a ratio": (
        dict(compressor=dataclasses.replace(METHODS["prumerge"], ratio=0.01)),
        "ratio 0.01 of 16 patches keeps none",
    ),
    "visionzip, too many": (
        dict(compressor=VisionZipConfig(layer=1, dominant=10, contextual=8)),
        r"no 10 \+ 8 tokens of 4 x 4 patches and a class token; give 17",
    ),
    "llama_vid, a grid": (
        dict(compressor=dataclasses.replace(METHODS["llama_vid"], content=3)),
        "no 3 x 3 content tokens of 4 x 4 patches; use one of 1, 2, 4",
    ),
    "another tower's": (
        dict(compressor=dataclasses.replace(METHODS["mqt"], width=64)),
        r"made for widths \(64, 32\) of tower and language model, which have \(32, 32\)",
    ),
    "pre-fusion without patches": (
        dict(compressor=METHODS["mqt"], prefusion_layers=2),
        '"mqt" is the projector, so pre-fusion has no patches',
    ),
    "through pre-fusion with holes": (
        dict(compressor=METHODS["prumerge"], prefusion_layers=1, dialect="release"),
        "different numbers of tokens, which cannot go through pre-fusion",
    ),
    "inside the LLM": (
        dict(compressor=METHODS["visionzip"], inside_layers=1),
        '"visionzip" does not work on hidden states',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_method_does_not_have_is_said(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        if callable(given):
            given()
        else:
            given = {"prefusion_layers": 0, "dialect": "paper"} | given
            tiny.model(given.pop("dialect"), **given)


def test_a_place_that_a_method_cannot_have() -> None:
    with pytest.raises(
        ValueError, match='"m3" cannot be put at compress "features"; use projected'
    ):
        dataclasses.replace(model("m3"), compress="features")


def test_a_configuration_of_another_method() -> None:
    cfg = tiny.model("paper")
    with pytest.raises(ValueError, match='"m3" is configured by M3Config, not by MqtConfig'):
        dataclasses.replace(METHODS["mqt"], kind="m3") and compressors.declare(
            dataclasses.replace(METHODS["mqt"], kind="m3")
        )
    assert compressors.method(cfg.compressor) is compressors.METHODS["similarity"]


def test_parts_of_a_picture_for_a_method_of_whole_ones() -> None:
    cfg = model("visionzip")
    params = tiny.on_device(tiny.weights(cfg))
    row = tiny.example(0, 4, {0: 1}, cfg, parts=5)
    with pytest.raises(ValueError, match='"visionzip" is defined on whole images, not on 5 parts'):
        logits(params, batch(cfg, [row]).inputs, cfg)


def test_a_shared_ratio_of_several_pictures() -> None:
    release = dataclasses.replace(METHODS["prumerge"], variant="release")
    cfg = tiny.model("paper", compressor=release, prefusion_layers=0)
    params = tiny.on_device(tiny.weights(cfg))
    one = tiny.example(0, 4, {0: 1}, cfg)
    clean = model("prumerge", prefusion_layers=0)
    made = batch(cfg, [one])
    close(text_logits(params, made, cfg), text_logits(params, made, clean))
    with pytest.raises(ValueError, match=r"one ratio among the 2 images.* variant to clean"):
        logits(params, batch(cfg, [one, one]).inputs, cfg)


def test_text_that_is_missing() -> None:
    cfg = model("llama_vid")
    params = tiny.on_device(tiny.weights(cfg))
    row = tiny.example(0, 4, {0: 1}, cfg)
    inputs = dataclasses.replace(batch(cfg, [row]).inputs, question_BIT=None)
    with pytest.raises(ValueError, match='"llama_vid" reads the question, and none is given'):
        logits(params, inputs, cfg)
    with pytest.raises(InputError, match="0 questions are given for 1 images or videos"):
        batch(cfg, [dataclasses.replace(row, questions=())])


def test_a_question_decides_the_tokens_and_its_padding_does_not() -> None:
    cfg = model("llama_vid")
    params = tiny.on_device(tiny.weights(cfg))
    rng = np.random.default_rng(0)
    seen = Seen(
        jnp.asarray(rng.standard_normal((2, 16, E)), jnp.float32),
        class_IE=jnp.asarray(rng.standard_normal((2, E)), jnp.float32),
    )

    def tokens(question: list[list[int]]) -> np.ndarray:
        asked = dataclasses.replace(seen, question_IT=jnp.asarray(question, jnp.int32))
        made = compressors.apply(params.compressor, asked, cfg.compressor)
        return np.asarray(made.tokens_IQE)

    short, other = tokens([[1, 2], [3, 4]]), tokens([[1, 2], [3, 5]])
    np.testing.assert_allclose(tokens([[1, 2, -1], [3, 4, -1]]), short, atol=1e-6)
    np.testing.assert_array_equal(short[0], other[0])
    assert np.abs(short[1, 0] - other[1, 0]).max() > 1e-4
    np.testing.assert_array_equal(short[1, 1:], other[1, 1:])  # pooled ones do not read it
    with pytest.raises(ValueError, match="question of 9 ids is given to a Q-Former of 8 positions"):
        tokens([[1] * 9] * 2)


def test_blocks_of_token_packer_hd_that_do_not_exist() -> None:
    assert hd_grid.hd_grid(336, 672, limit=9, block=336) == ((1, 2), (336, 672))
    with pytest.raises(ValueError, match="no limit of 10 blocks; use 9, 16 or 25"):
        hd_grid.hd_grid(336, 336, limit=10, block=336)


def test_every_method_has_the_signature() -> None:
    for kind, method in compressors.METHODS.items():
        for name in ("Config", "declare", "tokens", "spec", "apply"):
            assert callable(getattr(method, name)), f"{kind} has no {name}"
        assert compressors.config_of(kind) is method.Config
    assert {cfg.kind for cfg in METHODS.values()} == compressors.METHODS.keys() - {
        "none", "average_pool", "similarity", "multi_head"
    }  # fmt: skip
    assert configs.GridConfig is compressors.GridConfig
