"""A model's folder before its weights are read: what can be checked is checked, shapes are known.

folder, or a name on the hub --open_folder--> Opened --weights--> parameters
                                                '-----shapes----> their shapes (warm_up.py)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from llava_mini_jax.config import ASKING_DTYPES, NARROW_DTYPES, Bundle
from llava_mini_jax.data.batches.examples import Buckets
from llava_mini_jax.data.text import question_ids
from llava_mini_jax.data.text.tokenizer import load_tokenizer
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds, prompt_template
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.vision_tokens import VisionTokens, with_unasked
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.ops.attention import describe
from llava_mini_jax.weights import adapters, folders, hub, import_hf, methods


@dataclass(frozen=True)
class Opened:
    """A folder with everything checked but the numbers."""

    bundle: Bundle
    tokenizer: Any
    published: Sequence[import_hf.Published]
    dtype: str | None  # as `load` is given it

    @cached_property
    def buckets(self) -> Buckets:
        return bounds.buckets_for(self.bundle)

    def weights(self, watch: import_hf.Watch = lambda done, total: None) -> LlavaMini:
        """With layers unrolled."""
        return import_hf.load_params(
            self.bundle, self.published, **self._dtypes, unrolled=True, watch=watch
        )

    def shapes(self) -> LlavaMini:
        """Those of `weights`."""
        return import_hf.shapes(self.bundle, self.published, **self._dtypes)

    def with_shapes(self) -> Loaded:
        """What is loaded, with shapes instead of weights."""
        return Loaded(self.shapes(), self.bundle, self.tokenizer, self.buckets)

    @property
    def _dtypes(self) -> dict[str, Any]:
        return {
            "dtype": computing_dtype(self.dtype),
            "narrow": self.dtype if self.dtype in NARROW_DTYPES else None,
        }


def open_folder(
    folder: Path | str,
    *,
    dtype: str | None,
    attention: str = "auto",
    vision_tower: Path | str | None,
    template: str | None,
    max_length: int | None,
    vision_tokens: VisionTokens = None,
    compressor: str | None = None,
) -> Opened:
    """`load`'s arguments. Raises InputError for what is missing, damaged or does not fit."""
    computing, path = computing_dtype(dtype), hub.resolve_folder(folder)
    tower = None if vision_tower is None else Path(vision_tower)
    asked = None if compressor is None else methods.parse_asked(compressor)
    bundle, published = folders.open_model(
        path, vision_tower=tower, compressor=asked, compute_dtype=computing
    )
    model = replace(bundle.model, attention=attention)
    # Before the weights are read: a kernel that is not there is refused at once.
    describe(attention, model.dtype, model.llm.head_width, windowed=model.llm.window is not None)
    bundle = with_unasked(replace(bundle, model=model), vision_tokens)
    bundle = prompt_template.with_prompt(bundle, template, max_length)
    home, declared = adapters.tokenizer_folder(path), model.declared
    tokenizer = load_tokenizer(home)
    if declared.question:
        tokenizer = question_ids.give(tokenizer, question_ids.reader_for(home, declared))
    return Opened(prompt_template.with_tokenizer(bundle, tokenizer), tokenizer, published, dtype)


def computing_dtype(dtype: str | None) -> str:
    """The dtype of products with weights of `dtype`; None leaves the choice to the backend.

    Raises InputError where `dtype` is none of ASKING_DTYPES.
    """
    if dtype is not None and dtype not in ASKING_DTYPES:
        raise InputError(f'dtype "{dtype}" is unknown; use one of {", ".join(ASKING_DTYPES)}')
    if dtype is not None and dtype not in NARROW_DTYPES:
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
