"""Folders as transformers itself writes them, and what transformers computes from them.

    PYTHONPATH=overlay python tests/real/peers.py OUT      (an environment with torch)

OUT/NAME/folder   a tiny random model in one published form, excited so that errors show
OUT/NAME/expected.npz   ids, pixels, logits (float32) and greedy ids, computed from that folder
OUT/NAME/refused  instead: a model that must be refused, and the word that its refusal must name
OUT/clip_*        towers alone

Everything is computed after reading the folder back, in float32, so that a form is judged by what
transformers reads from it. `make real-check` runs this, tests/real/check.py and tests/real/back.py.
"""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

NEW_TOKENS = 12
IMAGE_TOKENS = 16  # (28 / 7) squared
LLM = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=28,
    patch_size=7,
    projection_dim=16,
)
ROPE_3_1 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(["USER: What is this? ASSISTANT: a dog"] * 9, trainer)
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, **names)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


tokenizer = make_tokenizer()
IMAGE = tokenizer.convert_tokens_to_ids("<image>")
LLM["vocab_size"] = len(tokenizer) + 63


def excite(model: torch.nn.Module) -> torch.nn.Module:
    """Larger weights than the usual initialisation's, whose logits are nearly constant."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if p.ndim > 1:
                width = 1.0 if "embed_tokens" in name else 1.5 / p[0].numel() ** 0.5
                p.copy_(noise * width)
            else:
                p.add_(noise * 0.1)
    return model.eval()


# Of a tower without a class token.
EVERY_PATCH = dict(vision_feature_select_strategy="full", vision_feature_layer=-1)


def llava(text: object, tower: type = CLIPVisionConfig, **more: object) -> torch.nn.Module:
    vision = tower(**{**VISION, **more.pop("vision", {})})
    own = dict(image_token_index=IMAGE, image_seq_length=IMAGE_TOKENS)
    config = LlavaConfig(vision_config=vision, text_config=text, **own, **more)
    return excite(LlavaForConditionalGeneration(config))


def causal(kind: str, **fields: object) -> torch.nn.Module:
    return excite(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **LLM | fields)))


def write(
    out: Path,
    name: str,
    model: torch.nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Path], None] | None = None,
    **options: object,
) -> Path:
    folder = out / name / "folder"
    model.to(dtype).save_pretrained(folder, **options)
    if is_llava(model):
        sizes = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        about = dict(patch_size=7, vision_feature_select_strategy="default")
        LlavaProcessor(
            CLIPImageProcessor(**sizes),
            tokenizer,
            image_token="<image>",
            num_additional_image_tokens=1,
            **about,
        ).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
    if change is not None:
        change(folder)
    return folder


def is_llava(model: torch.nn.Module) -> bool:
    return isinstance(model, LlavaForConditionalGeneration)


def peer(out: Path, name: str, model: torch.nn.Module, **options: object) -> None:
    """A form that must open here with the same numbers."""
    folder = write(out, name, model, **options)
    again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    pixels = np.random.default_rng(1).standard_normal((1, 3, 28, 28)).astype(np.float32)
    text = tokenizer("USER: <image>\nWhat is this? ASSISTANT:").input_ids
    more = {"pixel_values": torch.from_numpy(pixels)} if is_llava(model) else {}
    if not more:
        text = [i for i in text if i != IMAGE]
    ids = [j for i in text for j in ([IMAGE] * IMAGE_TOKENS if i == IMAGE else [i])]
    x = torch.tensor([ids])
    inputs = dict(input_ids=x, attention_mask=torch.ones_like(x), **more)
    with torch.no_grad():
        logits = again(**inputs).logits[0, -1].numpy()
        how = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        greedy = again.generate(**inputs, **how)[0, len(ids) :].numpy()
    arrays = dict(ids=text, image=IMAGE, pixels=pixels, logits=logits, greedy=greedy)
    np.savez(folder.parent / "expected.npz", **arrays)
    print(name, flush=True)


def refused(
    out: Path, name: str, model: torch.nn.Module | None, word: str, **options: object
) -> None:
    """A model with LLaMA's or LLaVA's names that computes something else."""
    assert model is not None
    folder = write(out, name, model, **options)
    (folder.parent / "refused").write_text(word)
    print(name, flush=True)


# --- Forms ----------------------------------------------------------------------------------------


def rename(*pairs: tuple[str, str]) -> Callable[[Path], None]:
    """Older names: beginnings replaced, the first pair that fits."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {}
        for name, tensor in load_file(file).items():
            for old, new in pairs:
                if name.startswith(old) and not name.startswith(new):
                    name = name.replace(old, new, 1)
                    break
            tensors[name] = tensor
        save_file(tensors, file, metadata={"format": "pt"})

    return change


OLD = rename(("vision_tower.", "vision_tower.vision_model."))  # before 5.12
V4_52 = rename(
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("vision_tower.", "model.vision_tower.vision_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def torch_file(legacy: bool) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        target = folder / "pytorch_model.bin"
        torch.save(tensors, target, _use_new_zipfile_serialization=not legacy)
        (folder / "model.safetensors").unlink()

    return change


def old_processor(folder: Path) -> None:
    """transformers 4: the image processor in a file of its own."""
    values = json.loads((folder / "processor_config.json").read_text())
    image = values.pop("image_processor")
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "processor_config.json").write_text(json.dumps(values))


def fields(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))

    return change


def own_head(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(3)
    shape = tensors["model.embed_tokens.weight"].shape
    tensors["lm_head.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def codes(kind: torch.dtype) -> Callable[[Path], None]:
    """Projections as 8-bit codes whose scales nobody has, and nothing in config.json."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for name in [n for n in tensors if n.endswith("proj.weight") and "vision" not in n]:
            tensors[name] = (tensors[name] / tensors[name].abs().max() * 100).to(kind)
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def make_peers(out: Path) -> None:
    llama = LlamaConfig(**LLM)
    peer(out, "llava", llava(llama))
    peer(out, "llava names before 5.12", llava(llama), change=OLD)
    peer(out, "llava names of 4.52", llava(llama), change=V4_52)
    peer(out, "llava preprocessor_config", llava(llama), change=old_processor)
    peer(out, "llava sharded", llava(llama), max_shard_size="100KB")
    peer(out, "llava bfloat16", llava(llama), dtype=torch.bfloat16)
    peer(out, "llava float16", llava(llama), dtype=torch.float16)
    peer(out, "llava .bin", llava(llama), change=torch_file(legacy=False))
    peer(out, "llava .bin legacy", llava(llama), change=torch_file(legacy=True))
    scaled = LlamaConfig(**LLM, rope_theta=500000.0, rope_scaling=ROPE_3_1)
    peer(out, "llava llama-3.1 rope", llava(scaled))
    tied = LlamaConfig(**LLM, tie_word_embeddings=True)
    peer(out, "llava tied", llava(tied, tie_word_embeddings=True))
    peer(out, "llava last layer", llava(llama, vision_feature_layer=-1))
    peer(out, "llava clip with gelu", llava(llama, vision={"hidden_act": "gelu"}))
    peer(out, "llava mistral", llava(MistralConfig(**LLM, sliding_window=None)))
    peer(out, "llama", causal("llama"))
    peer(
        out, "llama bfloat16 sharded", causal("llama"), dtype=torch.bfloat16, max_shard_size="50KB"
    )
    rope = dict(rope_theta=500000.0, rope_scaling=ROPE_3_1)
    peer(out, "llama 3.1 rope tied", causal("llama", tie_word_embeddings=True, **rope))
    peer(out, "llama head_dim", causal("llama", head_dim=20))
    peer(out, "llama pretraining_tp", causal("llama", pretraining_tp=2))
    peer(out, "llama tied own head", causal("llama", tie_word_embeddings=True), change=own_head)
    peer(out, "mistral", causal("mistral", sliding_window=None))
    peer(out, "mistral wide window", causal("mistral", sliding_window=512))
    peer(out, "mistral window", causal("mistral", sliding_window=8))
    make_families(out)


def make_families(out: Path) -> None:
    """What other families have of their own: biases, norms, a window, rotary positions."""
    for kind in ("linear", "dynamic", "yarn"):
        rope = dict(rope_type=kind, factor=4.0, rope_theta=10000.0)
        if kind == "yarn":
            rope["original_max_position_embeddings"] = 32
        peer(out, f"llama rope {kind}", causal("llama", rope_parameters=rope))
    peer(out, "qwen2", causal("qwen2"))
    window = dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    peer(out, "qwen2 window", causal("qwen2", **window))
    peer(out, "qwen3 tied", causal("qwen3", head_dim=20, tie_word_embeddings=True))
    peer(out, "smollm3", causal("smollm3", no_rope_layers=[1, 0, 1], pad_token_id=0))
    peer(out, "llava qwen2", llava(Qwen2Config(**LLM)))
    siglip = llava(Qwen3Config(**LLM, head_dim=20), tower=SiglipVisionConfig, **EVERY_PATCH)
    peer(out, "llava siglip qwen3", siglip)


def make_lookalikes(out: Path) -> None:
    small = dict(head_dim=12, pad_token_id=0)
    granite = dict(embedding_multiplier=3.0, attention_multiplier=0.1, residual_multiplier=0.5)
    for kind, more in {
        "granite": granite | dict(logits_scaling=4.0),
        "gemma": small,
        "olmo": {},
        "phi3": dict(pad_token_id=0),
        "helium": small,
        "seed_oss": dict(head_dim=12),
        "arcee": {},
        "nemotron": {},
        "hunyuan_v1_dense": small,
        "cohere": dict(pad_token_id=0),
        "starcoder2": {},
    }.items():
        refused(out, f"other {kind}", causal(kind, **more), kind)
    refused(out, "llama attention_bias", causal("llama", attention_bias=True), "attention_bias")
    refused(out, "llama mlp_bias", causal("llama", mlp_bias=True), "mlp_bias")
    refused(out, "llama gelu", causal("llama", hidden_act="gelu"), "hidden_act")
    mixed = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    refused(out, "qwen2 two kinds of layers", causal("qwen2", **mixed), "layer_types")
    biased = causal("qwen3", head_dim=12, attention_bias=True)
    refused(out, "qwen3 attention_bias", biased, "attention_bias")
    partial = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)
    model = causal("llama", rope_parameters=partial)
    refused(out, "llama partial rotary", model, "partial_rotary_factor")
    refused(out, "llama unknown field", causal("llama"), "mup_scale", change=fields(mup_scale=2.0))
    refused(out, "llama int8 codes", causal("llama"), "int8", change=codes(torch.int8))
    refused(out, "llama fp8 codes", causal("llama"), "float8", change=codes(torch.float8_e4m3fn))
    llama = LlamaConfig(**LLM)
    act = "projector_hidden_act"
    refused(out, "llava projector relu", llava(llama, projector_hidden_act="relu"), act)
    bare = llava(llama, multimodal_projector_bias=False)
    refused(out, "llava projector without bias", bare, "multimodal_projector_bias")
    layers = llava(llama, vision_feature_layer=[-2, -1])
    refused(out, "llava two layers", layers, "vision_feature_layer")
    bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    refused(
        out, "llava 4 bits", llava(llama), "bitsandbytes", change=fields(quantization_config=bits)
    )


def make_towers(out: Path) -> None:
    excite(CLIPVisionModel(CLIPVisionConfig(**VISION))).save_pretrained(out / "clip_vision")
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    whole = CLIPConfig(text_config=text | {"vocab_size": 99}, vision_config=VISION)
    excite(CLIPModel(whole)).save_pretrained(out / "clip_full")
    for name in ("clip_vision", "clip_full"):
        sizes = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        CLIPImageProcessor(**sizes).save_pretrained(out / name)


def make_padding(out: Path) -> None:
    """LLaVA's own image processor, which pads: its pixels of an upright and a lying image."""
    from transformers import LlavaImageProcessor

    sizes = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaImageProcessor(**sizes, do_pad=True)
    rng = np.random.default_rng(5)
    pictures = [rng.integers(0, 256, shape, np.uint8) for shape in ((40, 71, 3), (90, 33, 3))]
    made = processor([Image.fromarray(p) for p in pictures], return_tensors="np")
    (out / "padding").mkdir()
    processor.save_pretrained(out / "padding")
    arrays = dict(lying=pictures[0], upright=pictures[1], pixels=made["pixel_values"])
    np.savez(out / "padding" / "expected.npz", **arrays)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    target = Path(sys.argv[1])
    make_towers(target)
    make_padding(target)
    make_peers(target)
    make_lookalikes(target)
    (target / "versions").write_text(
        f"transformers {transformers.__version__}, torch {torch.__version__}"
    )
