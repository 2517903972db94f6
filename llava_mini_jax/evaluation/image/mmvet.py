"""MM-Vet: questions that need several capabilities at once, each answer graded from 0 to 1.

    mm-vet.json ------------.
    or data/test-*.parquet -'--> Questions --judge: "0.7", asked up to six times--> means, percent
                                       '--> results/MODEL.json, ...-grade-Nruns.json, two csv files

The judge completes a table whose last row is the item. If the first word of a reply is not a number
from 0 to 1, a request with one more line follows, at temperature 0, 0, 0.5, ... 2; the sixth reply
is never read, and the score is then 0. `runs` grades everything that many times (the paper of
MM-Vet: 5).
Capabilities of an item are a set: names of combinations are sorted here.
"""

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Question, Rule, Scores
from llava_mini_jax.evaluation.judge import own_texts
from llava_mini_jax.evaluation.judge.judging import Judge, Judged, Ladder, Replies, scored_by
from llava_mini_jax.evaluation.judge.wording import messages

_NAME = "mmvet"
_FILE = "mm-vet.json"
_FIELDS = {"question": str, "answer": str}
_TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5, 2.0)
_DECIMALS = 1  # that the evaluator prints


def _questions(folder: Path) -> list[Question]:
    if parquet := layouts.parquet_instead(folder, _FILE, "data/test-*.parquet"):
        texts = ("question_id", "question", "answer", "capability")
        columns: dict[str, type] = {**dict.fromkeys(texts, str), "image": bytes}
        rows = layouts.read_parquet(parquet, columns)
        found = [
            _question(row["question_id"], row, row["image"], row["capability"].split(","))
            for row in rows
        ]
        return layouts.check_keys(_NAME, found)
    path = BENCHMARK.need(folder, _FILE)
    items = layouts.check_fields(layouts.read_json(path), {}, str(path))
    found = []
    for name, item in items.items():
        fields = {**_FIELDS, "imagename": str, "capability": list}
        layouts.check_fields(item, fields, f"{path}, {name}")
        picture = folder / "images" / item["imagename"]
        found.append(_question(name, item, picture, item["capability"]))
    return layouts.check_keys(_NAME, found)


def _question(
    name: str, item: Mapping[str, Any], image: Path | bytes | None, capabilities: Sequence[Any]
) -> Question:
    names = [str(one).strip() for one in capabilities]
    if not image or not all(names) or not names:
        raise InputError(f"{_NAME}: {name} has no image or no capability; get the file again")
    number = name.removeprefix("v1_")
    return Question(
        key=name,
        question_id=int(number) if number.isdigit() else name,  # as LLaVA's file has it
        text=item["question"],
        prompt=item["question"],
        image=image,
        gold={"answer": item["answer"], "capability": names},
    )


def _ladders(judged: Judged, texts: Mapping[str, str], options: Mapping[str, Any]) -> list[Ladder]:
    """A ladder for each item and run; missing answers are not asked about, their score is 0."""
    layouts.check_prompts(_NAME, judged.questions, judged.answers)
    found = []
    for run in range(_runs(options)):
        for question in judged.questions:
            if question.key not in judged.answers:
                continue
            # Blanks around AND and OR, and three tokens for the grade: the evaluator's own.
            truth = question.gold["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
            row = " | ".join([question.text, truth, judged.answers[question.key].text, ""])
            first = f"{texts['prompt']}\n{row}"
            bodies = [
                {
                    "messages": messages(f"{first}\n{texts['again']}" if number else first),
                    "temperature": temperature,
                    "max_tokens": 3,
                }
                for number, temperature in enumerate(_TEMPERATURES)
            ]
            found.append(Ladder(_ask_key(question.key, run), bodies, run))
    return found


def _ask_key(key: str, run: int) -> str:
    return f"{key}, run {run + 1}"


def _runs(options: Mapping[str, Any]) -> int:
    runs = options["runs"]
    if not isinstance(runs, int) or runs < 1:
        raise InputError(f"{_NAME}: the judge's option runs is {runs!r}; give 1 or more")
    return runs


def read_official(reply: str) -> float | None:
    """The first word as a number from 0 to 1; None asks again."""
    try:
        score = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return None if score > 1.0 or score < 0.0 else score


def read_tolerant(reply: str) -> float | None:
    """The only number in the reply, if it is from 0 to 1: "Correctness: 0.5", " 0.6."."""
    numbers = [float(number) for number in _NUMBER.findall(reply)]
    return numbers[0] if len(numbers) == 1 and 0 <= numbers[0] <= 1 else None


_NUMBER = re.compile(r"(?<![\w.-])(?:\d+(?:\.\d+)?|\.\d+)(?![\w/%]|\.\d)")


def _grades(key: str, replies: Replies, run: int, tolerant: bool) -> tuple[float, bool]:
    """(score, whether a reply said so) of one item in one run."""
    said = replies.by_key.get(_ask_key(key, run), ())
    for number, reply in enumerate(said):
        # The official parser does not look at the last reply.
        score = None if number + 1 == len(_TEMPERATURES) else read_official(reply.text)
        if score is None and tolerant:
            score = read_tolerant(reply.text)
        if score is not None:
            return score, True
    return 0.0, False


def _rule(questions: Sequence[Question], replies: Replies, tolerant: bool) -> Rule:
    runs = _runs(replies.plan.options)
    grades = {q.key: [_grades(q.key, replies, r, tolerant) for r in range(runs)] for q in questions}
    scores = {key: [score for score, _ in of_item] for key, of_item in grades.items()}
    tables = {
        "capability": _table(questions, scores, _capabilities(questions)),
        "combination": _table(questions, scores, _combinations(questions)),
    }
    total = np.array([scores[q.key] for q in questions]).sum(0) / len(questions) * 100
    return Rule(
        value=replies.value(float(np.round(total.mean(), _DECIMALS))),
        items={key: sum(of_item) / runs for key, of_item in scores.items()},
        scale=100,
        details={
            "parts": {k: replies.value(v) for k, v in _rounded(tables["capability"]).items()},
            **tables,  # not rounded
            "unrounded": float(total.mean()),
            "std": float(total.std()),
            "runs": total.tolist(),
            "unread": [key for key, of_item in grades.items() if not all(ok for _, ok in of_item)],
            "judge": replies.about(),
        },
    )


def _capabilities(questions: Sequence[Question]) -> dict[str, list[str]]:
    """Keys of the items that need each capability, the most frequent one first."""
    return _by_size([(c, q.key) for q in questions for c in dict.fromkeys(q.gold["capability"])])


def _combinations(questions: Sequence[Question]) -> dict[str, list[str]]:
    return _by_size([("_".join(sorted(set(q.gold["capability"]))), q.key) for q in questions])


def _by_size(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    count = Counter(name for name, _ in pairs)
    return {name: [key for of, key in pairs if of == name] for name, _ in count.most_common()}


def _table(
    questions: Sequence[Question],
    scores: Mapping[str, Sequence[float]],
    members: Mapping[str, Sequence[str]],
) -> dict[str, float]:
    """The mean over members, then over runs, in percent."""
    return {
        name: float((np.array([scores[k] for k in keys]).sum(0) / len(keys) * 100).mean())
        for name, keys in members.items()
    }


def _rounded(table: Mapping[str, float], decimals: int = _DECIMALS) -> dict[str, float]:
    return {name: float(np.round(value, decimals)) for name, value in table.items()}


def _score(judged: Judged, replies: Replies) -> Scores:
    questions, answers = judged.questions, judged.answers
    layouts.check_prompts(_NAME, questions, answers)
    official = _rule(questions, replies, tolerant=False)
    unread = set(official.details["unread"])
    return Scores(
        headline="official",
        rules={"official": official, "tolerant": _rule(questions, replies, tolerant=True)},
        parsed={key: value for key, value in official.items.items() if key in answers},
        unparsed=[q.key for q in questions if q.key in unread and q.key in answers],
    )


def _write(replies: Replies, out: Path, model_id: str) -> list[Path]:
    """The files of LLaVA's converter and of the evaluator, which goes on from the grade file."""
    questions, answers = replies.plan.judged.questions, replies.plan.judged.answers
    runs, folder = _runs(replies.plan.options), out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    results = layouts.texts(questions, answers)
    grades: dict[str, dict[str, list[Any]]] = {}
    for question in questions:
        keys = [_ask_key(question.key, run) for run in range(runs)]
        done = itertools.takewhile(lambda key: key in replies.by_key, keys)
        said = [replies.by_key[key] for key in done]
        if not said:
            continue
        scores = [_grades(question.key, replies, r, False) for r in range(len(said))]
        grades[question.key] = {
            "model": [of_run[-1].model for of_run in said],
            # The evaluator keeps the first word of a reply that it could read, else all of it.
            "content": [
                of_run[-1].text.split(" ")[0].strip() if read else of_run[-1].text
                for of_run, (_, read) in zip(said, scores, strict=True)
            ],
            "score": [score for score, _ in scores],
        }
    name = f"{model_id}_{replies.plan.model}"
    paths = [folder / f"{model_id}.json", folder / f"{name}-grade-{runs}runs.json"]
    for path, value in zip(paths, (results, grades), strict=True):
        path.write_text(json.dumps(value, indent=4 if value is grades else 2), encoding="utf-8")
    if replies.pending:
        return paths
    details = _rule(questions, replies, tolerant=False).details
    for kind, table in (("cap", "capability"), ("cap-int", "combination")):
        paths.append(folder / f"{name}-{kind}-score-{runs}runs.csv")
        paths[-1].write_text(_csv(model_id, details, details[table]), encoding="utf-8")
    return paths


def _csv(model_id: str, details: Mapping[str, Any], table: Mapping[str, float]) -> str:
    total = {"total": details["unrounded"], "std": details["std"]}
    cells = {**_rounded({**table, **total})}
    each = [float(np.round(value, _DECIMALS)) for value in details["runs"]]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["", *cells, "runs"])
    lines.writerow([model_id, *cells.values(), str(each)])
    return text.getvalue()


_ZIP = "mm-vet.zip of github.com/yuweihao/MM-Vet"
BENCHMARK = Benchmark(
    name=_NAME,
    title="MM-Vet",
    folder="mm-vet",
    files={
        _FILE: _ZIP,
        "images": _ZIP,
        "data/test-*.parquet": "lmms-lab/MMVet on the Hugging Face hub, instead",
    },
    metric="mean of the judge's grades, %",
    paper={
        "LLaVA-1.5 7B": 30.5,
        "LLaVA-Mini 7B": 36.6,
        "LLaVA-Mini 7B HD": 33.9,
        "LLaVA-Mini 8B": 37.2,
    },
    max_new_tokens=128,  # the release's; LLaVA's own script gives 1024
    questions=_questions,
    score=scored_by(_NAME, _score),
    judge=Judge(
        model="gpt-4-0613",
        ours=own_texts.MMVET,
        official=own_texts.MMVET_SHA256,
        source="mm-vet_evaluator.py of github.com/yuweihao/MM-Vet: its prompt and what it adds",
        ladders=_ladders,
        readable=lambda reply: read_official(reply) is not None,
        write=_write,
        options={"runs": 1},
    ),
)
