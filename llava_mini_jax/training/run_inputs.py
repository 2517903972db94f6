"""What a stage reads before its first step: its tokenizer, and its data, which must be the same on
all processes and those that its checkpoints have learnt from.

    stage --tokenizer_of, dated--> tokenizer, the run's date
          --open_data--> samples, their fingerprint
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from etils import epath

from llava_mini_jax import distributed
from llava_mini_jax.data.digits.pages import DigitsPages, build_tokenizer
from llava_mini_jax.data.sets import fingerprint
from llava_mini_jax.data.sets.sources import Samples
from llava_mini_jax.data.text import chat_template, question_ids
from llava_mini_jax.data.text.conversation import TEMPLATES, Turn, encode
from llava_mini_jax.data.text.tokenizer import load_tokenizer
from llava_mini_jax.errors import InputError
from llava_mini_jax.training import feed
from llava_mini_jax.training.stages import TrainConfig
from llava_mini_jax.training.workdir import date_of_run


def tokenizer_of(stage: TrainConfig) -> Any:
    """The stage's, which its language model and its template can be trained with."""
    tokenizer = make_tokenizer(stage)
    if len(tokenizer) > stage.model.llm.vocab_size:
        raise InputError(
            f"{stage.name}: the tokenizer has {len(tokenizer)} tokens, but the language model's "
            f"vocab_size is {stage.model.llm.vocab_size}; raise it, or use the model's tokenizer"
        )
    check_template(stage, tokenizer)
    return tokenizer


def check_template(stage: TrainConfig, tokenizer: Any) -> None:
    """Raises InputError, once and not for every sample, if the template gives no labels."""
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    try:
        encode(TEMPLATES[stage.prompt.template], turns, tokenizer, double_bos=False)
    except InputError as error:
        raise InputError(f"{stage.name}: {error}") from error


def dated(stage: TrainConfig, tokenizer: Any, workdir: epath.Path) -> TrainConfig:
    """`stage` with one date for the whole run, where its prompts say one."""
    if stage.prompt.date or not chat_template.asks_for_date(tokenizer):
        return stage
    prompt = dataclasses.replace(stage.prompt, date=date_of_run(workdir))
    return dataclasses.replace(stage, prompt=prompt)


def make_tokenizer(stage: TrainConfig) -> Any:
    """The stage's, with what reads questions where its compressor does.

    The digits world has no second vocabulary: its questions are read in its own.
    """
    name, declared = stage.tokenizer, stage.model.declared
    tokenizer = build_tokenizer() if name == "digits" else load_tokenizer(name)
    if not declared.question:
        return tokenizer
    if name == "digits":
        reader = question_ids.reader_of_words(tokenizer, declared)
    else:
        reader = question_ids.reader_for(Path(name), declared)
    return question_ids.give(tokenizer, reader)


def open_data(
    stage: TrainConfig, about: dict[str, Any], checkpoint: epath.Path, accept_changed: bool
) -> tuple[DigitsPages | Samples, dict[str, Any]]:
    """The data, the same on all processes and that of `checkpoint`, and its fingerprint."""

    def opened() -> tuple[DigitsPages | Samples, dict[str, Any]]:
        source = feed.open_data(stage.data)
        return source, fingerprint.fingerprint(source)

    source, data = distributed.together(opened)
    _check_alike(stage, data)
    check_data(stage, data, about, checkpoint, accept_changed)
    return source, data


def _check_alike(stage: TrainConfig, data: dict[str, Any]) -> None:
    """Every process reads its rows by their numbers: the same data has to be everywhere."""
    digests = distributed.gather_json([fingerprint.of_files(data)])
    other = [number for number, digest in enumerate(digests) if digest != digests[0]]
    if other:
        raise InputError(
            f"{stage.name}: process {other[0]} has other data files than process 0 (names, sizes "
            "or content differ): copy the same files to all machines, or use a shared disk"
        )


def check_data(
    stage: TrainConfig,
    data: dict[str, Any],
    about: dict[str, Any],
    checkpoint: epath.Path,
    accept: bool = False,
) -> None:
    """InputError where a run would go on with other data than it has learnt from; checkpoints of
    old do not say what that was."""
    samples = sum(part["samples"] for part in data.values())
    before, changed = about.get("samples", samples), []
    if before != samples:
        changed.append(f"its data has {samples} samples, but had {before}")
    elif about and "data" not in about:
        _say(f"{stage.name}: {checkpoint} does not say what it was trained on; the run continues "
             "with the present data")  # fmt: skip
    elif about:
        changed += fingerprint.changes(about["data"], data)
    if not changed:
        return
    told = "; ".join(changed[:3]) + f"; and {len(changed) - 3} more" * (len(changed) > 3)
    if accept:
        _say(f"{stage.name}: accepted changed data: {told} when {checkpoint} was written")
        return
    raise InputError(
        f"{stage.name}: {told} when {checkpoint} was written, so the run would not continue with "
        "the same batches: give it the same data, start again with another --workdir, or accept "
        "this data with --accept-changed-data"
    )


def _say(line: str) -> None:
    if distributed.is_first():
        print(line, file=sys.stderr)
