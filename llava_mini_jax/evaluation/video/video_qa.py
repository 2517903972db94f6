"""MSVD-QA, MSRVTT-QA and ActivityNet-QA: short answers about videos, yes or no by a judge.

    test_q.json + test_a.json --line by line--.
    instruction.txt, where there is one ------+--> Questions --judge: {'pred': 'yes', 'score': 4}-->
    videos/NAME.mp4 --------------------------'        yes / (yes + no), mean score; results.json

How a question is put matters for the score. Video-ChatGPT asks the bare question. LLaVA-Mini's
release puts an instruction before it, with examples of whole sentences; put that text, byte for
byte, in the folder as instruction.txt to ask as the release does. Our answers record which it was,
and scores say so.

The official figures leave out questions without an answer (their videos were not found), replies
that never parse (ten rounds) and verdicts that are neither yes nor no. "all questions" counts each
of them as wrong, with score 0; "tolerant" does so too and reads more of the replies.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava_mini_jax.data.media.video_names import OFFICIAL_SUFFIXES, find_video
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores
from llava_mini_jax.evaluation.judge import own_texts
from llava_mini_jax.evaluation.judge.judging import Judge, Judged, Ladder, Replies, scored_by
from llava_mini_jax.evaluation.judge.video_verdict import (
    YesNoScore,
    is_literal,
    mean_score,
    read_official,
    read_tolerant,
    write_result,
)
from llava_mini_jax.evaluation.judge.wording import fill, messages

_INSTRUCTION = "instruction.txt"
# First digits of the SHA-256 of the release's instructions.
_RELEASE = ("a7a402f3dc37", "5d8ad6d1b80f")
_ROUNDS = 10
_NONE = YesNoScore()


def _questions(name: str, folder: Path) -> list[Question]:
    benchmark = next(b for b in BENCHMARKS if b.name == name)
    paths = [benchmark.need(folder, file) for file in ("test_q.json", "test_a.json")]
    asked, golds = map(layouts.read_list, paths)
    if len(asked) != len(golds):
        raise InputError(
            f"{paths[0]} has {len(asked)} questions, {paths[1]} has {len(golds)} answers; use files"
            " of the same version"
        )
    before = _instruction(folder)
    style = _style(before)
    places = [folder / part for part in ("videos", "test_videos", "videos/all", "all_test")]
    videos: dict[str, Path] = {}
    found = []
    for number, (row, gold) in enumerate(zip(asked, golds, strict=True), 1):
        layouts.check_fields(row, {"video_name": str, "question": str}, f"{paths[0]}, {number}")
        layouts.check_fields(gold, {"answer": str}, f"{paths[1]}, {number}")
        key = str(row.get("question_id", ""))
        if not key or key != str(gold.get("question_id")):
            raise InputError(
                f"{paths[0]} and {paths[1]} differ in item {number}: {key} and"
                f" {gold.get('question_id')}; use files of the same version"
            )
        if (video := row["video_name"]) not in videos:
            # ActivityNet's files have "v_" before their names.
            stems = (video, f"v_{video}")
            videos[video] = find_video(places, stems, (*OFFICIAL_SUFFIXES, ""))
        found.append(
            Question(
                key=key,
                question_id=row["question_id"],
                text=before + row["question"],
                prompt=row["question"],
                video=videos[video],
                record={"asked_with": style},
                gold={"question": row["question"], "answer": gold["answer"]},
            )
        )
    return layouts.check_keys(name, found)


def _instruction(folder: Path) -> str:
    path = folder / _INSTRUCTION
    try:
        return path.read_bytes().decode() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the instruction {path} cannot be read: {error}") from error


def _style(instruction: str) -> str:
    if not instruction:
        return "bare question"
    digest = hashlib.sha256(instruction.encode()).hexdigest()
    return "the release's instruction" if digest[:12] in _RELEASE else f"instruction {digest[:12]}"


def _ladders(judged: Judged, texts: Mapping[str, str], options: Mapping[str, Any]) -> list[Ladder]:
    """Ten times the same request an item; the release's temperature is 0, the original's unset."""
    layouts.check_prompts("video QA", judged.questions, judged.answers)
    found = []
    for question in judged.questions:
        if question.key in judged.answers:
            user = fill(texts["user"], pred=judged.answers[question.key].text, **question.gold)
            body = {
                "messages": messages(user, texts["system"]),
                "temperature": options["temperature"],
            }
            found.append(Ladder(question.key, [body] * _ROUNDS))
    return found


def _rule(
    verdicts: Mapping[str, YesNoScore],
    counted: Sequence[str],
    replies: Replies,
    more: Mapping[str, Any],
) -> Rule:
    """`counted` keys make the accuracy; all verdicts make the mean score."""
    yes = sum(verdicts[key].right is True for key in counted)
    score = replies.value(mean_score(list(verdicts.values())))
    return Rule(
        value=replies.value(100 * yes / len(counted) if counted else math.nan),
        items={key: float(verdicts[key].right is True) for key in counted},
        scale=100,
        details={
            "parts": {"mean score, of 5": score},
            "yes_count": yes,
            "no_count": len(counted) - yes,
            "average_score": score,
            "judged": len(verdicts),
            "without a score": [key for key, v in verdicts.items() if v.score is None],
            **more,
            "judge": replies.about(),
        },
    )


def _score(judged: Judged, replies: Replies) -> Scores:
    questions, answers = judged.questions, judged.answers
    layouts.check_prompts("video QA", questions, answers)
    said = {q.key: text for q in questions if (text := replies.final(q.key)) is not None}
    official = {key: v for key, text in said.items() if (v := read_official(text)) is not None}
    never = [key for key in said if key not in official]
    keys = [question.key for question in questions]
    styles = {str(answer.line.get("asked_with", "not recorded")) for answer in answers.values()}
    more = {
        "asked with": ", ".join(sorted(styles)),
        "no answer": [key for key in keys if key not in answers],
        "never judged": never,
    }
    whole = {key: official.get(key, _NONE) for key in keys}
    tolerant = {key: read_tolerant(replies.by_key.get(key, ())) for key in keys}
    said_either = [key for key, verdict in official.items() if verdict.right is not None]
    return Scores(
        headline="official",
        rules={
            "official": _rule(official, said_either, replies, more),
            "all questions": _rule(whole, keys, replies, more),
            "tolerant": _rule(tolerant, keys, replies, more),
        },
        parsed={key: {"right": v.right, "score": v.score} for key, v in official.items()},
        unparsed=[key for key in said if key in never or official[key].right is None],
    )


def _write(replies: Replies, out: Path, model_id: str) -> list[Path]:
    """Combined verdicts, in the form of the official results.json."""
    rows, answers = {}, replies.plan.judged.answers
    for question in replies.plan.judged.questions:
        if question.key in answers:
            gold, pred = question.gold, answers[question.key].text
            asked = {"q": gold["question"], "a": gold["answer"], "pred": pred}
            rows[question.key] = (replies.final(question.key), asked)
    return [write_result(out / "results.json", rows)]


def _submission(
    folder: Path, questions: Sequence[Question], answers: Mapping[str, Output], out: Path
) -> list[Path]:
    """Predictions as the release writes them and its judge script reads them."""
    layouts.check_all_answered("video QA", questions, answers)
    rows = [{"id": q.question_id, **q.gold, "pred": answers[q.key].text} for q in questions]
    return [layouts.write_json_lines(out / "merge.jsonl", rows)]


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the release, {"id", "question", "answer", "pred"}, as lines of an answers file."""
    return [
        {"question_id": row["id"], "prompt": row.get("question", ""), "text": row["pred"]}
        if "pred" in row and "id" in row
        else dict(row)
        for row in rows
    ]


_PACKAGE = "Video-LLaVA's evaluation data (github.com/PKU-YuanGroup/Video-LLaVA, EVAL.md)"
_RELEASE_TEXT = (
    "LLaVA-Mini's release, if its way of asking is wanted (github.com/ictnlp/LLaVA-Mini)"
)


def _benchmark(name: str, title: str, folder: str, paper: float) -> Benchmark:
    questions: Callable[[Path], list[Question]] = partial(_questions, name)
    return Benchmark(
        name=name,
        title=title,
        folder=f"GPT_Zero_Shot_QA/{folder}",
        files={
            "test_q.json": _PACKAGE,
            "test_a.json": _PACKAGE,
            "videos": _PACKAGE,
            _INSTRUCTION: _RELEASE_TEXT,
        },
        metric="judge's yes of yes and no, %",
        # Table 2 does not name the language model; Table 1's image and video variant is the 8B.
        paper={"LLaVA-Mini 8B": paper},
        max_new_tokens=1024,
        questions=questions,
        score=scored_by("video QA", _score),
        submission=_submission,
        from_rows=_from_rows,
        judge=Judge(
            model="gpt-3.5-turbo",
            ours=own_texts.VIDEO_QA,
            official=own_texts.VIDEO_QA_SHA256,
            source="eval_video_qa.py of github.com/ictnlp/LLaVA-Mini, or of Video-ChatGPT",
            ladders=_ladders,
            readable=is_literal,
            write=_write,
            options={"temperature": 0.0},
        ),
    )


BENCHMARKS = [
    _benchmark("msvd_qa", "MSVD-QA", "MSVD_Zero_Shot_QA", 70.9),
    _benchmark("msrvtt_qa", "MSRVTT-QA", "MSRVTT_Zero_Shot_QA", 59.5),
    _benchmark("activitynet_qa", "ActivityNet-QA", "ActivityNet_Zero_Shot_QA", 53.5),
]
