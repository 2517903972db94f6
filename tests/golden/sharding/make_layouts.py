"""Writes where every parameter of LLaVA-Mini with Vicuna-7B lies, one file a mesh, beside itself.

    .venv/bin/python -m tests.golden.sharding.make_layouts

No weights and no devices are needed. Read the difference before it is committed: a parameter that
became whole on every device, or that changed its axis, makes older runs' memory plans wrong.
"""

import dataclasses
from pathlib import Path

from configs import stage2_vicuna_7b
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training.dry_run import layout

HERE = Path(__file__).parent
MESHES = {
    "data8": MeshConfig(data=8),
    "fsdp8": MeshConfig(fsdp=8),
    "tensor8": MeshConfig(tensor=8),
    "fsdp4_tensor2": MeshConfig(fsdp=4, tensor=2),
}


def text(name: str) -> str:
    """Parameters in float32: path, shape, logical axes, mesh axes, bytes on one device."""
    stage = dataclasses.replace(stage2_vicuna_7b.config(), mesh=MESHES[name])
    return "\n".join(layout(stage)) + "\n"


if __name__ == "__main__":
    for name in MESHES:
        (HERE / f"{name}.txt").write_text(text(name))
        print(HERE / f"{name}.txt")
