"""Video-ChatGPT's generative benchmark: free answers about videos, graded 0 to 5 in five respects.

    Benchmarking_QA/generic_qa.json -----> correctness, detail, contextual -.
                    temporal_qa.json ----> temporal ------------------------+--> their mean of means
                    consistency_qa.json -> consistency (Q1 and Q2) ---------'
    Test_Videos/NAME.mp4                   '--> DIMENSION_results.json

Official: a score is cut to a whole number, a reply that is no Python literal is asked for again
(for ever in the scripts, ten times here), and questions without an answer leave the means. "all
questions" and "tolerant" leave nothing out: what is not there has score 0.

The release shows the judge of consistency Q1 twice and Q2 never; Video-ChatGPT's own script once
sent both. The judge's option `second_question` True sends both.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.data.media.video_names import OFFICIAL_SUFFIXES, find_video
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

_NAME = "video_chatgpt"
DIMENSIONS = {  # which questions each is judged by
    "correctness": "generic",
    "detail": "generic",
    "contextual": "generic",
    "temporal": "temporal",
    "consistency": "consistency",
}
_SETS = ("generic", "temporal", "consistency")
_ROUNDS = 10
_NONE = YesNoScore()


def _questions(folder: Path) -> list[Question]:
    found: list[Question] = []
    videos: dict[str, Path] = {}
    asked_before: Counter[str] = Counter()
    for kind in _SETS:
        path = BENCHMARK.need(folder, f"Benchmarking_QA/{kind}_qa.json")
        rows = layouts.read_list(path)
        names = ("Q1", "Q2") if kind == "consistency" else ("Q",)
        of_video: Counter[str] = Counter()
        for number, row in enumerate(rows, 1):
            fields: dict[str, type] = dict.fromkeys((*names, "A", "video_name"), str)
            layouts.check_fields(row, fields, f"{path}, item {number}")
            video = row["video_name"]
            item = f"{kind}/{video}_{of_video[video]}"
            of_video[video] += 1
            if video not in videos:
                stems = (video, f"v_{video}")  # as ActivityNet, whose videos these are, names them
                ends = (*OFFICIAL_SUFFIXES, "")
                videos[video] = find_video([folder / "Test_Videos"], stems, ends)
            for name in names:
                found.append(
                    Question(
                        key=item if name == "Q" else f"{item}/{name}",
                        question_id=_numbered(_id(video, row[name]), asked_before),
                        text=row[name],
                        prompt=row[name],
                        video=videos[video],
                        gold={"set": kind, "item": item, "name": name, "row": row},
                    )
                )
    return layouts.check_keys(_NAME, found)


def _id(video: str, question: str) -> str:
    """The release's rows have no id; a video's name and the question name an answer."""
    return f"{video}: {question}"


def _numbered(name: str, before: Counter[str]) -> str:
    before[name] += 1
    return name if before[name] == 1 else f"{name} ({before[name]})"


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the release, Q and pred or Q1, Q2, pred1 and pred2, as lines of an answers file.

    Of all three files together, or of some, in the order generic, temporal, consistency.
    """
    lines, before = [], Counter()
    for row in rows:
        pairs = [("Q", "pred")] if "Q" in row else [("Q1", "pred1"), ("Q2", "pred2")]
        if not all(name in row for pair in pairs for name in pair):
            lines.append(dict(row))
            continue
        for asked, pred in pairs:
            name = _numbered(_id(row["video_name"], row[asked]), before)
            lines.append({"question_id": name, "prompt": row[asked], "text": row[pred]})
    return lines


def _items(
    kind: str, questions: Sequence[Question], answers: Mapping[str, Output]
) -> list[tuple[str, Mapping[str, str], tuple[str, ...] | None]]:
    """(key, row, answers) of the items of a set, in order; None where one of them is missing.

    A part of the questions may end between the two of an item of consistency: that is none.
    """
    count = 2 if kind == "consistency" else 1
    members: dict[str, list[Question]] = {}
    for question in questions:
        if question.gold["set"] == kind:
            members.setdefault(question.gold["item"], []).append(question)
    found = []
    for item, own in members.items():
        if len(own) == count:
            texts = tuple(answers[q.key].text for q in own if q.key in answers)
            found.append((item, own[0].gold["row"], texts if len(texts) == count else None))
    return found


def _asked(
    row: Mapping[str, str], texts: tuple[str, ...], options: Mapping[str, Any]
) -> dict[str, str]:
    """What the judge is shown, by the names that the official result files use."""
    if len(texts) == 1:
        return {"q": row["Q"], "a": row["A"], "pred": texts[0]}
    second = row["Q2"] if options["second_question"] else row["Q1"]
    return {"q1": row["Q1"], "q2": second, "a": row["A"], "pred1": texts[0], "pred2": texts[1]}


_PLACES = {"q": "question", "q1": "question1", "q2": "question2", "a": "answer"}


def _ladders(judged: Judged, texts: Mapping[str, str], options: Mapping[str, Any]) -> list[Ladder]:
    found = []
    for dimension, kind in DIMENSIONS.items():
        for item, row, given in _items(kind, judged.questions, judged.answers):
            if given is not None:
                asked = _asked(row, given, options)
                values = {_PLACES.get(name, name): text for name, text in asked.items()}
                user = fill(texts[f"{dimension}.user"], **values)
                body = {"messages": messages(user, texts[f"{dimension}.system"])}
                found.append(Ladder(f"{dimension}/{item}", [body] * _ROUNDS))
    return found


def _rule(
    questions: Sequence[Question],
    answers: Mapping[str, Output],
    replies: Replies,
    read: Callable[[str], YesNoScore | None],
) -> Rule:
    """`read` gives the verdict of an ask, None to leave it out."""
    means, counts, items = {}, {}, {}
    no_score: list[str] = []
    for dimension, kind in DIMENSIONS.items():
        keys = [f"{dimension}/{item}" for item, _, _ in _items(kind, questions, answers)]
        verdicts = {key: v for key in keys if (v := read(key)) is not None}
        if keys:
            means[dimension] = mean_score(list(verdicts.values()))
            counts[dimension] = {
                "average_score": replies.value(means[dimension]),
                "n": len(verdicts),
                "left out": len(keys) - len(verdicts),
            }
        items |= {key: float(v.score or 0) for key, v in verdicts.items()}
        no_score += [key for key, v in verdicts.items() if v.score is None]
    return Rule(
        value=replies.value(sum(means.values()) / len(means) if means else math.nan),
        items=items,
        scale=None,  # five means, of sets of different sizes
        details={
            "parts": {name: replies.value(mean) for name, mean in means.items()},
            **counts,
            "without a score": no_score,
            "judge": replies.about(),
        },
    )


def _score(judged: Judged, replies: Replies) -> Scores:
    questions, answers = judged.questions, judged.answers

    def official(key: str) -> YesNoScore | None:
        text = replies.final(key)
        return None if text is None else read_official(text)

    def tolerant(key: str) -> YesNoScore:
        return read_tolerant(replies.by_key.get(key, ()))

    rules = {
        "official": _rule(questions, answers, replies, official),
        "all questions": _rule(questions, answers, replies, lambda key: official(key) or _NONE),
        "tolerant": _rule(questions, answers, replies, tolerant),
    }
    parsed: dict[str, dict[str, float | None]] = {}  # of questions, by dimension
    for question in questions:
        for dimension, kind in DIMENSIONS.items():
            if kind == question.gold["set"]:
                verdict = official(f"{dimension}/{question.gold['item']}")
                if verdict is not None:
                    parsed.setdefault(question.key, {})[dimension] = verdict.score
    unread = [
        ask.key for ask in replies.plan.asks if ask.key in replies.by_key and not official(ask.key)
    ]
    return Scores(headline="official", rules=rules, parsed=parsed, unparsed=unread)


def _write(replies: Replies, out: Path, model_id: str) -> list[Path]:
    """Each dimension's verdicts as the scripts combine them.

    Their keys count a video's answered items, so one without an answer moves those after it up.
    """
    paths, judged = [], replies.plan.judged
    for dimension, kind in DIMENSIONS.items():
        rows, of_video = {}, Counter()
        for item, row, given in _items(kind, judged.questions, judged.answers):
            if given is not None:
                key = f"{row['video_name']}_{of_video[row['video_name']]}"
                of_video[row["video_name"]] += 1
                asked = _asked(row, given, replies.plan.options)
                rows[key] = (replies.final(f"{dimension}/{item}"), asked)
        paths.append(write_result(out / f"{dimension}_results.json", rows))
    return paths


def _submission(
    folder: Path, questions: Sequence[Question], answers: Mapping[str, Output], out: Path
) -> list[Path]:
    """Predictions as the release writes them and the judge scripts read them."""
    layouts.check_all_answered(_NAME, questions, answers)
    paths = []
    for kind in _SETS:
        names = ("pred1", "pred2") if kind == "consistency" else ("pred",)
        rows = [
            {**row, **dict(zip(names, given, strict=True))}
            for _, row, given in _items(kind, questions, answers)
            if given is not None
        ]
        paths.append(layouts.write_json_lines(out / f"{kind}_qa.jsonl", rows))
    return paths


_DATA = "the quantitative evaluation of github.com/mbzuai-oryx/Video-ChatGPT"
BENCHMARK = Benchmark(
    name=_NAME,
    title="Video-ChatGPT generative",
    folder="video_chatgpt_generative",
    files={**{f"Benchmarking_QA/{kind}_qa.json": _DATA for kind in _SETS}, "Test_Videos": _DATA},
    metric="mean of five mean grades, of 5",
    # Table 2 does not name the language model; Table 1's image and video variant is the 8B.
    paper={"LLaVA-Mini 8B": 2.94},
    max_new_tokens=1024,
    questions=_questions,
    score=scored_by(_NAME, _score),
    submission=_submission,
    from_rows=_from_rows,
    judge=Judge(
        model="gpt-3.5-turbo",
        ours=own_texts.VIDEO_CHATGPT,
        official=own_texts.VIDEO_CHATGPT_SHA256,
        source="evaluate_benchmark_1 to _5 of github.com/mbzuai-oryx/Video-ChatGPT",
        ladders=_ladders,
        readable=is_literal,
        write=_write,
        options={"second_question": False},
    ),
)
