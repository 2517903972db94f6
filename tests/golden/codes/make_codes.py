"""Writes the folders beside this script; run once, with torch and the code of AutoAWQ and AutoGPTQ,
which nothing else here needs. Both are archived and fit no transformers of today, so their packages
are not installed, and only the one module of each that packs weights is imported:

    python3.11 -m venv torchenv && torchenv/bin/pip install torch transformers==5.24.0
    pip download --no-deps autoawq==0.2.9 auto-gptq==0.7.1     # unpacked into one folder, PACKAGES
    torchenv/bin/python tests/golden/codes/make_codes.py PACKAGES

awq/, gptq/   a tiny LLaMA with random weights, packed by WQLinear_GEMM and QuantLinear, and
              expected.safetensors: what their forward passes multiply with, in float16
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
BITS, GROUP = 4, 32
TEXT = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
SAID = {
    "awq": {
        "bits": BITS,
        "group_size": GROUP,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },
    "gptq": {
        "bits": BITS,
        "checkpoint_format": "gptq",
        "damp_percent": 0.01,
        "desc_act": False,
        "group_size": GROUP,
        "model_file_base_name": None,
        "model_name_or_path": None,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": False,
        "true_sequential": True,
    },
}


def module(packages: Path, name: str) -> types.ModuleType:
    """A module whose packages' own __init__ would import what is not there."""
    *parents, _ = name.split(".")
    for n in range(1, len(parents) + 1):
        package = types.ModuleType(".".join(parents[:n]))
        package.__path__ = [str(packages.joinpath(*parents[:n]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


def grid(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [out, groups] between the smallest and the largest number of a group."""
    grouped = weight.reshape(len(weight), -1, GROUP)
    least, most = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((most - least) / (2**BITS - 1)).half().float()
    return scales, torch.round(-least / scales).clamp(1, 2**BITS - 1)


def packed(kind: str, layers: types.ModuleType, linear: torch.nn.Linear) -> torch.nn.Module:
    scales, zeros = grid(linear.weight.data)
    # Both round without clamping: a code of 16 would run into its neighbour.
    step, zero = scales.repeat_interleave(GROUP, 1), zeros.repeat_interleave(GROUP, 1)
    linear.weight.data = linear.weight.data.clamp(-zero * step, (2**BITS - 1 - zero) * step)
    out, into = linear.weight.shape
    if kind == "awq":
        turned = scales.t().contiguous(), zeros.t().contiguous()
        return layers.WQLinear_GEMM.from_linear(linear, BITS, GROUP, False, *turned)
    made = layers.QuantLinear(BITS, GROUP, into, out, bias=False, weight_dtype=torch.float16)
    made.pack(linear, scales, zeros)
    made.scales = made.scales.half()  # which `grid` has rounded them to: of a half model they are
    return made


def main(packages: Path) -> None:
    names = {
        "awq": "awq.modules.linear.gemm",
        "gptq": "auto_gptq.nn_modules.qlinear.qlinear_cuda",
    }
    for kind, name in names.items():
        layers, tensors, expected = module(packages, name), {}, {}
        layers.TRITON_AVAILABLE = False  # AutoAWQ's kernel for GPUs; else torch unpacks
        torch.manual_seed(0)
        model = LlamaForCausalLM(TEXT)
        for name, linear in model.named_modules():
            if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
                continue
            made = packed(kind, layers, linear)
            tensors |= {f"{name}.{part}": t for part, t in made.state_dict().items()}
            whole = made(torch.eye(linear.in_features).half())
            expected[f"{name}.weight"] = whole.t().contiguous().half()
        plain = {name: t.half() for name, t in model.state_dict().items()}
        tensors |= {name: t for name, t in plain.items() if name not in expected}
        folder = HERE / kind
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        save_file(expected, folder / "expected.safetensors")
        config = model.config.to_dict() | {"quantization_config": SAID[kind]}
        config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
