"""MME: two yes/no questions about each image, one of each answer, in 14 subtasks.

    llava_mme.jsonl ------------------.
    MME_Benchmark_release_version/ ---by image and question---> Questions --> accuracy + accuracy
    or test-*.parquet (brings both) --'          |                 of whole images, by subtask
                                                 '--> SUBTASK.txt, as the official tool reads them

LLaVA's question_id is the image, so it names two questions; the key is image and question. The
official tool pairs lines that follow each other; here an image's two questions are a pair wherever
they stand, and the files that we write keep them together. Of a part of the questions only whole
pairs count, and where a subtask is not in it there is no sum. Tabs and newlines of an answer become
blanks there, since they would break the table.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores, percent

_PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR"
_COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning"
PERCEPTION, COGNITION = _PERCEPTION.split(), _COGNITION.split()
_ASKED = "llava_mme.jsonl"
_TREE = "MME_Benchmark_release_version"
_PLEASE = "Please answer yes or no."


def _questions(folder: Path) -> list[Question]:
    if parquet := layouts.parquet_instead(folder, _ASKED, "test-*.parquet"):
        found = _from_parquet(parquet)
    else:
        found = _from_llava(folder)
    layouts.check_keys("mme", found)
    odd = [name for name, n in Counter(map(_picture, found)).items() if n != 2]
    if odd:
        raise InputError(
            f"mme: {len(odd)} images have not two questions: {layouts.listed(odd)}. Get the files"
            " again."
        )
    return found


def _from_llava(folder: Path) -> list[Question]:
    tree = BENCHMARK.need(folder, _TREE)
    fields = {"question_id": str, "image": str, "text": str}
    found, golds = [], {}
    for row in layouts.read_json_lines(BENCHMARK.need(folder, _ASKED), fields):
        subtask, file = _split(row["image"])
        stem = file.rsplit(".", 1)[0]
        if (subtask, stem) not in golds:
            golds[subtask, stem] = _golds(tree, subtask, stem)
        asked = _bare(row["text"])
        if asked not in golds[subtask, stem]:
            raise InputError(
                f"mme: {tree / subtask} has no answer to {asked!r} about {file}, which {_ASKED}"
                " asks; get both again."
            )
        gold = {"subtask": subtask, "file": f"{stem}.txt", **golds[subtask, stem][asked]}
        found.append(
            Question(
                key=_key(row["question_id"], row["text"]),
                question_id=row["question_id"],
                text=row["text"],
                prompt=row["text"],
                image=tree / row["image"],
                gold=gold,
            )
        )
    return found


def _golds(tree: Path, subtask: str, stem: str) -> dict[str, dict[str, str]]:
    """What an image's text file says: bare question -> the line's question and answer."""
    apart = tree / subtask / "questions_answers_YN" / f"{stem}.txt"
    path = apart if apart.parent.exists() else tree / subtask / f"{stem}.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; get {_TREE} again.") from error
    golds = {}
    for line in filter(str.strip, lines):
        asked, tab, answer = line.partition("\t")
        golds[_bare(asked)] = _gold(asked, answer if tab else "", str(path))
    return golds


def _from_parquet(files: Sequence[Path]) -> list[Question]:
    found = []
    columns = {"question_id": str, "image": bytes, "question": str, "answer": str, "category": str}
    for row in layouts.read_parquet(files, columns):
        subtask, file = _split(row["question_id"])
        place = f"{files[0].parent}, {row['question_id']}"
        if subtask != row["category"]:
            raise InputError(f'{place}: its category is "{row["category"]}"; get the file again.')
        text = _bare(row["question"]) + layouts.SHORT
        gold = {"subtask": subtask, "file": file.rsplit(".", 1)[0] + ".txt"}
        found.append(
            Question(
                key=_key(row["question_id"], text),
                question_id=row["question_id"],
                text=text,
                prompt=text,
                image=row["image"],
                gold=gold | _gold(row["question"], row["answer"], place),
            )
        )
    return found


def _gold(asked: str, answer: str, place: str) -> dict[str, str]:
    if answer.strip().lower() not in ("yes", "no"):
        raise InputError(f'{place}: the answer is {answer!r}; expected "Yes" or "No".')
    gold = answer.strip()
    return {"asked": asked, "written": gold, "answer": gold.lower()}


def _split(name: str) -> tuple[str, str]:
    """The subtask and file of SUBTASK/[images/]FILE."""
    subtask, _, file = name.replace("/images/", "/").partition("/")
    if subtask not in (*PERCEPTION, *COGNITION) or not file:
        raise InputError(f'mme: {name!r} is not "SUBTASK/[images/]FILE" of a known subtask.')
    return subtask, file


def _bare(text: str) -> str:
    return text.removesuffix(layouts.SHORT).replace(_PLEASE, "").strip()


def _key(question_id: str, text: str) -> str:
    return f"{question_id.replace('/images/', '/')}: {_bare(text)}"


def _picture(question: Question) -> str:
    return f"{question.gold['subtask']}/{question.gold['file']}"


def read_official(text: str) -> str:
    """yes or no, whichever its first four characters hold ("know" is no, "eyes" yes); or other."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def read_tolerant(text: str) -> str:
    """lmms-eval's: blanks at the ends and all periods go first; y and n will do."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or read_official(text)


def _rules(
    name: str, read, questions: Sequence[Question], answers: Mapping[str, Output]
) -> dict[str, Rule]:
    of_picture = Counter(map(_picture, questions))
    questions = [q for q in questions if of_picture[_picture(q)] == 2]
    said = {q.key: read(answers[q.key].text) for q in questions if q.key in answers}
    right = {q.key: float(said.get(q.key) == q.gold["answer"]) for q in questions}
    subtasks: dict[str, Any] = {}
    for subtask in (*PERCEPTION, *COGNITION):
        asked = [q for q in questions if q.gold["subtask"] == subtask]
        if not asked:
            continue
        pictures: dict[str, float] = {}
        for question in asked:
            # Of "acc_plus": an image counts if both its questions are answered rightly.
            before = pictures.get(_picture(question), 1.0)
            pictures[_picture(question)] = min(before, right[question.key])
        accuracy = percent([right[q.key] for q in asked])
        whole = percent(pictures.values())
        subtasks[subtask] = {
            "acc": accuracy,
            "acc_plus": whole,
            "score": accuracy + whole,
            "other_num": sum(said.get(q.key, "other") == "other" for q in asked),
            "n": len(asked),
        }
    rules = {}
    for suffix, group in (("", PERCEPTION), ("_cognition", COGNITION)):
        there = {subtask: subtasks[subtask] for subtask in group if subtask in subtasks}
        items = {q.key: right[q.key] for q in questions if q.gold["subtask"] in there}
        missing = sum(key not in answers for key in items)  # count as "other", so as wrong
        parts = {subtask: figures["score"] for subtask, figures in there.items()}
        whole = len(there) == len(group)
        remark = f"no sum: this part of the questions has {len(there)} of {len(group)} subtasks"
        rules[name + suffix] = Rule(
            value=sum(parts.values()) if whole else math.nan,
            items=items,
            scale=None,
            details={
                "subtasks": there,
                "missing": missing,
                "parts": parts,
                **({} if whole else {"remark": remark}),
            },
        )
    return rules


def _score(folder: Path, questions: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    parsed = {q.key: read_official(answers[q.key].text) for q in questions if q.key in answers}
    return Scores(
        headline="official",
        rules={
            **_rules("official", read_official, questions, answers),
            **_rules("lmms_eval", read_tolerant, questions, answers),
        },
        parsed=parsed,
        unparsed=[key for key, said in parsed.items() if said == "other"],
    )


def _submission(
    folder: Path, questions: Sequence[Question], answers: Mapping[str, Output], out: Path
) -> list[Path]:
    """SUBTASK.txt for the official tool: file, question, gold, answer, an image's two together."""
    layouts.check_all_answered("mme", questions, answers)
    out.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, list[Question]] = {}
    for question in questions:
        pictures.setdefault(_picture(question), []).append(question)
    lines: dict[str, list[str]] = {}
    for pair in pictures.values():
        for question in pair:
            gold = question.gold
            said = " ".join(answers[question.key].text.replace("\t", " ").splitlines())
            line = "\t".join((gold["file"], gold["asked"], gold["written"], said))
            lines.setdefault(gold["subtask"], []).append(line + "\n")
    for subtask, written in lines.items():
        (out / f"{subtask}.txt").write_text("".join(written), encoding="utf-8")
    return [out / f"{subtask}.txt" for subtask in lines]


BENCHMARK = Benchmark(
    name="mme",
    title="MME (perception)",
    folder="MME",
    files={
        _ASKED: "LLaVA's eval.zip (docs/Evaluation.md of github.com/haotian-liu/LLaVA)",
        _TREE: "MME's authors (BradyFU/Awesome-Multimodal-Large-Language-Models)",
        "test-*.parquet": "lmms-lab/MME on the Hugging Face hub, instead of all these",
    },
    metric="perception score, at most 2000",
    paper={
        "LLaVA-1.5 7B": 1510.7,
        "LLaVA-Mini 7B": 1466.0,
        "LLaVA-Mini 7B HD": 1476.8,
        "LLaVA-Mini 8B": 1522.7,
    },
    max_new_tokens=128,
    questions=_questions,
    score=_score,
    key_of=lambda line: _key(str(line.get("question_id")), str(line.get("prompt", ""))),
    submission=_submission,
)
