"""LLaMA and its relatives: Vicuna, LLaMA 2 and 3, Qwen2, Qwen3, Mistral, SmolLM2 and SmolLM3.

    ids_BT --embed--> x_BTD --[ norm, attention, norm, MLP ] x L--> final norm --head--> logits_BTV

The language model and the pre-fusion module run the same `block` (models/decoder.py): what differs
is where earlier keys and values come from, which the caller passes in as `remember`.

Dimensions: B batch, T query and S key positions, D width, M MLP width, N heads, K key/value heads,
H head width, V vocabulary, L layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.models.decoder import Block, Layer, LlamaConfig, block, block_spec, each
from llava_mini_jax.ops.attention import attend
from llava_mini_jax.ops.einsum import einsum
from llava_mini_jax.ops.layers import fold_layers
from llava_mini_jax.ops.masks import Mask, restarted, running_positions
from llava_mini_jax.ops.norm import rms_norm
from llava_mini_jax.ops.rope import angles
from llava_mini_jax.params import Array, Leaf, ParamSpec, normal, ones, stack, unstack


@struct.dataclass
class Llama:
    embed_tokens: Leaf
    layers: Block
    final_norm: Leaf
    lm_head: Leaf  # None: tied to embed_tokens


def spec(cfg: LlamaConfig) -> Llama:
    table = ParamSpec((cfg.vocab_size, cfg.width), ("vocab", "embed"), normal(cfg.init_stddev))
    return Llama(
        embed_tokens=table,
        layers=stack(cfg.layers, block_spec(cfg)),
        final_norm=ParamSpec((cfg.width,), ("norm",), ones),
        lm_head=None if cfg.tied_head else table,
    )


def embed(params: Llama, ids_BT: Array, dtype: jnp.dtype) -> Array:
    """Token embeddings [B, T, D] in `dtype`; ids below 0 (image marks) get the row of id 0."""
    with jax.named_scope("embed"):
        # Each device looks up its piece of the width for its neighbours' rows too, and hands them
        # over: the table, which is much larger than the rows, is not gathered over fsdp.
        shape = (*ids_BT.shape, params.embed_tokens.shape[1])
        spec = sharding.partition(shape, ("lookup", None, "embed"))
        # As in the release; neither pre-fusion nor the splice lets anybody read that row.
        ids_BT, table_VD = jnp.maximum(ids_BT, 0), params.embed_tokens
        if sharding.on_one_cpu() and table_VD.dtype.itemsize < 4:
            # Tied to the ids: else XLA puts a float32 table in front of the loop over tokens.
            ids_BT, table_VD = jax.lax.optimization_barrier((ids_BT, table_VD))
        if ids_BT.size == 1 and sharding.platform() == "gpu":
            # XLA for GPUs slices at a single id, and gathers a table that is cut for that: two.
            again_BT = jax.lax.optimization_barrier(jnp.repeat(ids_BT, 2, axis=1))
            found_BTD = table_VD.at[again_BT].get(out_sharding=spec)[:, :1].astype(dtype)
        else:
            found_BTD = table_VD.at[ids_BT].get(out_sharding=spec).astype(dtype)
        return sharding.constrain(found_BTD, ("batch", None, None))


def apply(
    params: Llama,
    x_BTD: Array,
    valid_BT: Array | None,
    cfg: LlamaConfig,
    *,
    holes: bool = False,
    segments_BT: Array | None = None,
    remat: str = "none",
    attention: str = "auto",
) -> Array:
    """Hidden states [B, T, D] after the final norm for whole sequences of embeddings.

    `holes`: positions are counted without invalid places, which may lie between valid ones.
    `segments_BT`: the sequence of each place, where rows hold several, one behind the other; each
    sees itself alone, and its positions begin at 0.
    """
    positions_BT = None if valid_BT is None or not holes else running_positions(valid_BT)
    if segments_BT is not None:
        if positions_BT is None:
            positions_BT = _places(x_BTD)
        positions_BT = restarted(positions_BT, segments_BT)
    x_BTD = run_whole(
        params.layers,
        x_BTD,
        valid_BT,
        cfg,
        positions_BT=positions_BT,
        segments_BT=segments_BT,
        remat=remat,
        attention=attention,
    )
    return rms_norm(x_BTD, params.final_norm, cfg.norm_eps)


def run_whole(
    layers: Block | tuple,
    x_BTD: Array,
    valid_BT: Array | None,
    cfg: LlamaConfig,
    *,
    positions_BT: Array | None = None,
    segments_BT: Array | None = None,
    remat: str = "none",
    attention: str = "auto",
) -> Array:
    """Layers over whole sequences, without the final norm; positions are places if not given.

    `valid_BT` None: nothing but padding on the right is invalid, which no valid position sees.
    """
    if positions_BT is None:
        # Left padding is counted, to no effect: rotary attention sees differences only.
        positions_BT = _places(x_BTD)
    mask = Mask(
        first=0,
        valid_BS=valid_BT,
        query_segments_BT=segments_BT,
        key_segments_BS=segments_BT,
        window=cfg.window,
    )
    attends = attend(mask, attention)
    with jax.named_scope("llm"):
        return run_layers(each(layers, cfg), x_BTD, positions_BT, attends, cfg, remat=remat)


def _places(x_BTD: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])


def run_layers(
    layers: Layer | tuple,
    x_BTD: Array,
    positions_BT: Array,
    attends: Callable,
    cfg: LlamaConfig,
    *,
    remat: str = "none",
) -> Array:
    """A stack of blocks, as `each` gives it, over whole sequences, without the final norm."""
    angles_BTH = angles(positions_BT, cfg.head_width, cfg.rope)

    def body(layer: Layer, x_BTD: Array, _: None) -> tuple[Array, None]:
        x_BTD, _ = block(layer, x_BTD, angles_BTH, attends, cfg)
        return x_BTD, None

    return fold_layers(body, layers, x_BTD, remat=remat)[0]


def run_remembering(
    layers: Block | tuple,
    x_BTD: Array,
    positions_BT: Array,
    attends: Callable | Sequence[Callable],
    remember: Callable[[int, Array, Array], tuple[Array, Array, Any]],
    cfg: LlamaConfig,
) -> tuple[Array, list[Any]]:
    """(x, memories of the layers) of a stack, without the final norm.

    `remember(layer, k, v)` is `block`'s, told which layer of the stack it is; `attends` is of all
    layers, or of each.
    """
    angles_BTH = angles(positions_BT, cfg.head_width, cfg.rope)
    memories = []
    with jax.named_scope("llm"):
        # One by one: a scan would put the layers' caches together, and copy them.
        for number, layer in enumerate(unstack(each(layers, cfg))):
            own = partial(remember, number)
            each_attends = attends if callable(attends) else attends[number]
            x_BTD, memory = block(layer, x_BTD, angles_BTH, each_attends, cfg, own)
            memories.append(memory)
    return x_BTD, memories


def logits(params: Llama, x_BTD: Array) -> Array:
    """Logits [B, T, V] in float32 of normed hidden states."""
    with jax.named_scope("lm_head"):
        head = params.embed_tokens if params.lm_head is None else params.lm_head
        # Widened behind the product, as Hugging Face does: loss and sampling need float32.
        return einsum("BTD,VD->BTV", x_BTD, head, ("batch", None, "vocab")).astype(jnp.float32)
