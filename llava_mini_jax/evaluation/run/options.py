"""eval.py's options."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.evaluation.benchmark import names_of_paper
from llava_mini_jax.evaluation.run.evaluate import Command, JudgeCommand

_JUDGE = "benchmarks that another model judges"


def parse(argv: Sequence[str], description: str | None) -> Command:
    """The command that these words say; leaves the program where they say none."""
    parser = argparse.ArgumentParser(
        prog="eval.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="DIR", help="model folder; repeatable")
    add(
        "--benchmarks",
        default="digits",
        metavar="A,B",
        help="all: the paper's (default: digits)",
    )
    add("--data", type=Path, default=Path("playground/data/eval"), help="folder of their files")
    add("--out", type=Path, default=Path("out/eval"), help="folder for answers and results")
    add("--limit", type=int, help="ask only so many questions of each benchmark")
    add("--offset", type=int, default=0, help="leave out so many questions in front")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="ask part I of N only")
    add("--batch-size", type=int, default=8, help="questions that are answered together")
    add("--max-new-tokens", type=int, help="of an answer (default: the benchmark's)")
    add("--dtype", help="float32 (default on CPU), bfloat16, or int8 weights")
    add("--vision-tower", type=Path, metavar="FOLDER", help="CLIP's, if the model does not have it")
    add("--conv-mode", dest="template", metavar="NAME", help="prompts, if not config.json's")
    add("--max-length", type=int, metavar="N", help="positions of a prompt, likewise")
    add("--score-only", action="store_true", help="score the answers that are there")
    add("--answers", type=Path, metavar="FILE", help="score this answers file, without a model")
    add("--paper", default="LLaVA-Mini 7B", help="the paper's column to compare with")
    add = parser.add_argument_group(_JUDGE).add_argument
    add("--judge-url", metavar="URL", help="its server, OpenAI-compatible: https://HOST/v1")
    add("--judge-model", metavar="NAME", help="default: the one that the official script asks")
    add("--judge-key-variable", default="OPENAI_API_KEY", metavar="NAME", help="of the environment")
    add("--judge-wording", type=Path, metavar="FILE", help="the official texts (default: ours)")
    add("--judge-concurrency", type=int, default=8, metavar="N", help="requests at a time")
    add("--judge-timeout", type=float, default=120.0, metavar="S", help="seconds of a request")
    add("--judge-options", type=_object, default={}, metavar="JSON", help='such as {"runs": 3}')
    add("--judge-fields", type=_object, default={}, metavar="JSON", help="added to each request")
    given = vars(parser.parse_args(argv))
    judge = {name: given.pop(name) for name in list(given) if name.startswith("judge_")}
    names = given.pop("benchmarks").split(",")
    return Command(
        models=tuple(given.pop("model")),
        benchmarks=tuple(names_of_paper() if names == ["all"] else names),
        judge=JudgeCommand(**{name.removeprefix("judge_"): v for name, v in judge.items()}),
        **given,
    )


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    return int(index) - 1, int(count)


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value
