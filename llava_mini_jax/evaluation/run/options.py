"""eval.py's options."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax import compilation
from llava_mini_jax.arguments import (
    COMPRESSOR,
    VISION_TOKENS,
    VISION_TOWER,
    Parser,
    refuse,
    vision_tokens,
)
from llava_mini_jax.errors import short
from llava_mini_jax.evaluation.benchmark import Benchmark, find, names_of_paper
from llava_mini_jax.evaluation.run.evaluate import Command, JudgeCommand, ServerCommand

_LOADING = (
    *("dtype", "attention", "vision_tower", "conv_mode", "max_length"),
    *("compressor", "vision_tokens"),
)
_LOCAL = ("batch_size", "compilation_cache", *_LOADING)
_HTTP = ("server_key_variable", "server_concurrency", "server_timeout")
_ASKING = ("shard", "max_new_tokens", *_LOCAL, "server", *_HTTP)
_SERVER = ("judge_key_variable", "judge_concurrency", "judge_timeout")
_JUDGE = ("judge_url", "judge_model", "judge_wording", "judge_options", "judge_fields", *_SERVER)


def parser(description: str | None) -> Parser:
    """What is not given stands in no namespace: `Command` has the defaults."""
    parser = Parser(prog="eval.py", description=description, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", action="append", metavar="DIR", help="model folder; repeatable")
    add("--server", metavar="URL", help="ask this server, not a folder; --model: one of its models")
    add("--server-key-variable", metavar="NAME", help="variable with its key (default: no key)")
    add("--server-concurrency", type=int, metavar="N", help="simultaneous requests (default: 8)")
    add("--server-timeout", type=float, metavar="S", help="seconds for a request (default: 600)")
    add("--benchmarks", metavar="A,B", help="benchmarks, or all of the paper's (default: digits)")
    add("--data", type=Path, metavar="DIR", help="their files, such as playground/data/eval")
    add("--out", type=Path, metavar="DIR", help="for answers and results (default: out/eval)")
    add("--limit", type=int, metavar="N", help="ask only N questions of each benchmark")
    add("--offset", type=int, metavar="N", help="skip the first N questions")
    add("--shard", type=shard, metavar="I/N", help="ask only part I of N")
    add("--batch-size", type=int, metavar="N", help="questions answered together (default: 8)")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the benchmark's)")
    add("--dtype", metavar="TYPE", help="float32 (default on CPU), bfloat16; int8 or int4 weights")
    add("--attention", metavar="NAME", help="auto (default), xla, cudnn or splash")
    add("--vision-tower", type=Path, metavar="FOLDER", help=VISION_TOWER)
    add("--conv-mode", metavar="NAME", help="prompt template (default: config.json's)")
    add("--max-length", type=int, metavar="N", help="longest prompt, in positions")
    add("--compressor", metavar="NAME[,FIELD=VALUE...]", help=COMPRESSOR)
    add("--vision-tokens", type=vision_tokens, metavar="N", help=VISION_TOKENS)
    add("--compilation-cache", metavar="DIR", help=compilation.HELP)
    add("--score-only", action="store_true", help="score existing answers")
    add("--answers", type=Path, metavar="FILE", help="score this answers file; needs no model")
    add("--paper", metavar="NAME", help="the paper's column to show (default: LLaVA-Mini 7B)")
    add = parser.add_argument_group("benchmarks that another model judges").add_argument
    add("--judge-url", metavar="URL", help="the judge's server, OpenAI-compatible: https://HOST/v1")
    add("--judge-model", metavar="NAME", help="default: the official script's")
    add(
        "--judge-key-variable",
        metavar="NAME",
        help="variable with its key (default: OPENAI_API_KEY)",
    )
    add("--judge-wording", type=Path, metavar="FILE", help="the official texts (default: ours)")
    add("--judge-concurrency", type=int, metavar="N", help="simultaneous requests (default: 8)")
    add("--judge-timeout", type=float, metavar="S", help="seconds for a request (default: 120)")
    add("--judge-options", type=json_object, metavar="JSON", help='such as {"runs": 3}')
    add("--judge-fields", type=json_object, metavar="JSON", help="fields to add to each request")
    return parser


def parse(argv: Sequence[str], description: str | None) -> Command:
    """The command that these words say. Raises InputError where they say none."""
    args = parser(description).parse_args(argv)
    names = getattr(args, "benchmarks", "digits").split(",")
    benchmarks = [find(name) for name in (names_of_paper() if names == ["all"] else names)]
    _refuse(args, benchmarks)
    given: dict[str, Any] = vars(args)
    given["benchmarks"] = tuple(benchmark.name for benchmark in benchmarks)
    judge = {name: given.pop(name) for name in _JUDGE if name in given}
    server = {name: given.pop(name) for name in ("server", *_HTTP) if name in given}
    if server:
        given["server"] = ServerCommand(
            url=server.pop("server"),
            **{name.removeprefix("server_"): v for name, v in server.items()},
        )
    if "conv_mode" in given:
        given["template"] = given.pop("conv_mode")
    return Command(
        models=tuple(given.pop("model", ())),
        judge=JudgeCommand(**{name.removeprefix("judge_"): v for name, v in judge.items()}),
        **given,
    )


def _refuse(args: argparse.Namespace, benchmarks: Sequence[Benchmark]) -> None:
    listed = ",".join(benchmark.name for benchmark in benchmarks)
    if hasattr(args, "answers"):
        refuse(args, ["score_only", *_ASKING], "with --answers")
    if hasattr(args, "score_only"):
        refuse(args, _ASKING, "with --score-only")
    if not any(benchmark.files for benchmark in benchmarks):
        refuse(args, ["data"], f"with --benchmarks {listed}, which reads no files")
    if not any(benchmark.judge for benchmark in benchmarks):
        refuse(args, _JUDGE, f"with --benchmarks {listed}, which need no judge")
    if hasattr(args, "server"):
        refuse(args, _LOCAL, "with --server, which has loaded its model")
    else:
        refuse(args, _HTTP, "without --server")
    if not hasattr(args, "judge_url"):
        refuse(args, _SERVER, "without --judge-url")


def shard(text: str) -> tuple[int, int]:
    """(0, 4) of "1/4"."""
    index, _, count = text.partition("/")
    try:
        return int(index) - 1, int(count)
    except ValueError:
        sentence = f"{short(text)} is not a part of the questions; give I/N, such as 1/4"
        raise argparse.ArgumentTypeError(sentence) from None


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        sentence = f'{short(text)} is not a JSON object; give one such as {{"runs": 3}}'
        raise argparse.ArgumentTypeError(sentence)
    return value
