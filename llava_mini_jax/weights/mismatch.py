"""Tensors that do not fit a model: which, and what that probably means, in a few lines.

    missing, unexpected, misshapen --summary--> the pattern, if there is one; the first few

One renamed prefix or one bias a layer makes hundreds of problems; a person needs the one reason.
"""

import re
from collections import Counter
from collections.abc import Sequence

SHOWN = 10  # problems; more hide the reason instead of telling it

# What unexpected tensors tell of the model that they were saved from.
_SIGNS = (
    (r"lora_[AB]\b|lora_embedding|\.base_layer\.", "LoRA adapters: merge them into the model"),
    (
        r"(_scale|_scale_inv|\.scales|\.scale|\.qzeros|\.qweight|\.absmax|\.nested_absmax"
        r"|\.quant_map|\.g_idx|\.SCB|weight_format|bitsandbytes__\w+|_packed|_zero_point)$",
        "scales of a quantized model: use the original one in float16, bfloat16 or float32",
    ),
    (
        r"self_attn\.o_proj\.bias$",
        "a bias behind the attention (attention_bias): not supported",
    ),
    (
        r"self_attn\.[qkv]_proj\.bias$",
        'biases of queries, keys and values: the model_type that has them is "qwen2"',
    ),
    (r"layers\.\d+\.mlp\.\w+\.bias$", "biases in the MLP (mlp_bias): not supported"),
    (r"\.[qk]_norm\.", 'norms of queries and keys: the model_type that has them is "qwen3"'),
    (r"(pre|post)_feedforward_layernorm", "norms around the MLP (Gemma 2's): not supported"),
    (r"\.experts\.|block_sparse_moe", "a mixture of experts: not supported"),
    (r"image_newline$", "LLaVA-NeXT's newline between parts of images: not supported"),
    (r"vision_resampler|mm_resampler", "a resampler that is not LLaVA-Mini's: not supported"),
)
_MISSING_SIGNS = (
    (
        r"(mm_projector\.\d|multi_modal_projector\.linear_\d)\.bias$",
        "a projector without biases (multimodal_projector_bias false): not supported",
    ),
    (
        r"lm_head\.weight$",
        "no head: a model whose head is its table of tokens says tie_word_embeddings true",
    ),
)


def summary(missing: Sequence[str], unexpected: Sequence[str], problems: Sequence[str]) -> str:
    """Lines about `problems` (their texts): the pattern behind the names, then the first few.

    `missing` and `unexpected` are published names.
    """
    reasons = [text for sign, text in _SIGNS if any(re.search(sign, u) for u in unexpected)]
    lost = [text for sign, text in _MISSING_SIGNS if any(re.search(sign, m) for m in missing)]
    if renamed := _renamed_prefix(missing, unexpected):
        reasons = [renamed]
    elif len(missing) <= len(lost):  # nothing else is missing, so this is what it is
        reasons += lost
    lines = [f"This looks like {reason}." for reason in reasons]
    lines += problems[:SHOWN]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    return "\n  ".join(lines)


def _renamed_prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """How the beginnings of names differ, where that explains at least half of what is missing."""
    by_ending: dict[str, str] = {}
    for name in unexpected:
        for prefix, ending in _cuts(name):
            by_ending.setdefault(ending, prefix)
    pairs: Counter[tuple[str, str]] = Counter()
    for name in missing:
        # The longest common ending leaves the prefixes that differ.
        for prefix, ending in _cuts(name):
            if ending in by_ending:
                pairs[(prefix, by_ending[ending])] += 1
                break
    if not pairs:
        return None
    (ours, theirs), count = pairs.most_common(1)[0]
    if count < 3 or 2 * count < len(missing):
        return None
    how = f'start with "{theirs}" where "{ours}" is expected'
    if not ours or not theirs:
        how = f'have the prefix "{theirs}"' if theirs else f'lack the prefix "{ours}"'
    return f"renamed tensors: {count} {how}; save the model again with its published names"


def _cuts(name: str) -> list[tuple[str, str]]:
    """("", "a.b.c"), ("a.", "b.c"), ("a.b.", "c"): the longest ending first."""
    words = name.split(".")
    return [
        ("".join(f"{word}." for word in words[:n]), ".".join(words[n:])) for n in range(len(words))
    ]
