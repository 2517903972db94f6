"""What a benchmark run came to: results.json, samples.jsonl, and tables beside the paper's figures.

Scores, Joined, settings --result--> results.json    of one benchmark and one model
                         --samples-> samples.jsonl   a line a question
results of several       --table---> Markdown, and the same in the terminal
"""

import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.evaluation.benchmark import Benchmark, Question, Scores, standard_error
from llava_mini_jax.evaluation.run.answers import Joined
from llava_mini_jax.journal import write_whole
from llava_mini_jax.terminal import as_json, finite

# Table 1's eleven columns. Its "Avg. (%)" adds MME, whose maximum is 2000, as a fraction of that:
# only so do all complete rows give the printed figure.
_COLUMNS = "vqav2 gqa vizwiz scienceqa textvqa pope mme mmbench seed_bench llava_bench mmvet"
TABLE_1 = tuple(_COLUMNS.split())
_MME_MAXIMUM = 2000.0  # of perception alone; with cognition MME has 2800
_METRIC = 1  # its column in `table`
_LIBRARIES = ("llava-mini-jax", "jax", "jaxlib", "transformers", "tokenizers", "numpy", "pillow")


def result(
    benchmark: Benchmark,
    questions: Sequence[Question],
    joined: Joined,
    scores: Scores,
    settings: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """All about one score: what it is, over what, by which rules, and what did not go well.

    "n" are the items that the headline rule counts, "asked" all questions.

    `standard_error` is that of the headline's mean over items, in its unit; null where the score is
    no mean of items (F1, sums) or the items are fewer than two.
    """
    headline = scores.rules[scores.headline]
    text = json.dumps(settings, sort_keys=True, default=str)
    error = math.nan
    if headline.scale is not None and math.isfinite(headline.value):
        error = headline.scale * standard_error(headline.items)
    found = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "metric": benchmark.metric,
        "headline": scores.headline,
        "value": headline.value,
        "standard_error": error,
        "n": len(headline.items) or len(questions),
        "asked": len(questions),
        "answered": len(joined.answers),
        "rules": {
            name: {"value": rule.value, "details": rule.details}
            for name, rule in scores.rules.items()
        },
        "not_parsed": list(scores.unparsed),
        "disagreements": scores.disagreements,
        "cut_off": [key for key, answer in joined.answers.items() if answer.cut],
        "missing": list(joined.missing),
        "unknown": list(joined.unknown),
        "repeated": list(joined.repeated),
        "paper": dict(benchmark.paper),
        "settings": settings,
        "settings_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    }
    return finite(found)


def samples(
    questions: Sequence[Question], joined: Joined, scores: Scores
) -> Iterable[dict[str, Any]]:
    """What was asked, answered, read from the answer and given for it, question by question."""
    for question in questions:
        answer = joined.answers.get(question.key)
        said = {name: own.get(question.key) for name, own in scores.readings.items()}
        yield {
            "key": question.key,
            "prompt": question.text,
            "text": None if answer is None else answer.text,
            "parsed": scores.parsed.get(question.key),
            **({"readings": said} if said else {}),
            "gold": question.gold,
            "scores": {name: rule.items.get(question.key) for name, rule in scores.rules.items()},
            "cut_off": None if answer is None else answer.cut,
        }


def write(folder: Path, found: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    """results.json and samples.jsonl; each is whole, or as it was before."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "samples.jsonl", "".join(as_json(line) + "\n" for line in lines))
    write_whole(folder / "results.json", as_json(found, indent=2) + "\n")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder, or not needed
            continue
    return found


def averages(values: Mapping[str, float]) -> dict[str, float]:
    """The paper's average of Table 1 and one in which MME weighs like the others; {} unless all.

    "paper average": (ten percentages + MME / 2000) / 11. "average": MME / 2000 as a percentage.
    """
    if not all(name in values for name in TABLE_1):
        return {}
    mme = values["mme"] / _MME_MAXIMUM
    rest = sum(values[name] for name in TABLE_1 if name != "mme")
    count = len(TABLE_1)
    return {"paper average": (rest + mme) / count, "average": (rest + 100 * mme) / count}


def table(results: Sequence[Mapping[str, Any]], column: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of results, one model's or several'; `column` is the paper's to compare with.

    Several models stand side by side, in the order of their first results.
    """
    models = list(dict.fromkeys(str(found["model"]) for found in results))
    header = ["benchmark", "metric", "n", *models, f"paper: {column}"]
    if len(models) == 1:
        header += ["difference", "not parsed", "missing"]
    rows = []
    for name in dict.fromkeys(found["benchmark"] for found in results):
        own = {str(found["model"]): found for found in results if found["benchmark"] == name}
        first = next(iter(own.values()))
        paper = first["paper"].get(column)
        row = [first["title"], first["metric"], str(first["n"])]
        row += [_score(own.get(model)) for model in models]
        row.append("" if paper is None else f"{paper:g}")
        if len(models) == 1:
            known = None not in (paper, first["value"])
            row.append(f"{first['value'] - float(paper or 0):+.1f}" if known else "")
            row += [str(len(first["not_parsed"])), str(len(first["missing"]))]
        rows.append(row)
        for part in first["rules"][first["headline"]]["details"].get("parts", {}):
            shown = [_part(own.get(model), part) for model in models]
            rows.append([f"  {part}", "", "", *shown] + [""] * (len(header) - 3 - len(models)))
    for name in averages({found["benchmark"]: 0.0 for found in results}):
        row = [name, "%", ""]
        for model in models:
            own_values = {
                f["benchmark"]: f["value"]
                for f in results
                if str(f["model"]) == model and f["value"] is not None
            }
            row.append(_number(averages(own_values).get(name)))
        rows.append(row + [""] * (len(header) - len(row)))
    return header, rows


def show(results: Sequence[Mapping[str, Any]], column: str) -> None:
    """The table, and what one has to know of it, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    header, rows = table(results, column)
    shown = Table()
    for number, name in enumerate(header):
        if number != _METRIC:  # results.md has it; a terminal is narrow
            shown.add_column(name, no_wrap=number == 0, justify="left" if number == 0 else "right")
    for row in rows:
        shown.add_row(*(cell for number, cell in enumerate(row) if number != _METRIC))
    Console().print(shown)
    for line in remarks(results):
        print(line)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.strip() for cell in line) + " |\n" for line in lines)


def _score(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return ""
    error = found["standard_error"]
    return _number(found["value"]) + ("" if error is None else f" ± {_number(error)}")


def _part(found: Mapping[str, Any] | None, part: str) -> str:
    if found is None:
        return ""
    return _number(found["rules"][found["headline"]]["details"].get("parts", {}).get(part))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def remarks(results: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """What a reader of the table has to know, a line each: what is missing, odd, or to be seen."""
    for found in results:
        where = f"{found['model']}, {found['title']}"
        for name, what in (
            ("missing", "questions have no answer"),
            ("unknown", "answers belong to no question and are left out"),
            ("repeated", "questions have two different answers; the first one counts"),
            ("cut_off", "answers end because they reached the limit of new tokens"),
            ("not_parsed", "answers give nothing that the headline rule can read"),
        ):
            if keys := found[name]:
                yield f"{where}: {len(keys)} {what} ({_some(keys)})"
        if any(others := found.get("disagreements", {}).values()):
            keys = list(dict.fromkeys(key for own in others for key in own))
            by_rule = found["disagreements"].items()
            counts = ", ".join(f"{rule} {len(own)}" for rule, own in by_rule)
            yield (
                f"{where}: rules disagree on {len(keys)} of {found['answered']} answers"
                f" ({_some(keys)}); another letter than {found['headline']} reads: {counts}"
            )
        details = found["rules"][found["headline"]]["details"]
        if remark := details.get("remark"):
            yield f"{where}: {remark}"
        judge = details.get("judge", {})
        if judge.get("pending"):
            reason = next(iter(judge["first of the pending"].values()))
            yield (
                f"{where}: {judge['pending']} of {judge['asks']} questions to the judge have no "
                f"reply ({reason}); the same command with --judge-url asks for these alone"
            )
        elif judge:
            yield f"{where}: judged by {judge['model']}, wording: {judge['wording']}"
        if judge.get("refused"):
            key, reason = next(iter(judge["first of the refused"].items()))
            yield (
                f"{where}: the judge's server refused {judge['refused']} of {judge['asks']}"
                f" questions permanently ({key}: {reason}); they count as unreadable replies"
            )
        for key, reason in list(found.get("unreadable", {}).items())[:3]:
            yield f"{where}: {key} was not asked: {reason}"
        yield from found.get("shown", ())


def _some(keys: Sequence[str], shown: int = 3) -> str:
    return ", ".join(map(str, keys[:shown])) + ", ..." * (len(keys) > shown)
