"""Writes the torch files beside this script; run once, with torch, which nothing else here needs:

python3 -m venv torchenv && torchenv/bin/pip install torch==2.13.0 numpy safetensors
torchenv/bin/python tests/golden/torch_bin/make_fixtures.py

state_dict.bin         zip: every dtype, views of one storage, parameters, scalar, empty, expanded
state_dict_legacy.bin  the same in the stream format of torch < 1.6
nested.bin             {"state_dict": two of them, and what a training script adds}
protocol4.bin          two of them with pickle protocol 4
expected.safetensors   the same tensors as torch itself sees them, written by safetensors.torch
"""

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
DTYPES += ["int64", "int32", "int16", "int8", "uint8", "uint16", "bool"]


def make_tensors() -> OrderedDict:
    base = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    tensors = OrderedDict(
        (dtype, (base * 3).abs().to(getattr(torch, dtype)).clone()) for dtype in DTYPES
    )
    tensors["view.base"] = base
    tensors["view.transposed"] = base.t()
    tensors["view.row"] = base[1]
    tensors["view.column"] = base[:, 2]
    tensors["view.block"] = base[1:, 1:3]
    tensors["view.steps"] = base[::2, ::3]
    tensors["view.permuted"] = torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1)
    tensors["view.expanded"] = base[0].expand(5, 4)
    tensors["scalar"] = torch.tensor(-1.5)
    tensors["empty"] = torch.empty(0, 3)
    tensors["parameter"] = torch.nn.Parameter(base.half())
    tensors["parameter.transposed"] = torch.nn.Parameter(base.clone().t())
    with_state = torch.nn.Parameter(base.bfloat16(), requires_grad=False)
    with_state.note = "an attribute makes torch use _rebuild_parameter_with_state"
    tensors["parameter.with_state"] = with_state
    return tensors


if __name__ == "__main__":
    tensors = make_tensors()
    tensors._metadata = torch.nn.Linear(1, 1).state_dict()._metadata  # as real state dicts have
    two = {name: tensors[name] for name in ("view.transposed", "bfloat16")}
    training = {
        "epoch": 3,
        "loss": 0.5,
        "dtype": torch.float16,
        "device": torch.device("cuda", 0),
        "size": torch.Size([1, 2]),
        "optimizer": {"state": {0: {"step": torch.ones(2)}}, "groups": [1, (2,), None, True]},
    }
    torch.save(tensors, HERE / "state_dict.bin")
    torch.save(tensors, HERE / "state_dict_legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": two, **training}, HERE / "nested.bin")
    torch.save(two, HERE / "protocol4.bin", pickle_protocol=4)
    save_file(
        {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
        HERE / "expected.safetensors",
    )
