"""What a model can still answer when some layers do not see the picture (paper figure 5).

    ranges of layers --Blinded model--> runner.ask --> answers.jsonl --score--> a figure

In the layers of a range no token of text, asked or answered, may attend to a vision token. Vision
tokens go on attending to each other there: behind the range they are what they would have been.
Pre-fusion, where a model has it, still reads the picture: only the language model is blinded.

Answers are greedy, and every token is computed from the whole sequence anew: a cache would serve
one question a second sooner, but inference would have to know of an analysis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.analysis.samples import padded_batch, refuse_inside
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Question
from llava_mini_jax.evaluation.run import runner, settings_file
from llava_mini_jax.evaluation.run.answers import files, join, read_lines
from llava_mini_jax.inference import batch_decode
from llava_mini_jax.inference.answer import Answer, Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.models import llama, llava_mini
from llava_mini_jax.models.llava_mini import Inputs, LlavaMini, LlavaMiniConfig
from llava_mini_jax.ops import masks
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

    @property
    def in_sessions(self) -> bool:
        return False  # every token is computed from the whole sequence anew

    def answer_requests(
        self, examples: Sequence[Any], settings: Settings, *, batch_size: int
    ) -> list[Answer]:
        """As Model's, greedy only."""
        assert settings.temperature == 0
        settings = self.with_stop_text(settings)
        layers = np.arange(1, self.bundle.model.llm.layers + 1)
        hidden_L = (layers >= self.hidden.first) & (layers <= self.hidden.last)
        answers: dict[int, Answer] = {}
        for numbers in batch_decode.batches(examples, self.bundle, batch_size):
            chosen = [examples[number] for number in numbers]
            texts = batch_decode.empty_texts(
                chosen, self.bundle, self.tokenizer, self.stop_ids, settings
            )
            batch = padded_batch(chosen, self.bundle, self.buckets, batch_size)
            ids_BN = _decode(
                self.params,
                batch.inputs,
                hidden_L,
                np.array(self.stop_ids, np.int32),
                self.bundle.model,
                settings.max_new_tokens,
            )
            for text, ids_N in zip(texts, np.asarray(ids_BN), strict=False):
                text.push(ids_N)
            answers.update(zip(numbers, (text.answer for text in texts), strict=True))
        return [answers[number] for number in range(len(examples))]


@partial(jax.jit, static_argnames=("cfg", "room"))
def _decode(
    params: LlavaMini,
    inputs: Inputs,
    hidden_L: Array,
    stop_ids: Array,
    cfg: LlavaMiniConfig,
    room: int,
) -> Array:
    """Answers [B, room]; what stands behind a stop token means nothing."""
    slots_BS = inputs.slots_BS
    B, S = slots_BS.shape
    is_vision_BS = slots_BS >= inputs.ids_BT.shape[1]
    new_BN = jnp.zeros((B, room), bool)
    x_BUD = llava_mini.embed_inputs(params, inputs, cfg)
    x_BUD = jnp.concatenate([x_BUD, jnp.zeros((B, room, x_BUD.shape[2]), x_BUD.dtype)], axis=1)
    is_vision_BU = jnp.concatenate([is_vision_BS, new_BN], axis=1)
    valid_BU = jnp.concatenate([slots_BS >= 0, new_BN], axis=1)
    last_B = jnp.where(slots_BS >= 0, jnp.arange(S), 0).max(axis=1)

    def unfinished(state: tuple) -> Array:
        step, *_, done_B = state
        return (step < room) & ~done_B.all()

    def one(state: tuple) -> tuple:
        step, x_BUD, valid_BU, ids_BN, done_B = state
        hidden_BUD = _blinded(params.llm, x_BUD, valid_BU, is_vision_BU, hidden_L, cfg)
        at_B = jnp.where(step == 0, last_B, S + step - 1)
        last_B1D = jnp.take_along_axis(hidden_BUD, at_B[:, None, None], axis=1)
        last_B1D = rms_norm(last_B1D, params.llm.final_norm, cfg.llm.norm_eps)
        token_B = llama.logits(params.llm, last_B1D)[:, 0].argmax(axis=-1).astype(jnp.int32)
        embedded_B1D = llama.embed(params.llm, token_B[:, None], cfg.dtype)
        return (
            step + 1,
            jax.lax.dynamic_update_slice(x_BUD, embedded_B1D, (0, S + step, 0)),
            jax.lax.dynamic_update_slice(valid_BU, ~done_B[:, None], (0, S + step)),
            jax.lax.dynamic_update_slice(ids_BN, token_B[:, None], (0, step)),
            done_B | (token_B[:, None] == stop_ids).any(axis=1),
        )

    empty_B = ~(slots_BS >= 0).any(axis=1)
    start = (jnp.int32(0), x_BUD, valid_BU, jnp.zeros((B, room), jnp.int32), empty_B)
    return jax.lax.while_loop(unfinished, one, start)[3]


def _blinded(
    llm: llama.Llama,
    x_BUD: Array,
    valid_BU: Array,
    is_vision_BU: Array,
    hidden_L: Array,
    cfg: LlavaMiniConfig,
) -> Array:
    """The language model's layers; where `hidden_L` says so, text does not see vision tokens."""
    mask_BUU = masks.causal(jnp.arange(x_BUD.shape[1]), valid_BU)
    blind_BUU = mask_BUU & ~(~is_vision_BU[:, :, None] & is_vision_BU[:, None, :])
    turns_BUH = angles(masks.running_positions(valid_BU), cfg.llm.head_width, cfg.llm.rope)

    def body(layer: llama.Block, x_BUD: Array, hidden: Array) -> tuple[Array, None]:
        mask = jnp.where(hidden, blind_BUU, mask_BUU)
        return llama.block(layer, x_BUD, turns_BUH, mask, cfg.llm)[0], None

    return fold_layers(body, llm.layers, x_BUD, hidden_L)[0]


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
    for pictures that cannot be read: a model that sees less is what is measured.
    """
    refuse_inside(model.bundle.model)
    if benchmark.judge is not None:
        raise InputError(
            f"{benchmark.name} is graded by another model; take a benchmark that is scored by rule"
        )
    if all(question.gold is None for question in questions):
        raise InputError(
            f"{benchmark.name} has questions here whose answers only a server knows; take a split"
            " with answers"
        )
    layouts.check_pictures(benchmark.name, questions)
    tokens = benchmark.max_new_tokens
    settings = runner.settings_of(
        model,
        model_id,
        benchmark,
        prompts=settings_file.digest(questions),
        max_new_tokens=tokens,
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
        if run.unreadable:
            key, reason = next(iter(run.unreadable.items()))
            raise InputError(
                f"{benchmark.name}: {len(run.unreadable)} of {len(questions)} questions cannot be"
                f" asked, such as {key}: {reason}"
            )
        lines = [line for path in files(folder) for line in read_lines(path, benchmark)]
        judged = benchmark.score(data, questions, join(benchmark, questions, lines).answers)
        found[hidden.name] = judged.rules[judged.headline].value
    return found
