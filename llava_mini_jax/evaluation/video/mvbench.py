"""MVBench: 20 tasks about short videos, 200 multiple-choice questions each.

    json/TASK.json, video/ --> Questions --> accuracy by task, their mean, table 3's group means

As the release does, whole videos are read: the start and end that five tasks give are not used.
Episodic reasoning has folders of frames for videos, of which all frames are read.

"notebook" is Ask-Anything's, over all questions: the answer's first word is in "(x)", or has it in
itself, so an empty answer is right. "lmms_eval" leaves empty answers out of the denominators.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Rule, Scores
from llava_mini_jax.evaluation.rules.letters import lmms_mvbench
from llava_mini_jax.evaluation.rules.video_tasks import (
    Task,
    from_rows,
    questions,
    right,
    scores,
    task_rule,
)

_VIDEOS = {  # in the release's order
    "Action Sequence": "star/Charades_v1_480",
    "Action Prediction": "star/Charades_v1_480",
    "Action Antonym": "ssv2_video",
    "Fine-grained Action": "Moments_in_Time_Raw/videos",
    "Unexpected Action": "FunQA_test/test",
    "Object Existence": "clevrer/video_validation",
    "Object Interaction": "star/Charades_v1_480",
    "Object Shuffle": "perception/videos",
    "Moving Direction": "clevrer/video_validation",
    "Action Localization": "sta/sta_video",
    "Scene Transition": "scene_qa/video",
    "Action Count": "perception/videos",
    "Moving Count": "clevrer/video_validation",
    "Moving Attribute": "clevrer/video_validation",
    "State Change": "perception/videos",
    "Fine-grained Pose": "nturgbd",
    "Character Order": "perception/videos",
    "Egocentric Navigation": "vlnqa",
    "Episodic Reasoning": "tvqa/frames_fps3_hq",
    "Counterfactual Inference": "clevrer/video_validation",
}
GROUPS = {
    "Action": (
        "Action Sequence",
        "Action Prediction",
        "Action Antonym",
        "Fine-grained Action",
        "Unexpected Action",
    ),
    "Object": ("Object Existence", "Object Interaction", "Object Shuffle"),
    "Position": ("Moving Direction", "Action Localization"),
    "Scene": ("Scene Transition",),
    "Count": ("Action Count", "Moving Count"),
    "Attribute": ("Moving Attribute", "State Change"),
    "Pose": ("Fine-grained Pose",),
    "Character": ("Character Order",),
    "Cognition": ("Egocentric Navigation", "Episodic Reasoning", "Counterfactual Inference"),
}


def _task(title: str, videos: str) -> Task:
    name = title.lower().replace(" ", "_").replace("-", "_")
    return Task(name=name, title=title, file=f"json/{name}.json", videos=f"video/{videos}")


TASKS = tuple(_task(title, videos) for title, videos in _VIDEOS.items())


def notebook(gold: Mapping[str, Any], text: str) -> bool:
    word, option = text.lower().split(" ")[0], f"({gold['letter'].lower()})"
    return word.replace(".", "") in option or option in word


def _lmms(gold: Mapping[str, Any], text: str) -> bool:
    return lmms_mvbench(text) == lmms_mvbench(gold["first_letter"])


def _score(folder: Path, asked: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    by_notebook = right(asked, answers, notebook)
    notebook_rule = task_rule(asked, by_notebook, {}, groups=GROUPS)
    empty = [q.key for q in asked if q.key in answers and not answers[q.key].text]
    return scores(
        BENCHMARK,
        asked,
        answers,
        GROUPS,
        lmms_reads=lmms_mvbench,
        notebook=Rule(
            value=notebook_rule.details["over_all_questions"],
            items=by_notebook,
            scale=100,
            details=notebook_rule.details,
        ),
        lmms_eval=task_rule(
            asked,
            right(asked, answers, _lmms),
            {"left_out": len(empty)},
            left_out=empty,
            groups=GROUPS,
        ),
    )


_SOURCE = "OpenGVLab/MVBench on the Hugging Face hub"
BENCHMARK = Benchmark(
    name="mvbench",
    title="MVBench",
    folder="mvbench",
    files={
        **{task.file: f"{_SOURCE}, json/" for task in TASKS},
        "video": f"{_SOURCE}, video/*.zip",
    },
    metric="mean accuracy of 20 tasks, %",
    paper={"LLaVA-Mini 7B": 44.5},
    max_new_tokens=1024,
    questions=lambda folder: questions(BENCHMARK, folder, TASKS),
    score=_score,
    max_frames=1000,
    from_rows=from_rows,
)
