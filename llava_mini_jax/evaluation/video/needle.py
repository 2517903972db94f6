"""One page among up to 1,000 differs: does a model trained on short clips find it in long ones?

    held-out pages --1,000 to a video--> its parts of 8, 16, .. 1,000 pages around the odd page
                                              |
            Questions --exact match--> Scores by frames --> needle.png, and needle.csv of several

It needs no data: the pages are drawn when they are asked for, the same ones each time. An item is
one video; a part of it has the odd page at the same depth (the share of pages before it) as the
whole has, so that items differ between lengths in nothing but the pages around the needle.

What eval.py wrote about several models in one figure, with the lengths that they were trained on:

    llava-mini analyze needle OUT
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Benchmark, Output, Question, Scores
from llava_mini_jax.evaluation.rules import exact_match

FRAMES = (8, 16, 32, 64, 128, 256, 512, 1000)
CHANCE = 10.0  # %, of ten digits
SEED = 2501_03895
EACH = 100  # questions of a length


def _questions(folder: Path) -> list[Question]:
    """Item by item, so that the first ones of any number have all lengths."""
    del folder
    longest = FRAMES[-1]
    config = DigitsConfig(split="heldout", kinds=("needle",), frames=longest, seed=SEED)
    videos, found = DigitsPages(config, EACH), []
    for number in range(EACH):
        item, place = videos[number], videos.odd_page(number)
        assert "frames" in item
        human, gpt = (turn["value"] for turn in item["conversations"])
        text = human.removeprefix("<image>").strip()
        for frames in FRAMES:
            start = place * (longest - frames) // (longest - 1)
            key = f"{frames}-{number}"
            part = item["frames"][start : start + frames]  # a view: the pages are held once
            found.append(
                Question(key=key, question_id=key, text=text, prompt=text, video=part, gold=gpt)
            )
    return found


def _score(folder: Path, questions: Sequence[Question], answers: Mapping[str, Output]) -> Scores:
    del folder
    return exact_match.score(
        questions, answers, lambda question: _part(int(question.key.split("-")[0]))
    )


def _part(frames: int) -> str:
    return f"{frames} frames"


class Point(NamedTuple):
    frames: int
    percent: float  # of right answers
    count: int  # of questions

    @property
    def error(self) -> float:
        """The standard error of `percent`."""
        return (self.percent * (100 - self.percent) / self.count) ** 0.5


class Curve(NamedTuple):
    label: str
    points: Sequence[Point]
    trained: tuple[int, int] | None  # fewest and most frames of a training clip, if known


def points_of(details: Mapping[str, Any]) -> list[Point]:
    """The points of a curve from the details of this benchmark's rule."""
    parts, counts = details["parts"], details["questions"]
    names = {frames: _part(frames) for frames in FRAMES if _part(frames) in parts}
    return [Point(frames, parts[name], counts[name]) for frames, name in names.items()]


def draw(curves: Sequence[Curve], path: Path) -> Path:
    """Accuracy over frames, one line a model; the lengths of training are shaded."""
    from llava_mini_jax import plots

    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    ranges = {curve.trained for curve in curves if curve.trained}
    for trained in ranges:
        axis.axvspan(*trained, color="black", alpha=0.09, lw=0)
    for curve, colour in zip(curves, itertools.cycle(colours), strict=False):
        frames, percent, _ = zip(*curve.points, strict=True)
        errors = [point.error for point in curve.points]
        named = curve.label
        if curve.trained:
            named += " (trained on {} to {})".format(*curve.trained)
        style = dict(fmt="o-", ms=4.5, capsize=2.5, color=colour, label=named)
        axis.errorbar(frames, percent, yerr=errors, **style)
    axis.axhline(CHANCE, color="gray", ls="--", lw=1)
    axis.annotate("guessing", (FRAMES[0], CHANCE - 2), va="top", color="dimgray")
    axis.set_xscale("log", base=2)
    axis.set_xticks(FRAMES, [f"{frames:,}" for frames in FRAMES])
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.set(
        xlabel="frames of the video" + " (shaded: lengths of training)" * bool(ranges),
        ylabel="odd page named, %",
        ylim=(0, 102),
        title="One page of a video differs: which digit is on it?",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return plots.save(figure, path)


def _illustrate(
    questions: Sequence[Question], answers: Mapping[str, Output], folder: Path
) -> list[str]:
    details = _score(folder, questions, answers).rules["exact"].details
    curve = Curve("all questions", points_of(details), None)
    return [f"accuracy by frames: {draw([curve], folder / 'needle.png')}"]


def compare(out: Path) -> list[Path]:
    """needle.png and needle.csv in eval.py's OUT, of all models that its last command asked.

    Raises InputError where OUT has no results of this benchmark.
    """
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else []
    curves = [_curve(found) for found in results if found["benchmark"] == BENCHMARK.name]
    if not curves:
        raise InputError(
            f"{file} has no results of {BENCHMARK.name}; run eval.py --benchmarks"
            f" {BENCHMARK.name} --out {out} first"
        )
    rows = ["model,trained from,trained to,frames,percent,standard error,questions"]
    for curve in curves:
        trained = ",".join(map(str, curve.trained or ("", "")))
        for point in curve.points:
            figures = f"{point.frames},{point.percent:.1f},{point.error:.1f},{point.count}"
            rows.append(f"{curve.label},{trained},{figures}")
    table = out / "needle.csv"
    table.write_text("\n".join(rows) + "\n")
    return [draw(curves, out / "needle.png"), table]


def _curve(found: Mapping[str, Any]) -> Curve:
    folder = Path(found["model"])
    left_by_stage = folder.name == "model" and len(folder.parts) > 2  # RUN/STAGE/model
    label = "/".join(folder.parts[-3:-1]) if left_by_stage else str(folder)
    return Curve(label, points_of(found["rules"][found["headline"]]["details"]), _trained(folder))


def _trained(model: Path) -> tuple[int, int] | None:
    """The lengths of clips of the stage that left this model (WORKDIR/STAGE/model), if it says."""
    run = model.parent.parent / "config.json"
    stages = json.loads(run.read_text()) if run.is_file() else []
    data = next((stage["data"] for stage in stages if stage["name"] == model.parent.name), {})
    if not data.get("frames"):
        return None
    return data["fewest_frames"] or data["frames"], data["frames"]


BENCHMARK = Benchmark(
    name="needle",
    title="needle",
    folder="needle",
    files={},
    metric="exact match, %",
    paper={},
    max_new_tokens=4,
    questions=_questions,
    score=_score,
    illustrate=_illustrate,
)
