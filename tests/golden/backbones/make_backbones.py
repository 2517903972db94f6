"""Writes the folders beside this script; run once, with torch, which nothing else here needs:

python3 -m venv torchenv
torchenv/bin/pip install torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow
torchenv/bin/python tests/golden/backbones/make_backbones.py

NAME/            a tiny random model as transformers' save_pretrained writes it
NAME/expected.npz   of a language model: ids [B, T], lengths [B], logits [B, T, V]
                    of a tower: pixels [I, Y, X, C], hidden_states of the last block and the one
                    before it; an image and what the folder's image processor makes of it
                    of a LLaVA: pixels, ids, logits

Weights are larger than the usual initialisation's, biases and norms too, so that errors show.
Everything is computed in float32 from the folder as it was written.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

HERE = Path(__file__).parent
LENGTH, SHORT = 24, 17  # of the two rows; what is behind the shorter one is padding
SIZES = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
SMALL_THETA = dict(rope_theta=100.0)  # so that a short text meets every range of a scaling
LLAMA_3_1 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
YARN |= dict(beta_fast=2.0, beta_slow=0.25)  # some pairs lie on the ramp
LANGUAGE_MODELS = {
    "llama_2": ("llama", {}),
    "llama_3_1": ("llama", dict(head_dim=16, rope_parameters=LLAMA_3_1 | SMALL_THETA)),
    "llama_linear": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", factor=3.0) | SMALL_THETA),
    ),
    "llama_dynamic": (
        "llama",
        dict(rope_parameters=dict(rope_type="dynamic", factor=2.0) | SMALL_THETA),
    ),
    "mistral": ("mistral", dict(sliding_window=5, num_attention_heads=4, num_key_value_heads=2)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True, num_attention_heads=4)),
    "qwen2_yarn": ("qwen2", dict(rope_parameters=YARN | SMALL_THETA)),
    "qwen2_window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=7, max_window_layers=0),
    ),
    "qwen3": ("qwen3", dict(head_dim=16, num_attention_heads=2, tie_word_embeddings=True)),
    "smollm2": ("llama", dict(tie_word_embeddings=True, num_hidden_layers=3)),
    "smollm3": ("smollm3", dict(num_hidden_layers=4, tie_word_embeddings=True)),
    "smollm3_yarn": ("smollm3", dict(no_rope_layers=[0, 1], rope_parameters=YARN | SMALL_THETA)),
}
# 14 is no multiple of 4: as in SigLIP's towers of 384 pixels and patches of 14, a margin is left.
TOWER = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=14,
    patch_size=4,
)
PATCHES = 9


def excite(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if "embed_tokens" in name:
                p.copy_(noise)
            elif p.ndim > 1:
                p.copy_(noise * 1.5 / p[0].numel() ** 0.5)
            elif name.endswith("bias"):
                p.copy_(noise * 0.5)
            else:
                p.add_(noise * 0.3)
    return model.eval()


def saved(model: torch.nn.Module, name: str, read: type) -> tuple[Path, torch.nn.Module]:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    excite(model).save_pretrained(folder)
    return folder, read.from_pretrained(folder, dtype=torch.float32).eval()


def language_model(name: str, kind: str, fields: dict) -> None:
    config = AutoConfig.for_model(kind, **SIZES | fields)
    folder, model = saved(AutoModelForCausalLM.from_config(config), name, AutoModelForCausalLM)
    rng = np.random.default_rng(0)
    ids, lengths = rng.integers(3, SIZES["vocab_size"], (2, LENGTH)), np.array([LENGTH, SHORT])
    mask = torch.tensor(np.arange(LENGTH) < lengths[:, None])
    with torch.no_grad():
        logits = model(torch.tensor(ids), attention_mask=mask.long()).logits.numpy()
    np.savez_compressed(folder / "expected.npz", ids=ids, lengths=lengths, logits=logits)


def tower(name: str, model: torch.nn.Module, read: type, processor: object) -> None:
    folder, model = saved(model, name, read)
    processor.save_pretrained(folder)
    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((2, 3, 14, 14)).astype(np.float32)
    vision = getattr(model, "vision_model", model)
    with torch.no_grad():
        hidden = vision(torch.tensor(pixels), output_hidden_states=True).hidden_states
    picture = np.kron(rng.integers(0, 256, (5, 7, 3), np.uint8), np.ones((6, 6, 1), np.uint8))
    made = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"]
    np.savez_compressed(
        folder / "expected.npz",
        pixels=pixels.transpose(0, 2, 3, 1),
        last=hidden[-1].numpy(),
        before=hidden[-2].numpy(),
        picture=picture,
        processed=made.transpose(0, 2, 3, 1),
    )


def towers() -> None:
    crop = dict(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14})
    squeeze = dict(size={"height": 14, "width": 14})
    clip = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    tower("clip", clip, CLIPVisionModel, CLIPImageProcessorPil(**crop))
    siglip = SiglipVisionModel(SiglipVisionConfig(**TOWER))
    tower("siglip", siglip, SiglipVisionModel, SiglipImageProcessorPil(**squeeze))
    # As SigLIP 2 of a fixed resolution is published: a whole model, of SigLIP's type, whose
    # processor resizes with a bilinear filter.
    text = {n: TOWER[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads")}
    text |= dict(num_hidden_layers=1, vocab_size=48, max_position_embeddings=8)
    whole = SiglipModel(SiglipConfig(text_config=text, vision_config=TOWER))
    bilinear = SiglipImageProcessorPil(**squeeze, resample=2)
    tower("siglip2", whole, AutoModel, bilinear)


def llava() -> None:
    """Qwen2 with a SigLIP, as transformers' own class has them: every patch is read."""
    image = SIZES["vocab_size"] - 1
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**SIZES),
        image_token_index=image,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    folder, model = saved(model, "llava_siglip_qwen2", LlavaForConditionalGeneration)
    rng = np.random.default_rng(2)
    before, behind = rng.integers(3, image, 2), rng.integers(3, image, 5)
    ids = np.concatenate([before, np.full(PATCHES, image), behind])[None]
    pixels = rng.standard_normal((1, 3, 14, 14)).astype(np.float32)
    with torch.no_grad():
        logits = model(torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()
    shown = pixels.transpose(0, 2, 3, 1)
    np.savez_compressed(folder / "expected.npz", ids=ids, pixels=shown, logits=logits)


if __name__ == "__main__":
    for name, (kind, fields) in LANGUAGE_MODELS.items():
        language_model(name, kind, fields)
    towers()
    llava()
