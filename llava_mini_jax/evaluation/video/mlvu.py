"""MLVU, dev: seven multiple-choice tasks about long videos (minutes to hours).

    json/N_TASK.json, video/N_TASK/  --> Questions --> accuracy by task, their mean

"release_option" is also MLVU's own check (choice_bench), so its value is the official one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Scores
from llava_mini_jax.evaluation.rules.letters import lmms_letter
from llava_mini_jax.evaluation.rules.video_tasks import (
    Task,
    from_rows,
    questions,
    right,
    scores,
    task_rule,
)

_FILES = {  # in the release's order, with the paper's columns
    "4_count": "AC",
    "3_ego": "ER",
    "2_needle": "NQA",
    "5_order": "AO",
    "1_plotQA": "PQA",
    "6_anomaly_reco": "AR",
    "7_topic_reasoning": "TR",
}
TASKS = tuple(
    Task(name=file.split("_", 1)[1], title=title, file=f"json/{file}.json", videos=f"video/{file}")
    for file, title in _FILES.items()
)


def _lmms(gold: Mapping[str, Any], text: str) -> bool:
    return lmms_letter(text) == gold["first_letter"]


def _score(folder: Path, asked: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    lmms = task_rule(asked, right(asked, answers, _lmms), {})
    return scores(BENCHMARK, asked, answers, lmms_reads=lmms_letter, lmms_eval=lmms)


_SOURCE = "MLVU/MVLU on the Hugging Face hub"
BENCHMARK = Benchmark(
    name="mlvu",
    title="MLVU dev",
    folder="mlvu",
    files={**{task.file: f"{_SOURCE}, json/" for task in TASKS}, "video": f"{_SOURCE}, video/"},
    metric="mean accuracy of 7 tasks, %",
    paper={"LLaVA-Mini 7B": 42.8},
    max_new_tokens=1024,
    questions=lambda folder: questions(BENCHMARK, folder, TASKS),
    score=_score,
    max_frames=1000,
    from_rows=from_rows,
)
