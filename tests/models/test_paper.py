"""The paper's dialect against a float64 oracle that is written from the paper alone.

    patches --projector--> [ patches | text ] --N blocks--> fused text ----.
                |                                                          +--splice--> LLaMA
                '--softmax(Q K^T), 2-D sin-cos on queries and keys--> C*C tokens

Paper sections 4.1 (equations 2 and 3) and 4.2. The oracle works on one row at a time and leaves
positions out where our code masks them; it starts at the tower's features, which the golden cases
check.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax.data.batches.examples import Buckets, Example
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.models import clip
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from tests import tiny

fast_compilation = tiny.fast_compilation

# float32 through two pre-fusion and two LLM layers with logits of order 5; the worst seen is 1e-5.
LOGITS_ATOL = 1e-4


def oracle(params: LlavaMini, example: Example, cfg: LlavaMiniConfig) -> np.ndarray:
    """Logits of one row, float64."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    side, parts = cfg.vision.grid, example.pixels.shape[1]
    texts = params.llm.embed_tokens[np.maximum(example.ids, 0)]
    tokens, fused_of_images = [], []
    for image in example.pixels:
        features = clip.apply(
            tiny.on_device(jax.tree.map(np.float32, params.vision)), image, cfg.vision, jnp.float32
        )
        patches = [project(params.projector, np.asarray(f, np.float64)) for f in features]
        detail, context = patches[0], patches[0]
        if parts > 1:
            k = math.isqrt(parts - 1)
            detail = merge(patches[:-1], k, side)
            context = np.concatenate([detail, patches[-1]])
        tokens.append(compress(params.compressor.query, detail, cfg.compressor.grid))
        sequence = np.concatenate([context, texts[example.fuse]])
        fused = texts.copy()
        fused[example.fuse] = blocks(params.prefusion.layers, sequence, cfg.llm)[len(context) :]
        fused_of_images.append(fused)
    text = np.mean(fused_of_images, axis=0) if len(example.pixels) else texts
    row, images = [], iter(tokens)
    frames = iter(example.frames)
    for token, vector in zip(example.ids, text, strict=True):
        if token >= 0:
            row.append(vector[None])
        else:
            row.extend(next(images) for _ in range(next(frames)))
    hidden = blocks(params.llm.layers, np.concatenate(row), cfg.llm)
    return rms_norm(hidden, params.llm.final_norm, cfg.llm) @ params.llm.lm_head.T


def oracle_inside(params: LlavaMini, example: Example, cfg: LlavaMiniConfig) -> np.ndarray:
    """Appendix E.3: all patches go through the first LLM layers and are compressed behind them."""
    tower = tiny.on_device(params.vision)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    row, is_patch = [], []
    images = iter(example.pixels)
    frames = iter(example.frames)
    for token in example.ids:
        vectors = params.llm.embed_tokens[max(token, 0)][None]
        if token < 0:
            pictures = np.concatenate([next(images) for _ in range(next(frames))])
            features = clip.apply(tower, jnp.asarray(pictures), cfg.vision, jnp.float32)
            vectors = project(params.projector, np.concatenate(np.asarray(features, np.float64)))
        row.append(vectors)
        is_patch.append(np.full(len(vectors), token < 0))
    first, rest = (
        jax.tree.map(lambda a, part=part: a[part], params.llm.layers)
        for part in (slice(0, cfg.inside_layers), slice(cfg.inside_layers, None))
    )
    hidden, is_patch = blocks(first, np.concatenate(row), cfg.llm), np.concatenate(is_patch)
    short, position, patches = [], 0, cfg.vision.grid**2
    while position < len(hidden):
        size = patches if is_patch[position] else 1
        part = hidden[position : position + size]
        short.append(
            compress(params.compressor.query, part, cfg.compressor.grid) if size > 1 else part
        )
        position += size
    hidden = blocks(rest, np.concatenate(short), cfg.llm)
    return rms_norm(hidden, params.llm.final_norm, cfg.llm) @ params.llm.lm_head.T


def project(projector, x: np.ndarray) -> np.ndarray:
    x = x @ projector.fc1.kernel.T + projector.fc1.bias
    x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x @ projector.fc2.kernel.T + projector.fc2.bias


def merge(parts: list[np.ndarray], k: int, side: int) -> np.ndarray:
    """Sub-images as one image, patch by patch."""
    whole = [
        parts[(y // side) * k + x // side][(y % side) * side + x % side]
        for y in range(k * side)
        for x in range(k * side)
    ]
    return np.stack(whole)


def sinusoids(side: int, width: int) -> np.ndarray:
    """He et al. 2021: half of the width for the column, half for the row, each [sin, cos]."""
    omega = [10000 ** (-i / (width // 4)) for i in range(width // 4)]

    def along(place: int) -> list[float]:
        return [math.sin(place * w) for w in omega] + [math.cos(place * w) for w in omega]

    return np.array([along(x) + along(y) for y in range(side) for x in range(side)])


def compress(query: np.ndarray, patches: np.ndarray, grid: int) -> np.ndarray:
    width = patches.shape[1]
    queries = query + sinusoids(grid, width)
    keys = patches + sinusoids(math.isqrt(len(patches)), width)
    return softmax(queries @ keys.T) @ patches


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def rms_norm(x: np.ndarray, scale: np.ndarray, llm) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + llm.norm_eps) * scale


def blocks(layers, x: np.ndarray, llm) -> np.ndarray:
    """LLaMA blocks over one sequence, causal, positions 0, 1, 2, ..."""
    half, n = llm.head_width // 2, len(x)
    turn = np.exp(1j * np.outer(np.arange(n), [llm.rope.theta ** (-i / half) for i in range(half)]))
    for i in range(layers.q_proj.shape[0]):
        w = jax.tree.map(lambda a, i=i: a[i], layers)
        y = rms_norm(x, w.attn_norm, llm)
        mixed = np.zeros((n, llm.heads, llm.head_width))
        for head in range(llm.heads):
            shared = head // (llm.heads // llm.kv_heads)
            q, k = y @ w.q_proj[head].T, y @ w.k_proj[shared].T
            q, k = ((a[:, :half] + 1j * a[:, half:]) * turn for a in (q, k))
            scores = (q @ k.conj().T).real / math.sqrt(llm.head_width)
            scores[np.triu_indices(n, 1)] = -np.inf
            mixed[:, head] = softmax(scores) @ (y @ w.v_proj[shared].T)
        x = x + np.einsum("tnh,dnh->td", mixed, w.o_proj)
        y = rms_norm(x, w.mlp_norm, llm)
        gate = y @ w.gate_proj.T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w.up_proj.T)) @ w.down_proj.T
    return x


@pytest.fixture(scope="module")
def cfg() -> LlavaMiniConfig:
    return tiny.model("paper")


CASES = {
    "images and text alone": [
        lambda cfg: tiny.example(1, 9, {3: 1}, cfg),
        lambda cfg: tiny.example(2, 13, {1: 1}, cfg, answer=4),
        lambda cfg: tiny.example(3, 5, {}, cfg),
        lambda cfg: tiny.example(4, 8, {0: 1, 7: 1}, cfg),
    ],
    "high resolution": [
        lambda cfg: tiny.example(5, 7, {2: 1}, cfg, parts=5),
        lambda cfg: tiny.example(6, 9, {0: 1}, cfg, parts=5, answer=2),
    ],
    "video": [
        lambda cfg: tiny.example(7, 6, {1: 3}, cfg),
        lambda cfg: tiny.example(8, 10, {4: 4}, cfg, answer=3),
    ],
}


@pytest.mark.parametrize("rows", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_logits(cfg: LlavaMiniConfig, rows: list, padding_side: str) -> None:
    examples = [make(cfg) for make in rows]
    params = tiny.weights(cfg)
    batch = tiny.batch(examples, cfg, padding_side=padding_side)
    found = np.asarray(tiny.logits(params, batch.inputs, cfg))
    for example, row, slots in zip(examples, found, batch.inputs.slots_BS, strict=True):
        expected = oracle(params, example, cfg)
        np.testing.assert_allclose(row[slots >= 0], expected, atol=LOGITS_ATOL)


def test_compression_inside_the_language_model() -> None:
    cfg = tiny.model("paper", inside_layers=1)
    examples = [make(cfg) for make in CASES["images and text alone"] + CASES["video"]]
    params = tiny.weights(cfg)
    buckets = Buckets(lengths=(16, 32, 80), images=(4,))
    batch = tiny.batch(examples, cfg, buckets=buckets)
    found = np.asarray(tiny.logits(params, batch.inputs, cfg))
    for example, row, slots in zip(examples, found, batch.inputs.slots_BS, strict=True):
        expected = oracle_inside(params, example, cfg)
        np.testing.assert_allclose(row[slots >= 0], expected, atol=LOGITS_ATOL)


def test_the_oracle_sees_what_the_paper_says(cfg: LlavaMiniConfig) -> None:
    """The comparison means something: the frames' order and what is fused move the logits."""
    params = tiny.weights(cfg)
    video = tiny.example(7, 6, {1: 3}, cfg)
    base = oracle(params, video, cfg)
    backwards = Example(video.ids, video.fuse, video.labels, video.pixels[::-1], video.frames)
    fewer = video.fuse.copy()
    fewer[4] = False
    unfused = Example(video.ids, fewer, video.labels, video.pixels, video.frames)
    for other in (backwards, unfused):
        assert np.abs(oracle(params, other, cfg) - base).max() > 100 * LOGITS_ATOL
    assert np.all(video.labels == IGNORE)
