"""A loaded model: parameters, what its folder says of them, and what ends its answers."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.batches.examples import Buckets
from llava_mini_jax.inference import prompt_template
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.models.llava_mini import LlavaMini


@dataclass(frozen=True)
class Loaded:
    """What answering needs; model.py's `Model` is one that people ask."""

    params: LlavaMini = field(repr=False)  # layers unrolled
    bundle: Bundle
    tokenizer: Any = field(repr=False)
    buckets: Buckets

    @cached_property
    def weights_dtype(self) -> str:
        """That of the weights of products; `bundle.model.compute_dtype` is that of the products."""
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(self.params)}
        if "uint8" in dtypes:  # two codes of int4 in each
            return "int4"
        return "int8" if "int8" in dtypes else str(self.params.llm.embed_tokens.dtype)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the template's, the tokenizer's and the model's."""
        template = prompt_template.template_of(self.bundle)
        eos = self.tokenizer.eos_token_id
        if self.tokenizer.convert_ids_to_tokens(eos or 0) != self.tokenizer.eos_token:
            eos = None  # what a name that is no token stands for is the unknown one
        own = (prompt_template.end_of_turn(template, self.tokenizer), eos)
        ids = [*(token for token in own if token is not None), *self.bundle.eos_ids]
        return tuple(dict.fromkeys(ids))

    @cached_property
    def stop_text(self) -> str | None:
        """The text that ends an answer, where the template's end is no single token."""
        return prompt_template.stop_text(prompt_template.template_of(self.bundle), self.tokenizer)

    def with_stop_text(self, settings: Settings) -> Settings:
        """`settings` whose answers also end before the template's `stop_text`."""
        if self.stop_text is None or self.stop_text in settings.stop:
            return settings
        return replace(settings, stop=(*settings.stop, self.stop_text))
