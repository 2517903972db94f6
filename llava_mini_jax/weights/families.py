"""Families of decoders: what Hugging Face's classes call them, and what each means by its fields.

    model_type --FAMILIES--> defaults of its class --own_fields--> biases, norms, window, positions
    LlamaConfig --family_of--> the first family that can say it --own_json--> its fields

One block computes them all (models/decoder.py). What a class leaves out of a file because it is a
default, and which field of which class changes what, was read from transformers 5.24.
"""

import dataclasses
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields
from llava_mini_jax.models.llama import LlamaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    word: str  # in the names of classes: Qwen2ForCausalLM, LlavaQwen2ForCausalLM
    sizes: dict[str, Any]  # what a nested config leaves out where it is a default
    kv_heads: int | None = None  # where the field is absent; None: as many as heads
    head_width: int | None = None  # None: width / heads
    theta: float = 10000.0
    tied_head: bool = False
    window: int | None = None  # positions, where the field is absent


_LLAMA = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    vocab_size=32000,
)
_MISTRAL = _LLAMA | dict(intermediate_size=14336, max_position_embeddings=4096 * 32)
_QWEN = _LLAMA | dict(intermediate_size=22016, max_position_embeddings=32768, vocab_size=151936)
_SMOLLM3 = _LLAMA | dict(
    hidden_size=2048,
    num_hidden_layers=36,
    num_attention_heads=16,
    max_position_embeddings=32768,
    vocab_size=128256,
)
# The order in which `family_of` asks them.
FAMILIES = {
    "llama": Family(word="Llama", sizes=_LLAMA),
    "mistral": Family(word="Mistral", sizes=_MISTRAL, kv_heads=8, window=4096),
    "qwen2": Family(word="Qwen2", sizes=_QWEN, kv_heads=32, window=4096),
    "qwen3": Family(word="Qwen3", sizes=_QWEN, kv_heads=32, head_width=128, window=4096),
    "smollm3": Family(word="SmolLM3", sizes=_SMOLLM3, kv_heads=4, theta=2000000.0, tied_head=True),
}
# Layers up to this one see everything in Qwen's classes where the field is absent.
_MAX_WINDOW_LAYERS = 28


def own_fields(f: Fields, kind: str, layers: int, max_positions: int) -> dict[str, Any]:
    """The fields of LlamaConfig that tell families apart, read or refused by name."""
    qwen2 = kind == "qwen2"
    because = "q, k and v have no biases" if qwen2 else "q, k, v and o have biases"
    f.only("attention_bias", qwen2, because=because)
    f.only("qkv_bias", qwen2, because=because)
    if kind != "qwen3":
        f.only("use_qk_norm", False, because="queries and keys are normalised (Qwen3's)")
    f.only("use_mrope", False, because="rotary positions have several axes (Qwen2-VL's)")
    nope_layers = _nope_layers(f, kind, layers)
    return dict(
        qkv_bias=qwen2,
        qk_norm=kind == "qwen3",
        window=_window(f, kind, layers, max_positions, nope_layers),
        nope_layers=nope_layers,
    )


def _nope_layers(f: Fields, kind: str, layers: int) -> tuple[int, ...]:
    if kind != "smollm3":
        because = "some layers have no rotary positions (SmolLM3's)"
        f.only("no_rope_layers", [], [1] * layers, because=because)
        f.only("no_rope_layer_interval", because=because)
        return ()
    # In spite of its name: 1 where a layer has rotary positions.
    interval = f.size("no_rope_layer_interval", 4)
    rotary = f.get("no_rope_layers", list, None)
    if rotary is None:
        rotary = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if len(rotary) < layers or any(type(one) is not int or one not in (0, 1) for one in rotary):
        raise f.wrong("no_rope_layers", f"a 1 (rotary positions) or 0 for each of {layers} layers")
    return tuple(layer for layer in range(layers) if not rotary[layer])


def _window(
    f: Fields, kind: str, layers: int, max_positions: int, nope_layers: tuple[int, ...]
) -> int | None:
    """How many positions every layer sees, None for all; layers that differ are refused."""
    family = FAMILIES[kind]
    types = f.get("layer_types", list, None)
    known = ("full_attention", "sliding_attention")
    if strange := [one for one in types or [] if one not in known]:
        raise InputError(
            f'{f.where}: "layer_types" has {strange[0]!r}; only {" and ".join(known)} are supported'
        )
    # A null says that there is none; what is absent is the class's default.
    window = f.size("sliding_window", None if "sliding_window" in f.values else family.window)
    if kind in ("qwen2", "qwen3", "smollm3"):
        windowed = _windowed_layers(f, kind, layers, nope_layers)
        window = window if f.get("use_sliding_window", bool, False) else None
    else:
        f.only("use_sliding_window", False, because="attention sees a window of the text only")
        windowed = [window is not None] * layers
    if types is not None:
        windowed = [one == "sliding_attention" for one in types]
    if window is None and any(windowed) and types is not None:
        raise InputError(
            f'{f.where}: "layer_types" has "sliding_attention", but no sliding_window is in use'
            " (sliding_window, use_sliding_window); correct one of them"
        )
    # One that covers every text changes nothing.
    if window is None or window >= max_positions or not any(windowed):
        return None
    if kind == "llama":
        raise InputError(
            f'{f.where}: "sliding_window" is {window}, which LLaMA\'s class ignores; use'
            ' model_type "mistral" if the model was trained with it, or remove the field'
        )
    if len(windowed) < layers or not all(windowed[:layers]):
        field = "layer_types" if types is not None else "max_window_layers"
        raise InputError(
            f'{f.where}: by "{field}" some layers see a window of {window} positions and others'
            " everything, which is not supported; use a model whose layers are equal"
        )
    return window


def _windowed_layers(f: Fields, kind: str, layers: int, nope_layers: tuple[int, ...]) -> list[bool]:
    """Which layers have the window where one is in use, by the rule of the class."""
    first = f.get("max_window_layers", int, _MAX_WINDOW_LAYERS)
    if kind == "smollm3":
        return [layer in nope_layers for layer in range(layers)]
    return [layer >= first for layer in range(layers)]


def family_of(cfg: LlamaConfig) -> str:
    """The family whose class computes what `cfg` says; InputError where none does."""
    own = (cfg.qkv_bias, cfg.qk_norm, bool(cfg.nope_layers))
    found = {
        (False, False, False): "llama" if cfg.window is None else "mistral",
        (True, False, False): "qwen2",
        (False, True, False): "qwen3",
        (False, False, True): "smollm3",
    }
    if own not in found:
        raise InputError(
            "a language model with more than one of qkv_bias, qk_norm and nope_layers is of no"
            " published family: it cannot be written as a folder"
        )
    return found[own]


def own_json(cfg: LlamaConfig) -> dict[str, Any]:
    """The fields that only the family's class has: `own_fields` reads them back."""
    kind, windowed = family_of(cfg), cfg.window is not None
    if kind == "llama":
        return {}
    fields: dict[str, Any] = {"sliding_window": cfg.window}
    if kind != "mistral":
        fields["use_sliding_window"] = windowed
    if kind in ("qwen2", "qwen3"):
        fields["max_window_layers"] = 0 if windowed else cfg.layers
    if kind == "smollm3":
        fields["no_rope_layers"] = [int(n not in cfg.nope_layers) for n in range(cfg.layers)]
        kinds = "sliding_attention" if windowed else "full_attention"
        fields["layer_types"] = [kinds] * cfg.layers
    return fields
