"""The programs that answer, for arrays that do not exist: what they are compiled and counted for.

    model, Sizes --abstract arrays on the current mesh--> function and arguments, by name
        encode_vision, prefuse_images, prefuse_text  of inference/seeing_programs.py
        read_fresh, read_block, decode               of inference/slots.py

A mesh of the devices has to be set, if only of one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.config import NARROW_DTYPES
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import reading, seeing_programs, slots
from llava_mini_jax.inference.recompute import refuse_inside, refuse_question
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.models.seen import PATCHES, Seen
from llava_mini_jax.weights.quantize import abstract

Call = tuple[Callable, tuple, dict[str, Any]]  # a jitted function, arguments, static ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a request is. Raises InputError for numbers below 1."""

    rows: int  # slots: answers decoded together; a session has one
    length: int  # positions of the text, or of the block that is read of a prompt
    images: int  # images or frames that are encoded together
    parts: int  # of an image, 1 without high resolution
    slots: int  # positions of a slot

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"{field.name} is {getattr(self, field.name)}; give 1 or more")


def weights(cfg: LlavaMiniConfig, dtype: str) -> LlavaMini:
    """The parameters as a model is loaded in `dtype`, one of ASKING_DTYPES; layers unrolled."""
    narrow = dtype if dtype in NARROW_DTYPES else None

    def leaf(path: str, spec: param_tree.ParamSpec) -> Any:
        return abstract(path, spec, spec.output_axes, narrow, cfg.dtype if narrow else dtype)

    return param_tree.map_paths(leaf, llava_mini.unrolled(llava_mini.spec(cfg)))


def call(name: str, cfg: LlavaMiniConfig, dtype: str, sizes: Sizes) -> Call:
    """The program `name` (one of NAMES) of a model whose weights are in `dtype`."""
    refuse_inside(cfg)
    refuse_question(cfg)
    if cfg.declared.keeps is not None:
        raise InputError(
            f'compressor "{cfg.compressor.kind}" reads prompts with programs of its own, which are'
            " not among these; `llava-mini profile compressors` shows their cost"
        )
    if name == "prefuse_text" and not cfg.prefusion_layers:
        raise InputError("the model has no pre-fusion, so there is no program prefuse_text")
    maker = _Programs(cfg, sizes)
    function, arguments = getattr(maker, name)()
    return function, tuple(_placed((weights(cfg, dtype), *arguments))), {"cfg": cfg, **maker.static}


def _array(shape: tuple[int, ...], dtype: Any, axes: sharding.Axes | None = None) -> Any:
    spec = param_tree.ParamSpec(shape, axes or (None,) * len(shape), param_tree.zeros)
    return param_tree.abstract(spec, dtype)


def _placed(tree: Any) -> Any:
    """Abstract arrays, whatever mesh or none they name, on the current mesh's devices."""
    mesh = jax.sharding.get_mesh()

    def place(x: Any) -> jax.ShapeDtypeStruct:
        known = isinstance(getattr(x, "sharding", None), jax.NamedSharding) and x.ndim
        spec = x.sharding.spec if known else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


class _Programs:
    """(function, arguments behind the parameters) of each program, a program a method."""

    def __init__(self, cfg: LlavaMiniConfig, sizes: Sizes):
        self.cfg, self.sizes = cfg, sizes
        self.static: dict[str, Any] = {}

    def encode_vision(self) -> tuple[Callable, tuple]:
        return seeing_programs.encode_vision, (self._pixels(),)

    def prefuse_images(self) -> tuple[Callable, tuple]:
        vision, sizes = self.cfg.vision, self.sizes
        if self.cfg.declared.reads != PATCHES:
            params = param_tree.abstract(
                llava_mini.unrolled(llava_mini.spec(self.cfg)), self.cfg.dtype
            )
            look = functools.partial(seeing_programs.encode_vision, cfg=self.cfg)
            return seeing_programs.prefuse_images, (jax.eval_shape(look, params, self._pixels()),)
        features = (sizes.images, sizes.parts, vision.grid**2, vision.width)
        return seeing_programs.prefuse_images, (Seen(_array(features, self.cfg.dtype)),)

    def prefuse_text(self) -> tuple[Callable, tuple]:
        T, D = self.sizes.length, self.cfg.llm.width
        function, (features,) = self.prefuse_images()
        params = param_tree.abstract(llava_mini.unrolled(llava_mini.spec(self.cfg)), self.cfg.dtype)
        memory = jax.eval_shape(functools.partial(function, cfg=self.cfg), params, features)[1]
        total, count = _array((T, D), jnp.float32), _array((), jnp.int32)
        text = _array((1, T, D), self.cfg.dtype)
        return seeing_programs.prefuse_text, (total, memory, count, text)

    def decode(self) -> tuple[Callable, tuple]:
        B = self.sizes.rows
        sampling = jax.eval_shape(lambda: make_sampling(B, 0.0, 1.0, 0, 0, ()))
        flags, number = _array((B,), bool), _array((), jnp.int32)
        self.static["most"] = 2
        return slots.decode, (self._lane(), sampling, flags, flags, number, number)

    def read_fresh(self) -> tuple[Callable, tuple]:
        """Up to four prompts of `length` positions."""
        R, number = min(4, self.sizes.rows), jnp.int32
        sampling = jax.eval_shape(lambda: make_sampling(self.sizes.rows, 0.0, 1.0, 0, 0, ()))
        x = (_array((self.sizes.length, self.cfg.llm.width), self.cfg.dtype),) * R
        each = _array((R,), number), _array((R,), number), _array((R,), bool)
        return reading.read_fresh, (
            self._lane(),
            x,
            *each,
            sampling,
            _array((self.sizes.rows,), bool),
        )

    def read_block(self) -> tuple[Callable, tuple]:
        """`length` positions of one prompt, behind others."""
        sampling = jax.eval_shape(lambda: make_sampling(self.sizes.rows, 0.0, 1.0, 0, 0, ()))
        x = _array((self.sizes.length, self.cfg.llm.width), self.cfg.dtype)
        numbers = (_array((), jnp.int32),) * 3
        told = _array((self.sizes.rows,), bool)
        return reading.read_block, (self._lane(), x, *numbers, _array((), bool), sampling, told)

    def _lane(self) -> slots.Lane:
        return jax.eval_shape(lambda: slots.empty(self.sizes.rows, self.sizes.slots, self.cfg))

    def _pixels(self) -> Any:
        side = self.cfg.vision.image_size
        return _array((self.sizes.images, self.sizes.parts, side, side, 3), jnp.uint8)


NAMES = tuple(name for name in vars(_Programs) if not name.startswith("_"))


def names(cfg: LlavaMiniConfig) -> list[str]:
    """Those of NAMES that the model has: without pre-fusion there is no `prefuse_text`."""
    return [name for name in NAMES if name != "prefuse_text" or cfg.prefusion_layers]
