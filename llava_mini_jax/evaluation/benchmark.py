"""What a benchmark is. Each has one file in evaluation/image or evaluation/video, and nowhere else.

    official files --questions--> Questions --a model, greedy--> Answers, LLaVA's JSON lines
                                      |                              |
                                      '------------score-------------'--> Scores, rules side by side
                                      '----------submission----------'--> what a server takes

A file defines `BENCHMARK = Benchmark(...)` of its own name, or `BENCHMARKS`, a list. `find` imports
the one file that it needs, `all_names` all of them. Nothing here needs JAX, a model or data.
"""

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini_jax.errors import InputError

MODELS = ("LLaVA-1.5 7B", "LLaVA-Mini 7B", "LLaVA-Mini 7B HD", "LLaVA-Mini 8B")  # of the paper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One item, as the model is asked it."""

    key: str  # names the item; unique in the benchmark, the same in every layout and run
    question_id: int | str  # as LLaVA's answers files have it; need not be unique (MME)
    text: str  # the user's whole text, instruction included, "<image>" not
    prompt: str  # what LLaVA's answers files record of it (MMBench leaves the instruction out)
    image: Path | bytes | None = None  # a file, or the bytes of one
    video: Path | np.ndarray | None = None  # a file, a folder, or frames, uint8 [F, H, W, 3]
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more fields of its answer
    gold: Any = None  # what is right, None where it is hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """A model's answer to a question, as a line of an answers file."""

    text: str
    prompt: str
    cut: bool | None  # ended by the limit of new tokens; None in others' files, which do not say
    line: Mapping[str, Any]  # the whole line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One way to score: the official one or another tool's."""

    value: float  # in the unit of the paper's table; NaN where there is none
    items: Mapping[str, float]  # by key, each item's own score (a fraction)
    scale: float | None  # the value is `scale` times the items' mean; None: it is no such mean
    details: Mapping[str, Any]  # per split, type, task, ...: whatever the official script prints

    @classmethod
    def mean_of(cls, items: Mapping[str, float], details: Mapping[str, Any]) -> "Rule":
        """The items' mean in percent, as in most rules."""
        return cls(value=percent(items.values()), items=items, scale=100, details=details)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    headline: str  # name of the rule that the table shows
    rules: Mapping[str, Rule]
    parsed: Mapping[str, Any]  # by key, what the headline rule read from the answer
    unparsed: Sequence[str]  # keys of answers that it could read nothing from
    # Of multiple choice, by rule and key: the letter that each rule reads, "" for none.
    readings: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def disagreements(self) -> dict[str, list[str]]:
        """By rule, the keys of answers in which it reads another letter than the headline."""
        own = self.readings.get(self.headline, {})
        return {
            rule: [key for key, letter in own.items() if letter != said[key]]
            for rule, said in self.readings.items()
            if rule != self.headline
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    name: str  # of --benchmarks
    title: str
    folder: str  # below the data folder, as LLaVA's playground/data/eval has it
    files: Mapping[str, str]  # what it reads, relative to `folder`: where one gets it
    metric: str  # of the headline, with its unit: "accuracy, %"
    paper: Mapping[str, float]  # of MODELS
    max_new_tokens: int
    questions: Callable[[Path], list[Question]]  # of the benchmark's folder, in either layout
    # (folder, questions, answers); of judged benchmarks also `replies`, judge.Replies.
    score: Callable[..., Scores]
    # Rows of answers files in another form than LLaVA's, as lines in LLaVA's.
    from_rows: Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]] | None = None
    # Which question a line of an answers file belongs to; None: by question_id alone.
    key_of: Callable[[Mapping[str, Any]], str] | None = None
    # Writes what a server takes into a folder and returns the files; refuses to leave items out.
    submission: (
        Callable[[Path, Sequence[Question], Mapping[str, Output], Path], list[Path]] | None
    ) = None
    # Draws examples of the answers into a folder; lines that say where.
    illustrate: Callable[[Sequence[Question], Mapping[str, Output], Path], list[str]] | None = None
    max_frames: int | None = None  # of a video at one a second; None: all
    judge: Any = None  # evaluation/judge/judging.py, of benchmarks that another model grades

    def need(self, folder: Path, file: str) -> Path:
        """The path of one of its files; an InputError says where to get it and where to put it."""
        path = folder / file
        if not path.exists():
            raise InputError(
                f"{self.name}: there is no {path}; get it from {self.files[file]}, and put it"
                " there, as in LLaVA's playground/data/eval"
            )
        return path


# Names that are not their file's: by them `find` knows which file to import.
_FILE_OF = {
    "activitynet_qa": "video_qa",
    "digits_dense": "digits",
    "digits_english": "digits",
    "egoschema_full": "egoschema",
    "mmbench_cn": "mmbench",
    "msrvtt_qa": "video_qa",
    "msvd_qa": "video_qa",
    "vizwiz_val": "vizwiz",
    "vqav2_val": "vqav2",
}


def all_names() -> list[str]:
    """Names of all benchmarks, in the order of their files."""
    return [benchmark.name for module in _modules().values() for benchmark in _defined(module)]


def names_of_paper() -> list[str]:
    """Benchmarks for which the paper has figures."""
    return [name for name in all_names() if find(name).paper]


def find(name: str) -> Benchmark:
    """The benchmark of that name. Raises InputError if no file defines it."""
    module = _modules().get(_FILE_OF.get(name, name))
    for benchmark in _defined(module) if module else ():
        if benchmark.name == name:
            return benchmark
    raise InputError(f'benchmark "{name}" is unknown; known: {", ".join(all_names())}')


def _modules() -> dict[str, str]:
    """File -> module, of image/ and then of video/; nothing of them is imported."""
    found = {}
    for kind in ("image", "video"):
        package = importlib.import_module(f"llava_mini_jax.evaluation.{kind}")
        names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
        found |= {name: f"{package.__name__}.{name}" for name in names}
    return found


def _defined(module: str) -> list[Benchmark]:
    loaded = importlib.import_module(module)
    return getattr(loaded, "BENCHMARKS", None) or [loaded.BENCHMARK]


def percent(values: Collection[float]) -> float:
    """100 times the mean; NaN of none."""
    return 100 * sum(values) / len(values) if values else math.nan


def standard_error(items: Mapping[str, float]) -> float:
    """Of the mean of independent items; NaN for fewer than two."""
    n = len(items)
    if n < 2:
        return math.nan
    mean = sum(items.values()) / n
    return math.sqrt(sum((x - mean) ** 2 for x in items.values()) / (n - 1) / n)
