"""Generation on fixed shapes: frames in chunks, one prefill, a decoding loop on the device.

    frames --encode_frames, a chunk a call--> visual tokens, running sum of fused text
    text ----------------------------------------|--splice--prefill--> cache, first logits
                                                                          |   '--upcoming--> token
                                              decode: while_loop over steps, until `limit`

Each function compiles once per bucket of shapes; how many tokens a call decodes, the sampling
settings and the stop tokens are data. A batch holds rows of any length and kind: images, videos,
text alone.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.data.batches.examples import BatchLayout, Buckets, Example, collate
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.sampling import Sampling, is_end, next_token
from llava_mini_jax.models import cache as kv
from llava_mini_jax.models import llama, llava_mini
from llava_mini_jax.models.llava_mini import Inputs, LlavaMini, LlavaMiniConfig
from llava_mini_jax.models.prefusion import take_fused
from llava_mini_jax.models.splice import splice
from llava_mini_jax.ops import masks
from llava_mini_jax.params import Array


@struct.dataclass
class Encoded:
    """What a batch's pictures have given so far."""

    visual_BVD: Array  # visual tokens in each row's order
    fused_BFD: Array  # float32 sum of the fused text over the row's images


@struct.dataclass
class Decoding:
    cache: kv.Cache
    logits_BV: Array  # float32, of the token to come
    position_B: Array  # the position id of the token to come
    tokens_BN: Array  # the answers so far
    done_B: Array  # the row has met a stop token (its last one), or is stopped by the host
    step: Array  # int32 scalar: tokens decoded so far


@partial(jax.jit, static_argnames="cfg")
def embed_text(
    params: LlavaMini, ids_BT: Array, fuse_BF: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """(embeddings [B, T, D], those of them that take part in pre-fusion [B, F, D])."""
    text_BTD = llava_mini.embed_text(params, ids_BT, cfg)
    return text_BTD, take_fused(text_BTD, fuse_BF)


# Donated: every chunk writes into the same tokens and the same sum.
@partial(jax.jit, static_argnames="cfg", donate_argnames="encoded")
def encode_frames(
    params: LlavaMini,
    encoded: Encoded,
    pixels_IJYXC: Array,
    row_I: Array,
    place_I: Array,
    text_BFD: Array,
    cfg: LlavaMiniConfig,
) -> Encoded:
    """`encoded` with a chunk of images or frames added.

    `row_I` says whose image it is (out of range: padding of the chunk), `place_I` where its first
    visual token goes in the row.
    """
    # Padding's row is out of range: it takes some row here, and is dropped when it is written.
    text_IFD = _by_batch(_everywhere(text_BFD).at[row_I].get(mode="clip"))
    tokens_IQD, fused_IFD = llava_mini.encode_images(params, _by_batch(pixels_IJYXC), text_IFD, cfg)
    # Images and rows are not split alike over a mesh, so they meet where all are on every device.
    tokens_IQD, fused_IFD = _everywhere(tokens_IQD), _everywhere(fused_IFD)
    places_IQ = place_I[:, None] + jnp.arange(tokens_IQD.shape[1])
    visual_BVD = encoded.visual_BVD.at[row_I[:, None], places_IQ].set(tokens_IQD, mode="drop")
    fused_BFD = encoded.fused_BFD.at[row_I].add(fused_IFD.astype(jnp.float32), mode="drop")
    return Encoded(visual_BVD=visual_BVD, fused_BFD=fused_BFD)


def _everywhere(x: Array) -> Array:
    return sharding.constrain(x, (None,) * x.ndim)


def _by_batch(x: Array) -> Array:
    return sharding.constrain(x, ("batch", *(None,) * (x.ndim - 1)))


@partial(jax.jit, static_argnames=("cfg", "room"))
def prefill(
    params: LlavaMini,
    encoded: Encoded,
    images_B: Array,
    text_BTD: Array,
    inputs: Inputs,
    cfg: LlavaMiniConfig,
    room: int,
) -> Decoding:
    """The state before the first token, with a cache for the prompt and `room` tokens more."""
    images_B, visual_BVD = _by_batch(images_B), _by_batch(encoded.visual_BVD)
    total_BFD = _by_batch(encoded.fused_BFD)
    text_BTD = llava_mini.put_mean(total_BFD, images_B, text_BTD, inputs.fuse_BF)
    slots_BS = inputs.slots_BS
    B, S = slots_BS.shape
    x_BSD = splice(text_BTD, visual_BVD, slots_BS)
    valid_BS = slots_BS >= 0
    llm = cfg.llm
    cache = kv.empty(llm.layers, B, S + room, llm.kv_heads, llm.head_width, cfg.dtype)
    positions_BS = masks.running_positions(valid_BS)
    x_BSD, cache = llama.apply_cached(
        params.llm, x_BSD, positions_BS, valid_BS, cache, llm, attention=cfg.attention
    )
    # The last valid slot, whichever side is padded: the head runs on that position alone.
    last_B = jnp.where(valid_BS, jnp.arange(S), 0).max(axis=1)
    last_B1D = jnp.take_along_axis(x_BSD, last_B[:, None, None], axis=1)
    logits_BV = llama.logits(params.llm, last_B1D)[:, 0]
    return begun(cache, logits_BV, valid_BS.sum(axis=1, dtype=jnp.int32), room)


def begun(cache: kv.Cache, logits_BV: Array, position_B: Array, room: int) -> Decoding:
    """The state behind prompts of `position_B` positions; rows of none are done at once."""
    return Decoding(
        cache=cache,
        logits_BV=logits_BV,
        position_B=position_B,
        tokens_BN=_by_batch(jnp.zeros((len(position_B), room), jnp.int32)),
        done_B=position_B == 0,
        step=jnp.zeros((), jnp.int32),
    )


@jax.jit
def upcoming(logits_BV: Array, sampling: Sampling, step: Array) -> Array:
    """Token ids [B] that `decode` begins with: known before it is called."""
    return next_token(logits_BV, sampling, step)


# Donated: a cache that came back as a copy would be held twice.
@partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def decode(
    params: LlavaMini, state: Decoding, sampling: Sampling, limit: Array, cfg: LlavaMiniConfig
) -> Decoding:
    """Decodes until `limit` tokens are there in all, or every row is done."""

    def unfinished(state: Decoding) -> Array:
        return (state.step < limit) & ~state.done_B.all()

    def one(state: Decoding) -> Decoding:
        token_B = next_token(state.logits_BV, sampling, state.step)
        tokens_BN = jax.lax.dynamic_update_slice(state.tokens_BN, token_B[:, None], (0, state.step))
        # Plain embeddings, never fused: so the release generates, too.
        x_B1D = llama.embed(params.llm, token_B[:, None], cfg.dtype)
        # All rows fill slots together: a finished row fills its with what nobody attends to.
        valid_B1 = ~state.done_B[:, None]
        x_B1D, cache = llama.apply_cached(
            params.llm,
            x_B1D,
            state.position_B[:, None],
            valid_B1,
            state.cache,
            cfg.llm,
            attention=cfg.attention,
        )
        return Decoding(
            cache=cache,
            logits_BV=llama.logits(params.llm, x_B1D)[:, 0],
            position_B=state.position_B + 1,
            tokens_BN=tokens_BN,
            done_B=state.done_B | is_end(token_B, sampling),
            step=state.step + 1,
        )

    return jax.lax.while_loop(unfinished, one, state)


@jax.jit
def told(tokens_BN: Array, token_B: Array, step: Array) -> Array:
    """`tokens_BN` with the next one behind the `step` that are there; and `step`, in a last column.

    An array of its own: the state that it comes from is donated to the next call.
    """
    tokens_BN = jax.lax.dynamic_update_slice(tokens_BN, token_B[:, None], (0, step))
    return jnp.concatenate([tokens_BN, jnp.full_like(token_B[:, None], step)], axis=1)


class Calls:
    """Calls of `decode` for one batch, which are read in their order.

    A call that is dispatched before the one in front of it is read finds the device busy. One that
    nobody reads has changed nothing but `state`.
    """

    def __init__(
        self,
        params: LlavaMini,
        state: Decoding,
        sampling: Sampling,
        cfg: LlavaMiniConfig,
        *,
        steps: int,  # tokens of a call, at most
        most: int,  # tokens of an answer
    ):
        self.state = state  # behind all calls that were dispatched
        self.unread: deque[Array] = deque()  # what those say that were not read
        self._params, self._sampling, self._cfg = params, sampling, cfg
        self._steps, self._most = steps, most
        self._read = 0  # tokens
        self.known = 1  # tokens, once all calls are read

    def first(self) -> np.ndarray:
        """Ids [B, 1] of the answers' first tokens, which the prompts' logits give."""
        self._read = 1
        return np.asarray(self._upcoming())[:, None]

    def dispatch(self) -> None:
        """Another call; returns at once."""
        self.known = min(self.known + self._steps, self._most)
        # Less one: the last token comes from the logits before it, and is itself not decoded.
        limit = np.int32(self.known - 1)
        self.state = decode(self._params, self.state, self._sampling, limit, self._cfg)
        self.unread.append(told(self.state.tokens_BN, self._upcoming(), self.state.step))

    def _upcoming(self) -> Array:
        return upcoming(self.state.logits_BV, self._sampling, self.state.step)

    def read(self) -> np.ndarray:
        """Ids [B, n] that the next call adds."""
        told_BN = np.asarray(self.unread.popleft())
        before, self._read = self._read, int(told_BN[0, -1]) + 1
        return told_BN[:, before : self._read]

    def stop(self, done_B: np.ndarray) -> None:
        """The rows that are done: the device knows stop tokens alone. All calls have been read."""
        self.state = dataclasses.replace(self.state, done_B=sharding.put_batch(done_B))


def refuse_inside(cfg: LlavaMiniConfig) -> None:
    """InputError for what no cache holds (inference/recompute.py answers it).

    That is compression inside the language model, and different numbers of tokens of pictures.
    """
    refuse_question(cfg)
    if cfg.declared.adaptive:
        raise InputError(
            f'compressor "{cfg.compressor.kind}" gives pictures different numbers of tokens and'
            " decodes without a cache; use Model.generate or eval.py, or give it a fixed ratio"
        )
    if cfg.inside_layers:
        raise InputError(
            f"the model compresses after layer {cfg.inside_layers} of its LLM and decodes"
            " without a cache; take one that compresses in front of it"
        )


def refuse_question(cfg: LlavaMiniConfig) -> None:
    """InputError for a compressor that reads the question: requests lack its vocabulary."""
    if cfg.declared.reads.question:
        raise InputError(
            f'compressor "{cfg.compressor.kind}" reads the question in a vocabulary of its own,'
            " which requests and data sets do not give; call models/llava_mini.py with"
            " Inputs.question_BT"
        )


FRAME_CHUNKS = (1, 2, 4, 8)  # images encoded in one call: the largest that the rest fills


def encode_and_prefill(
    params: LlavaMini,
    cfg: LlavaMiniConfig,
    examples: Sequence[Example],
    buckets: Buckets,
    max_length: int,
    padding_side: str,
    room: int,
    call: Callable[..., Any] = lambda program, *arguments: program(*arguments),
) -> Decoding:
    """A batch of prompts from pictures and text to the state before the first token.

    `call` runs each program, or compiles it alone (warm_up.py). Raises InputError for compression
    inside the language model: no cache holds what that needs.
    """
    refuse_inside(cfg)
    parts = max((e.pixels.shape[1] for e in examples if len(e.pixels)), default=1)
    tokens = cfg.tokens_per_image(parts)
    layout = BatchLayout.of(
        cfg, parts, buckets=buckets, padding_side=padding_side, max_length=max_length
    )
    # Frames follow a chunk at a time: those of a whole batch never lie on the device at once.
    batch = collate(examples, layout, truncate=False, with_pixels=False).inputs
    batch = sharding.put_batch(batch)
    text_BTD, text_BFD = call(embed_text, params, batch.ids_BT, batch.fuse_BF, cfg)
    most = max(len(e.pixels) for e in examples)
    places = buckets.image_count(most) * tokens
    encoded = Encoded(
        visual_BVD=jnp.zeros((len(examples), places, cfg.llm.width), cfg.dtype),
        fused_BFD=jnp.zeros(text_BFD.shape, jnp.float32),
    )
    for pixels, rows, numbers in frame_chunks(examples):
        places_I = numbers * tokens
        encoded = call(encode_frames, params, encoded, pixels, rows, places_I, text_BFD, cfg)
    images_B = np.array([len(e.pixels) for e in examples], np.int32)
    return call(prefill, params, encoded, images_B, text_BTD, batch, cfg, room)


def frame_chunks(
    examples: Sequence[Example],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(pixels [I, ...], row [I], number within the row [I]) of all images, in chunks of few sizes.

    The last chunk is padded with row = len(examples), which `encode_frames` drops.
    """
    places = [(row, i) for row, e in enumerate(examples) for i in range(len(e.pixels))]
    while places:
        size = next((s for s in FRAME_CHUNKS if s >= len(places)), FRAME_CHUNKS[-1])
        now, places = places[:size], places[size:]
        first = examples[now[0][0]].pixels
        pixels = np.zeros((size, *first.shape[1:]), first.dtype)
        for slot, (row, i) in enumerate(now):
            pixels[slot] = examples[row].pixels[i]
        padding = [(len(examples), 0)] * (size - len(now))
        rows, numbers = np.array(now + padding, np.int32).T
        yield pixels, rows, numbers
