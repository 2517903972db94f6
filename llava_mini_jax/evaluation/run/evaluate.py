"""From models and benchmarks to a table: what eval.py does.

for each model, each benchmark:
    data folder --questions--> part of them --runner.ask--> OUT/MODEL/BENCHMARK/answers.jsonl
                                             --score--> results.json, samples.jsonl, submission/
OUT/results.md, OUT/results.json: all of them beside the paper's figures
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_mini_jax import compilation, environment
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import MODELS, Benchmark, Output, Question, find
from llava_mini_jax.evaluation.run import failures, report, settings_file
from llava_mini_jax.evaluation.run.answers import files, join, read_lines
from llava_mini_jax.journal import write_whole
from llava_mini_jax.terminal import as_json, counting, loading, note

if TYPE_CHECKING:
    from llava_mini_jax.evaluation.judge.judging import Replies
    from llava_mini_jax.evaluation.run.served import Server


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeCommand:
    """How judged benchmarks are graded (judge/); `url` None: by the replies that are kept."""

    url: str | None = None
    model: str | None = None  # None: the official script's
    key_variable: str = "OPENAI_API_KEY"
    wording: Path | None = None  # a file of official texts; None: ours
    concurrency: int = 8
    timeout: float = 120.0  # seconds of one request
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerCommand:
    """A server that is asked in place of a model's folder (served.py)."""

    url: str
    key_variable: str | None = None
    concurrency: int = 8
    timeout: float = 600.0  # seconds of one request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What is evaluated; see eval.py's options. Raises InputError for numbers that mean nothing."""

    models: tuple[str, ...]
    benchmarks: tuple[str, ...]
    data: Path = Path("playground/data/eval")
    out: Path = Path("out/eval")
    limit: int | None = None
    offset: int = 0
    shard: tuple[int, int] = (0, 1)  # which, of how many
    batch_size: int = 8
    max_new_tokens: int | None = None  # None: the benchmark's own
    dtype: str | None = None  # these seven are llava_mini_jax.load's
    attention: str = "auto"
    vision_tower: Path | None = None
    template: str | None = None
    max_length: int | None = None
    compressor: str | None = None
    vision_tokens: int | str | None = None
    compilation_cache: str | None = None
    score_only: bool = False
    answers: Path | None = None  # an answers file from elsewhere, to be scored
    paper: str = "LLaVA-Mini 7B"  # the column to compare with
    judge: JudgeCommand = JudgeCommand()
    server: ServerCommand | None = None  # `models` are names of its models; none: its first

    def __post_init__(self) -> None:
        index, count = self.shard
        for wrong, message in (
            (self.limit is not None and self.limit < 1, f"--limit is {self.limit}; give 1 or more"),
            (self.offset < 0, f"--offset is {self.offset}; give 0 or more"),
            (not 0 <= index < count, f"--shard is {index + 1}/{count}; give 1/N to N/N"),
            (self.batch_size < 1, f"--batch-size is {self.batch_size}; give 1 or more"),
            (
                self.max_new_tokens is not None and self.max_new_tokens < 1,
                f"--max-new-tokens is {self.max_new_tokens}; give 1 or more",
            ),
            (self.paper not in MODELS, f"--paper is {self.paper}; give one of {', '.join(MODELS)}"),
            (
                self.answers is not None and len(self.benchmarks) != 1,
                "--answers is a file of one benchmark; name just that with --benchmarks",
            ),
            (
                not self.models and self.answers is None and self.server is None,
                "give --model DIR, --server URL, or --answers FILE to score a file without a model",
            ),
        ):
            if wrong:
                raise InputError(message)


class Selected(NamedTuple):
    """The part of a benchmark's questions that is to be asked and scored."""

    questions: Sequence[Question]
    prompts: str  # settings_file.digest of all its questions


def evaluate(command: Command) -> list[dict[str, Any]]:
    """Asks and scores; the results, of which each benchmark's folder and OUT have the files."""
    benchmarks = [find(name) for name in command.benchmarks]
    _check_judge_options(benchmarks, command.judge.options)
    asking = not command.score_only and command.answers is None
    asked = {b.name: _selected(b, command) for b in benchmarks}  # before a model is loaded
    if asking:
        for name, part in asked.items():
            layouts.check_pictures(name, part.questions)
    try:
        command.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {command.out} cannot be made ({error}): give another") from error
    server = None
    if asking and command.server is not None:
        server = _server(command.server)
    elif asking:
        environment.check()
        compilation.keep_programs(command.compilation_cache, "eval.py")
    results = []
    names = command.models or ((server.model(),) if server else (str(command.answers),))
    for name in names:
        folder = command.out / _slug(name)
        loaded = server
        for benchmark in benchmarks:
            own = folder / benchmark.name
            more: dict[str, Any] = {}
            if asking:
                loaded = loaded or _load(name, command)
                more = _ask(loaded, name, benchmark, asked[benchmark.name], own, command)
            results.append(_score(name, benchmark, asked[benchmark.name], own, command, more))
        if news := compilation.news():
            note(f"{_slug(name)}: {news}")
    header, rows = report.table(results, command.paper)
    write_whole(command.out / "results.md", report.markdown(header, rows))
    write_whole(command.out / "results.json", as_json(results, indent=2) + "\n")
    return results


def _check_judge_options(benchmarks: Sequence[Benchmark], given: Mapping[str, Any]) -> None:
    """Each judge is told those of the options that it has; one that none has is misspelt."""
    known = {b.name: list(b.judge.options) for b in benchmarks if b.judge and b.judge.options}
    if unknown := sorted(set(given).difference(*known.values())):
        have = "; ".join(f"{name}: {', '.join(options)}" for name, options in known.items())
        raise InputError(
            f"--judge-options has {', '.join(unknown)}, which no judge of these benchmarks has;"
            f" they have {have or 'none'}"
        )


def _selected(benchmark: Benchmark, command: Command) -> Selected:
    folder = command.data / benchmark.folder
    questions = benchmark.questions(folder)
    end = None if command.limit is None else command.offset + command.limit
    chosen = questions[command.offset : end]
    if not chosen:
        raise InputError(
            f"{benchmark.name} has {len(questions)} questions; --offset {command.offset} leaves"
            " none of them"
        )
    return Selected(chosen, settings_file.digest(questions))


def _slug(name: str) -> str:
    """A model's name or path as the name of one folder."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "model"


def _load(name: str, command: Command) -> Any:
    import llava_mini_jax

    with loading(name) as watch:
        return llava_mini_jax.load(
            name,
            dtype=command.dtype,
            attention=command.attention,
            vision_tower=command.vision_tower,
            template=command.template,
            max_length=command.max_length,
            compressor=command.compressor,
            vision_tokens=command.vision_tokens,
            watch=watch,
        )


def _server(command: ServerCommand) -> "Server":
    from llava_mini_jax.evaluation.run import served

    return served.Server(served.endpoint(**dataclasses.asdict(command)))


def _ask(
    model: Any, name: str, benchmark: Benchmark, asked: Selected, folder: Path, command: Command
) -> dict[str, Any]:
    """Runs what is left to ask; what the results should say about it. `model` may be a Server."""
    from llava_mini_jax.evaluation.run import runner, served, sheet

    questions, prompts = asked
    given = command.max_new_tokens
    tokens = benchmark.max_new_tokens if given is None else given
    more: dict[str, Any] = dict(prompts=prompts, max_new_tokens=tokens)
    if command.server is not None:
        settings = {"server_model": name, "benchmark": benchmark.name, **more}
    else:
        model = runner.of_date(model, settings_file.read(folder))
        settings = runner.settings_of(model, name, benchmark, **more)
    settings_file.check_same(folder, settings)
    title = f"{_slug(name)}: {benchmark.name}"
    with counting(title, len(questions)) as bar:
        if command.server is not None:
            ask = partial(served.ask, model, name)
        else:
            compiling = partial(_say_compiling, bar, title)
            ask = partial(runner.ask, model, batch_size=command.batch_size, compiling=compiling)
        run = ask(
            _slug(name),
            benchmark,
            questions,
            folder,
            shard=sheet.Shard(*command.shard),
            max_new_tokens=tokens,
            progress=lambda done: bar(advance=done),
        )
    return {"unreadable": run.unreadable, "run": dataclasses.asdict(run)}


def _say_compiling(bar: Callable[..., None], title: str, done: int, total: int) -> None:
    """In front of a bar that stands still meanwhile."""
    left = f", compiling {done} of {total} programs" if done < total else ""
    bar(description=title + left)


def _score(
    name: str,
    benchmark: Benchmark,
    asked: Selected,
    folder: Path,
    command: Command,
    more: dict[str, Any],
) -> dict[str, Any]:
    questions, prompts = asked
    data = command.data / benchmark.folder
    paths = files(folder) if command.answers is None else [command.answers]
    if not paths:
        raise InputError(
            f"{folder} has no answers.jsonl; run without --score-only, or give --answers FILE"
        )
    settings = {} if command.answers is not None else settings_file.read(folder)
    if settings.get("prompts", prompts) != prompts:  # with --score-only nobody has looked yet
        settings_file.refuse(folder, ["prompts"])
    lines = [line for path in paths for line in read_lines(path, benchmark)]
    joined = join(benchmark, questions, lines)
    if benchmark.judge is None:
        scores = benchmark.score(data, questions, joined.answers)
    else:
        replies = _replies(benchmark, questions, joined.answers, folder, command)
        scores = benchmark.score(data, questions, joined.answers, replies=replies)
        if not replies.pending:  # files of a part would look like those of the whole
            benchmark.judge.write(replies, folder / "judged", _slug(name))
    settings |= {"limit": command.limit, "offset": command.offset}
    found = report.result(benchmark, questions, joined, scores, settings, model=name, **more)
    report.write(folder, found, report.samples(questions, joined, scores))
    page = failures.write(folder, name, benchmark, questions, joined, scores)
    found["shown"] = [] if page is None else [f"failures: {page}"]
    part = command.limit is not None or command.offset > 0
    if benchmark.submission is not None and not joined.missing and not part:
        benchmark.submission(data, questions, joined.answers, folder / "submission")
    # Of several models the last one's: they would be drawn over each other in OUT.
    if benchmark.illustrate is not None and name == (command.models or (name,))[-1]:
        found["shown"] += benchmark.illustrate(questions, joined.answers, command.out)
    return found


def _replies(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Mapping[str, Output],
    folder: Path,
    command: Command,
) -> "Replies":
    """What the judge says, or has said: replies are kept in judge.jsonl, and paid for once."""
    from llava_mini_jax.evaluation.judge import client
    from llava_mini_jax.evaluation.judge.http import Endpoint

    judge = command.judge
    plan = benchmark.judge.plan(
        questions,
        answers,
        wording=judge.wording,
        model=judge.model,
        options={k: v for k, v in judge.options.items() if k in benchmark.judge.options},
        fields=judge.fields,
    )
    if judge.url is None:
        return client.kept(plan, folder / "judge.jsonl")
    endpoint = Endpoint(
        base_url=judge.url,
        key_variable=judge.key_variable or None,
        concurrency=judge.concurrency,
        timeout_s=judge.timeout,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with counting(f"judging {benchmark.name}", len(plan.asks)) as bar:
        file = folder / "judge.jsonl"
        return client.ask(plan, endpoint, file, progress=lambda done: bar(advance=done))
