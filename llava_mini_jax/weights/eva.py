"""LLaMA-VID's tower, EVA's ViT-G as BLIP-2 has it: its tensors as those of a CLIP.

    blocks.N.attn.qkv.weight [3E, E] ----> q_proj, k_proj, v_proj   [E, E] each
    blocks.N.attn.q_bias, v_bias [E] ----> theirs; keys have none, which is one of zeros
    cls_token, pos_embed, patch_embed ---> embeddings.*

It is a CLIP without a norm in front of its layers, with a bias behind the patches, of which every
layer is run; heads are 88 wide. Sizes are read from the tensors, for no file states them.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from llava_mini_jax.errors import InputError
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor
from llava_mini_jax.weights.hf_processor import Processor

PREFIX = "model.vision_tower.vision_tower."
_CLIP = f"{PREFIX}vision_model."
_HEAD_WIDTH = 88
_RENAMED = (
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"blocks\.(\d+)\.attn\.([qv])_bias$", r"encoder.layers.\1.self_attn.\2_proj.bias"),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"pos_embed$", "embeddings.position_embedding.weight"),
    (r"cls_token$", "embeddings.class_embedding"),
)
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.weight")


@dataclasses.dataclass(frozen=True)
class Constant(LazyTensor):
    """A tensor that no file holds, of one number."""

    value: float

    def read(
        self,
        index: tuple[slice, ...] = (),
        empty: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty,
    ) -> np.ndarray:
        array = empty(np.broadcast_to(np.float32(0), self.shape)[(*index, ...)].shape, self.dtype)
        array[...] = self.value
        return array


def is_eva(names: Iterable[str]) -> bool:
    """Whether a model's own files hold such a tower."""
    return any(name.startswith(f"{PREFIX}blocks.") for name in names)


def as_clip(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """All tensors of a model, those of its tower by CLIP's names; what is strange keeps its own."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(PREFIX) if name.startswith(PREFIX) else None
        packed = _QKV.fullmatch(own or "")
        if own is None:
            found[name] = tensor
        elif packed and len(tensor.shape) == 2 and tensor.shape[0] % 3 == 0:
            module = f"{_CLIP}encoder.layers.{packed[1]}.self_attn."
            rows = tensor.shape[0] // 3
            for part, letter in enumerate("qkv"):
                offset = tensor.offset + part * rows * tensor.strides[0]
                shape = (rows, *tensor.shape[1:])
                one = dataclasses.replace(tensor, shape=shape, offset=offset)
                found[f"{module}{letter}_proj.weight"] = one
            found[f"{module}k_proj.bias"] = _constant(tensor, rows, 0.0)
        else:
            found[_renamed(own)] = _flat(own, tensor)
    positions = found.get(f"{_CLIP}embeddings.position_embedding.weight")
    if positions is not None:
        # A final norm that the tower does not have, and nobody reads.
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            width = positions.shape[-1]
            found[f"{_CLIP}post_layernorm.{name}"] = _constant(positions, width, value)
    return found


def _renamed(own: str) -> str:
    for pattern, new in _RENAMED:
        if re.match(pattern, own):
            return _CLIP + re.sub(pattern, new, own)
    return PREFIX + own


def _flat(own: str, tensor: LazyTensor) -> LazyTensor:
    """Without the axes of one that torch's tables have in front."""
    front = {"pos_embed": 1, "cls_token": 2}.get(own, 0)
    if tensor.shape[:front] != (1,) * front:
        return tensor
    shape, strides = tensor.shape[front:], tensor.strides[front:]
    return dataclasses.replace(tensor, shape=shape, strides=strides)


def _constant(like: LazyTensor, width: int, value: float) -> Constant:
    fields = {name: getattr(like, name) for name in LazyTensor.__dataclass_fields__}
    fields |= dict(shape=(width,), strides=(like.dtype.itemsize,))
    return Constant(**fields, value=value)


def config(tensors: Mapping[str, LazyTensor], where: str, processor: Processor) -> ClipConfig:
    """ClipConfig of the tower in a model's own files (as published, or `as_clip`)."""
    clip = as_clip(tensors)
    names = [f"embeddings.{part}_embedding" for part in ("patch", "position")]
    names.append("encoder.layers.0.mlp.fc1")
    shapes: Any = [getattr(clip.get(f"{_CLIP}{name}.weight"), "shape", ()) for name in names]
    if [len(shape) for shape in shapes] != [4, 2, 2]:
        raise InputError(
            f"{where}: its weight files hold an EVA tower ({PREFIX}blocks.*) without"
            f" {', '.join(names)} of the usual shapes; download the folder again"
        )
    (width, _, patch, _), (positions, _), (mlp_width, _) = shapes
    numbers = set(re.findall(r"encoder\.layers\.(\d+)\.", " ".join(clip)))
    if width % _HEAD_WIDTH or round((positions - 1) ** 0.5) ** 2 != positions - 1:
        raise InputError(
            f"{where}: an EVA tower of width {width} with {positions} positions is given; expected"
            f" heads of {_HEAD_WIDTH} and a square number of patches with a class token"
        )
    return ClipConfig(
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
        width=width,
        mlp_width=mlp_width,
        layers=len(numbers),
        heads=width // _HEAD_WIDTH,
        norm_eps=1e-6,
        activation="gelu",
        class_token=True,
        pre_norm=False,
        patch_bias=True,
        select_layer=-1,
        select_feature="patch",
        resample=processor.resample,
        mean=processor.mean,
        std=processor.std,
    )
