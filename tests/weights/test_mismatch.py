"""Weights that do not fit: a few lines, with the reason in front where the names tell it."""

import pytest

from llava_mini_jax.weights import mismatch

LAYERS = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(32) for p in "qkvo"]


def told(missing: list[str], unexpected: list[str]) -> list[str]:
    problems = [f"missing {name}" for name in missing] + [f"strange {u}" for u in unexpected]
    return [line.strip() for line in mismatch.summary(missing, unexpected, problems).splitlines()]


@pytest.mark.parametrize(
    ("old", "new", "how"),
    [
        ("model.", "base_model.model.model.", '128 have the prefix "base_model.model."'),
        ("model.", "transformer.", '128 start with "transformer." where "model." is expected'),
        ("model.", "", '128 lack the prefix "model."'),
        ("model.", "model.decoder.", '128 start with "model.decoder." where "model." is expected'),
    ],
)
def test_one_renamed_prefix_is_one_reason(old: str, new: str, how: str) -> None:
    lines = told(LAYERS, [name.replace(old, new, 1) for name in LAYERS])
    assert lines[0].startswith(f"This looks like renamed tensors: {how}; ")
    assert lines[-1] == f"and {2 * 128 - mismatch.SHOWN} more"
    assert len(lines) == mismatch.SHOWN + 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.0.self_attn.q_proj.bias", 'is "qwen2"'),
        ("model.layers.0.self_attn.o_proj.bias", "attention_bias"),
        ("model.layers.0.mlp.up_proj.bias", "mlp_bias"),
        ("model.layers.0.self_attn.q_norm.weight", 'is "qwen3"'),
        ("model.layers.3.self_attn.q_proj.lora_A.weight", "LoRA"),
        ("model.layers.3.self_attn.q_proj.weight_scale_inv", "quantized"),
        ("model.layers.3.self_attn.q_proj.weight.absmax", "quantized"),
        ("model.layers.3.self_attn.q_proj.SCB", "quantized"),
        ("model.layers.3.self_attn.q_proj.qweight", "quantized"),
        ("model.layers.3.mlp.experts.0.up_proj.weight", "experts"),
        ("model.image_newline", "LLaVA-NeXT"),
    ],
)
def test_what_an_unexpected_tensor_tells(name: str, reason: str) -> None:
    assert reason in told([], [name])[0]


def test_what_a_missing_tensor_tells() -> None:
    biases = ["model.mm_projector.0.bias", "model.mm_projector.2.bias"]
    assert "multimodal_projector_bias" in told(biases[:1], [])[0]
    assert "tie_word_embeddings" in told(["lm_head.weight"], [])[0]
    # Among many others it is not the reason.
    assert told([*LAYERS, "lm_head.weight"], [])[0] == f"missing {LAYERS[0]}"


def test_a_few_problems_stand_as_they_are() -> None:
    assert told(["a.weight"], ["b.weight"]) == ["missing a.weight", "strange b.weight"]
