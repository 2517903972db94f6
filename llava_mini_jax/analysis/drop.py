"""What a model can still answer when some layers do not see the image (paper figure 5).

    ranges of layers --Blinded model--> runner.ask --> answers.jsonl --score--> a figure

In the layers of a range no token of text, asked or answered, may attend to a vision token. Vision
tokens go on attending to each other there: behind the range they are what they would have been.
Pre-fusion, where a model has it, still reads the image: only the language model is blinded.

Answers are greedy, and every token is computed from the whole sequence anew
(inference/recompute.py): a cache would serve one question a second sooner, but inference would have
to know of an analysis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Question
from llava_mini_jax.evaluation.run import runner, settings_file
from llava_mini_jax.evaluation.run.answers import files, join, read_lines
from llava_mini_jax.inference import recompute
from llava_mini_jax.inference.answer import Answer, Settings
from llava_mini_jax.inference.model import Model, answer_all
from llava_mini_jax.inference.recompute import refuse_own_layers
from llava_mini_jax.models import decoder, llama, llava_mini
from llava_mini_jax.models.llava_mini import Inputs, LlavaMini, LlavaMiniConfig
from llava_mini_jax.ops import masks
from llava_mini_jax.ops.attention import under
from llava_mini_jax.ops.layers import fold_layers
from llava_mini_jax.ops.norm import rms_norm
from llava_mini_jax.ops.rope import angles
from llava_mini_jax.params import Array


class Range(NamedTuple):
    """Layers `first` to `last`, counted from 1 and both included; (1, 0) is none."""

    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.first}-{self.last}" if self.last else "none"


NOTHING = Range(1, 0)


def ranges(layers: int, width: int) -> list[Range]:
    """None, then 1 to `width` and so on as in the paper, then all layers."""
    if not 1 <= width <= layers:
        raise InputError(f"--width is {width}; give 1 to {layers}, the model's number of layers")
    parts = [Range(a, min(a + width - 1, layers)) for a in range(1, layers + 1, width)]
    return [NOTHING, *parts, *[Range(1, layers)] * (len(parts) > 1)]


@dataclass(frozen=True)
class Blinded(Model):
    """A model whose language model does not see vision tokens in the layers of `hidden`."""

    hidden: Range = NOTHING

    def answer_requests(
        self, examples: Sequence[Example], settings: Settings, *, batch_size: int
    ) -> list[Answer]:
        """As Model's, greedy only."""
        assert settings.temperature == 0
        layers = np.arange(1, self.bundle.model.llm.layers + 1)
        # An array and not a static range: one program serves all ranges.
        hidden_L = (layers >= self.hidden.first) & (layers <= self.hidden.last)

        def logits(rows: Sequence[Example]) -> Array:
            inputs = recompute.inputs_of(rows, self.bundle, self.buckets)
            return _logits(self.params, inputs, hidden_L, self.bundle.model)

        answering = partial(recompute.answering, logits=logits)
        return answer_all(answering, self, examples, [settings] * len(examples), batch_size)


@partial(jax.jit, static_argnames="cfg")
def _logits(params: LlavaMini, inputs: Inputs, hidden_L: Array, cfg: LlavaMiniConfig) -> Array:
    """[B, V] behind the last position, from layers that do not all see the image."""
    is_vision_BS = inputs.slots_BS >= inputs.ids_BT.shape[1]
    x_BSD, valid_BS = llava_mini.embed(params, inputs, cfg)
    valid_BS = inputs.slots_BS >= 0 if valid_BS is None else valid_BS
    hidden_BSD = _blinded(params.llm, x_BSD, valid_BS, is_vision_BS, hidden_L, cfg)
    normed_BSD = rms_norm(hidden_BSD, params.llm.final_norm, cfg.llm.norm_eps)
    return recompute.last_logits(params.llm, normed_BSD, inputs.slots_BS)


def _blinded(
    llm: llama.Llama,
    x_BUD: Array,
    valid_BU: Array,
    is_vision_BU: Array,
    hidden_L: Array,
    cfg: LlavaMiniConfig,
) -> Array:
    """The language model's layers; where `hidden_L` says so, text does not see vision tokens."""
    mask_BUU = masks.causal(valid_BU, cfg.llm.window)
    blind_BUU = mask_BUU & ~(~is_vision_BU[:, :, None] & is_vision_BU[:, None, :])
    angles_BUH = angles(masks.running_positions(valid_BU), cfg.llm.head_width, cfg.llm.rope)

    def body(layer: decoder.Layer, x_BUD: Array, hidden: Array) -> tuple[Array, None]:
        mask = jnp.where(hidden, blind_BUU, mask_BUU)
        return decoder.block(layer, x_BUD, angles_BUH, under(mask), cfg.llm)[0], None

    return fold_layers(body, decoder.each(llm.layers, cfg.llm), x_BUD, hidden_L)[0]


def scores(
    model: Model,
    model_id: str,
    benchmark: Benchmark,
    data: Path,
    questions: Sequence[Question],
    chosen: Sequence[Range],
    out: Path,
    *,
    batch_size: int,
) -> dict[str, float]:
    """The benchmark's score with each range of layers blinded, by the range's name.

    Answers go to `out`/layers-NAME/answers.jsonl, and are taken from there if the same model and
    questions were asked before. Raises InputError for benchmarks that cannot be scored here, and
    for images that cannot be read: a model that sees less is what is measured.
    """
    refuse_own_layers(model.bundle.model)
    _check(benchmark, questions)
    tokens = benchmark.max_new_tokens
    prompts = settings_file.digest(questions)
    settings = runner.settings_of(
        model, model_id, benchmark, prompts=prompts, max_new_tokens=tokens
    )
    found = {}
    for hidden in chosen:
        blinded = Blinded(model.params, model.bundle, model.tokenizer, model.buckets, hidden)
        folder = out / f"layers-{hidden.name}"
        settings_file.check_same(folder, settings)
        run = runner.ask(
            blinded,
            model_id,
            benchmark,
            questions,
            folder,
            shard=runner.Shard(),
            batch_size=batch_size,
            max_new_tokens=tokens,
        )
        for key, reason in run.unreadable.items():
            raise InputError(
                f"{benchmark.name}: {len(run.unreadable)} of {len(questions)} questions cannot be"
                f" asked, such as {key}: {reason}"
            )
        lines = [line for path in files(folder) for line in read_lines(path, benchmark)]
        judged = benchmark.score(data, questions, join(benchmark, questions, lines).answers)
        found[hidden.name] = judged.rules[judged.headline].value
    return found


def _check(benchmark: Benchmark, questions: Sequence[Question]) -> None:
    """InputError where the questions cannot be asked or scored with some layers blinded."""
    name, why = benchmark.name, ""
    if benchmark.judge is not None:
        why = "is graded by another model; use a benchmark that is scored by rule"
    elif all(question.gold is None for question in questions):
        why = "has questions here whose answers only a server knows; use a split with answers"
    elif any(question.video is not None for question in questions):
        why = (
            "asks about videos, which sessions answer: their layers cannot be masked; use a"
            " benchmark of images"
        )
    if why:
        raise InputError(f"{name} {why}")
    layouts.check_pictures(name, questions)
