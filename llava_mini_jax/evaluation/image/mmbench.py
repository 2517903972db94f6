"""MMBench, dev: one question with its options turned round, pass after pass; all must be right.

    mmbench_dev_20230712.tsv   --.                               .--> circular accuracy
    or en/dev-*.parquet        --+-- a row is a pass --> Questions --> mmbench.xlsx
    (Chinese: .._dev_cn_20231003.tsv, cn/dev-*.parquet)

Row n + 1,000,000 is question n with its options one place further. A question counts if its passes
are all right: by the letter that stands alone in the headline, by VLMEvalKit's extractor and no
judge in "circular", by that tool's static evaluation in "lmms_eval". "vanilla" looks at the first
passes only, as "circular" does. The paper's figures are the server's, whose extractor is a language
model.

Of a part of the rows all but "vanilla" count the questions that it has all passes of.

LLaVA reads the table with pandas, to which a cell "None", "NA" or "nan" is empty: its prompts end
at the first such option, and so do these. The parquet files write "nan" into empty cells.
"""

import base64
import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts, xlsx
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores, percent
from llava_mini_jax.evaluation.rules.letters import lmms_letter, lmms_prefetch, vlmevalkit
from llava_mini_jax.evaluation.rules.lone_letter import lone_letter

_PASS = 1_000_000
_FIELDS = {"index": int, "question": str, "answer": str, "category": str, "image": bytes}
_ABILITY = ("l2-category", "L2-category")
_SHORT = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "attribute_reasoning": "AR",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
}
# What pandas takes for an empty cell of a text file.
_WORDS = "NaN nan -NaN -nan NULL null None N/A n/a NA <NA> #NA #N/A 1.#IND -1.#IND 1.#QNAN -1.#QNAN"
_EMPTY = {"", "#N/A N/A", *_WORDS.split()}


def _empty(cell: str | None) -> bool:
    return cell is None or cell in _EMPTY


def _ends_options(cell: str | None) -> bool:
    """LLaVA's own check, after pandas'."""
    return cell is None or cell in _EMPTY or cell.lower() in ("nan", "none")


def _questions(chinese: bool, folder: Path) -> list[Question]:
    benchmark = BENCHMARKS[chinese]  # False is 0, the English one
    table = next(iter(benchmark.files))
    if parquet := layouts.parquet_instead(folder, table, f"{_language(chinese)}/dev-*.parquet"):
        place = str(parquet[0].parent)
        rows = layouts.read_parquet(parquet, _FIELDS, ("hint", *"ABCD", *_ABILITY, "split"))
    else:
        path = benchmark.need(folder, table)
        place, rows = str(path), _read_table(path)
    instruction = "\n请直接回答选项字母。" if chinese else layouts.LETTER
    for row in rows:
        if row["answer"] not in tuple("ABCD"):
            raise InputError(
                f"{place}: the answer of row {row['index']} is {row['answer']!r}; expected A to D,"
                " as in the dev split. Get the file again."
            )
    passes = Counter(row["index"] % _PASS for row in rows)
    found = [_question(row, instruction, passes[row["index"] % _PASS]) for row in rows]
    layouts.check_keys(benchmark.name, found)
    there = {question.question_id for question in found}
    if strange := [q.key for q in found if int(q.question_id) % _PASS not in there]:
        raise InputError(
            f"{place}: {len(strange)} rows are passes of a missing question:"
            f" {layouts.listed(strange)}. Get the file again."
        )
    return found


def _question(row: Mapping[str, Any], instruction: str, passes: int) -> Question:
    options = []
    for letter in "ABCD":
        if _ends_options(row.get(letter)):
            break
        options.append(row[letter])
    hint = "" if _ends_options(row.get("hint")) else f"{row['hint']}\n"
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
    prompt = hint + "\n".join([row["question"], *lines])
    ability = row.get(_ABILITY[0]) or row.get(_ABILITY[1]) or ""
    return Question(
        key=str(row["index"]),
        question_id=row["index"],
        text=prompt + instruction,
        prompt=prompt,
        image=row["image"],
        record={"round_id": 0, "options": options, "option_char": list("ABCD"[: len(options)])},
        gold={
            "letter": row["answer"],
            "options": {letter: row.get(letter) for letter in "ABCD"},
            "question": row["question"],
            "category": row["category"],
            "ability": _SHORT.get(ability, ability or "other"),
            "split": row.get("split") or "",
            "passes": passes,  # of its question, in the whole table
        },
    )


def _read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of the table with images decoded; equal images are held once."""
    before = csv.field_size_limit(2**31 - 1)  # images are longer than csv allows by itself
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"Cannot read {path}: {error}; copy or download it again.") from error
    finally:
        csv.field_size_limit(before)
    held: dict[str, bytes] = {}
    cells = {row.get("index"): row.get("image") for row in rows}
    for number, row in enumerate(rows, 1):
        place = f"{path}, row {number}"
        layouts.check_fields(row, dict.fromkeys([*_FIELDS, *"ABCD"], str), place)
        if not row["index"].isdecimal():
            raise InputError(f"{place}: the index is {row['index']!r}; expected a number.")
        cell = row["image"]
        if cell.isdecimal() and cell in cells:  # VLMEvalKit's tables name another row's image
            cell = cells[cell] or ""
        if cell not in held:
            held[cell] = _picture(cell, f"{place} ({row['index']})")
        # An empty cell is "nan" in the parquet files; lmms-eval counts that as an option.
        filled = {name: value or "nan" for name, value in row.items() if name in tuple("ABCD")}
        row |= {**filled, "index": int(row["index"]), "image": held[cell]}
    return rows


def _picture(cell: str, place: str) -> bytes:
    try:
        content = base64.b64decode(cell, validate=True)
    except ValueError as error:
        raise InputError(f"{place}: the image is not base64 ({error}); get it again.") from error
    if not content:
        raise InputError(f"{place}: there is no image; get the file again.")
    return content


def read_vlmevalkit(gold: Mapping[str, Any], text: str) -> str:
    """A letter of the options that pandas sees, "Z" for a refusal, "" for none."""
    return vlmevalkit(text, {x: o for x, o in gold["options"].items() if not _empty(o)})


def _read_letter(gold: Mapping[str, Any], text: str) -> str:
    return lone_letter(text, "ABCD")  # an option "None", empty to pandas, can be right


def read_lmms(gold: Mapping[str, Any], text: str) -> str:
    choices = {letter: option for letter, option in gold["options"].items() if option is not None}
    text = text.strip()
    return lmms_prefetch(text, choices) or lmms_letter(text, "".join(choices) or "ABCDEFGH")


def _by_question(
    questions: Sequence[Question], said: Mapping[str, str], first_only: bool = False
) -> Rule:
    """Questions of which all passes (or the first one) are right; by ability and by category."""
    passes: dict[str, list[Question]] = {}
    for question in questions:
        passes.setdefault(str(int(question.question_id) % _PASS), []).append(question)
    items: dict[str, float] = {}
    kinds: dict[str, dict[str, list[float]]] = {"parts": {}, "categories": {}}
    for key, own in passes.items():
        if first_only:
            own = [question for question in own if question.key == key]
        if own and (first_only or len(own) == own[0].gold["passes"]):
            items[key] = float(all(said.get(q.key) == q.gold["letter"] for q in own))
            for kind, name in (("parts", "ability"), ("categories", "category")):
                kinds[kind].setdefault(own[0].gold[name], []).append(items[key])
    details = {kind: {n: percent(v) for n, v in sorted(k.items())} for kind, k in kinds.items()}
    missing = sum(q.key not in said for q in questions)
    remarks = {}
    if left_out := len(passes) - len(items):
        why = "this part of the rows lacks some of their passes"
        remarks["remark"] = f"{left_out} questions are left out: {why}"
    counts = {"questions": len(items), "rows": len(questions), "missing": missing}
    return Rule.mean_of(items, {**details, **counts, **remarks})


def _said(
    questions: Sequence[Question],
    answers: Mapping[str, Output],
    read: Callable[[Mapping[str, Any], str], str],
) -> dict[str, str]:
    return {q.key: read(q.gold, answers[q.key].text) for q in questions if q.key in answers}


def _score(folder: Path, questions: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    layouts.check_prompts("mmbench", questions, answers)
    parsed, vlmevalkit_said, lmms = (
        _said(questions, answers, read) for read in (_read_letter, read_vlmevalkit, read_lmms)
    )
    return Scores(
        headline="letter",
        rules={
            "letter": _by_question(questions, parsed),
            "circular": _by_question(questions, vlmevalkit_said),
            "vanilla": _by_question(questions, vlmevalkit_said, first_only=True),
            "lmms_eval": _by_question(questions, lmms),
        },
        parsed=parsed,
        unparsed=[key for key, letter in parsed.items() if not letter],
        readings={"letter": parsed, "circular": vlmevalkit_said, "lmms_eval": lmms},
    )


def _submission(
    chinese: bool,
    folder: Path,
    questions: Sequence[Question],
    answers: Mapping[str, Output],
    out: Path,
) -> list[Path]:
    """The sheet that LLaVA uploads: the table without its images, with the raw answers."""
    name = BENCHMARKS[chinese].name
    layouts.check_all_answered(name, questions, answers)
    rows: list[list[str | int]] = [["index", "question", *"ABCD", "prediction", "answer", "split"]]
    for question in questions:
        gold, options = question.gold, question.gold["options"].values()
        rows.append(
            [
                question.question_id,
                gold["question"],
                *("" if _empty(option) else option for option in options),
                answers[question.key].text,
                gold["letter"],
                gold["split"],
            ]
        )
    return [xlsx.write(out / f"{name}.xlsx", rows)]


def _language(chinese: bool) -> str:
    return "cn" if chinese else "en"


def _benchmark(
    name: str, title: str, table: str, *, chinese: bool, paper: Mapping[str, float]
) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        folder="mmbench",
        files={
            table: f"download.openmmlab.com/mmclassification/datasets/mmbench/{table}",
            f"{_language(chinese)}/dev-*.parquet": "lmms-lab/MMBench on Hugging Face, instead",
        },
        metric="circular accuracy by rules, %",
        paper=paper,
        max_new_tokens=1024,
        questions=partial(_questions, chinese),
        score=_score,
        submission=partial(_submission, chinese),
    )


BENCHMARKS = [
    _benchmark(
        "mmbench",
        "MMBench",
        "mmbench_dev_20230712.tsv",
        chinese=False,
        paper={
            "LLaVA-1.5 7B": 64.3,
            "LLaVA-Mini 7B": 65.6,
            "LLaVA-Mini 7B HD": 67.5,
            "LLaVA-Mini 8B": 71.6,
        },
    ),
    _benchmark("mmbench_cn", "MMBench-CN", "mmbench_dev_cn_20231003.tsv", chinese=True, paper={}),
]
