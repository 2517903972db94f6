"""Writes the folders beside this script; run once, with torch, which nothing else here needs:

python3 -m venv torchenv && torchenv/bin/pip install torch transformers==5.24.0 peft==0.21.2
torchenv/bin/python tests/golden/peft/make_fixtures.py

base/                    a tiny LLaMA with random weights, as transformers saves it
CASE/                    an adapter of it, as PEFT saves it (README.md left out)
CASE/merged.safetensors  the tensors that PEFT's merge_and_unload changes
llava/, llava-lora/      the same of a tiny LlavaForConditionalGeneration
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

HERE = Path(__file__).parent
TEXT = LlamaConfig(
    vocab_size=24,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=64,
)
VISION = CLIPVisionConfig(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
PATTERNS = {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 3}
CASES = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "patterns": dict(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern=PATTERNS,
        alpha_pattern={"k_proj": 5},
    ),
    "rslora": dict(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear"),
    "saved": dict(
        r=2,
        lora_alpha=4,
        target_modules=["o_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
    ),
    "dora": dict(r=2, lora_alpha=4, target_modules=["q_proj"], use_dora=True),
    "pissa": dict(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    "bias": dict(r=2, lora_alpha=4, target_modules=["q_proj"], bias="all"),
}
HF = dict(r=2, lora_alpha=4, target_modules=r".*language_model.*\.(q_proj|up_proj)")


def main() -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(TEXT).save_pretrained(HERE / "base")
    cfg = LlavaConfig(text_config=TEXT, vision_config=VISION, image_token_index=23)
    LlavaForConditionalGeneration(cfg).save_pretrained(HERE / "llava")
    for name, options in CASES.items():
        adapt(LlamaForCausalLM, "base", name, options)
    adapt(LlavaForConditionalGeneration, "llava", "llava-lora", HF)


def adapt(kind: type, base: str, name: str, options: dict) -> None:
    torch.manual_seed(1)
    model = kind.from_pretrained(HERE / base, dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(HERE / name)
    (HERE / name / "README.md").unlink()
    path = HERE / name / "adapter_config.json"
    said = json.loads(path.read_text()) | {"base_model_name_or_path": f"../{base}"}
    path.write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
    merged = adapted.merge_and_unload().state_dict()
    changed = {k: v for k, v in merged.items() if not torch.equal(v, before[k])}
    save_file(changed, HERE / name / "merged.safetensors")


if __name__ == "__main__":
    main()
