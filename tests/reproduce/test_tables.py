"""The tables as they are written down: against the configs, and the claims against hand figures."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from llava_mini_jax import cli
from llava_mini_jax.errors import InputError
from llava_mini_jax.reproduce import page, scales
from llava_mini_jax.reproduce.rows import BENCHMARKS, Claim
from llava_mini_jax.reproduce.tables import PAPER_ROWS, ROWS, TABLES
from llava_mini_jax.reproduce.trained import SCORE, claims, collect, judge
from llava_mini_jax.training.stages import check

CONFIGS = Path(__file__).parents[2] / "configs"


def make_plan(scale, rows=tuple(ROWS), seeds=(0, 1), out=Path("out")):
    return scales.plan(scale, CONFIGS, rows, seeds, out)


def test_rows_have_the_papers_tokens_and_layers_at_full_scale():
    plan = make_plan("full", seeds=(0,))
    layers = {"n1-1": 1, "n2-1": 2, "n3-1": 3, "inside": 0}
    for (name, _), job in plan.names.items():
        stage, row = plan.jobs[job].stages[-1], ROWS[name]
        if name not in PAPER_ROWS:
            continue  # held to their authors' by tests/training/test_paper_configs.py
        parts = 1 if stage.images.grid == 1 else stage.images.grid**2 + 1
        assert stage.model.tokens_per_image(parts) == row.tokens, name
        none = name.endswith("llava") or name.startswith("n0")
        assert stage.model.prefusion_layers == layers.get(name, 0 if none else 4), name
        assert (stage.images.grid == 2) == name.startswith("hd-")
    assert {name for name, row in ROWS.items() if row.full} == {name for name, _ in plan.names}


@pytest.mark.parametrize("scale", scales.SCALES)
def test_every_job_can_be_trained_and_stands_behind_what_it_needs(scale):
    plan = make_plan(scale)
    passed = set()
    for name, job in plan.jobs.items():
        for stage in job.stages:
            check(stage)
        assert job.needs is None or job.needs in passed
        needed = plan.jobs[job.needs].model(Path("out")) if job.needs else None
        if needed is not None:
            begins = str(job.model(Path("out"))) if job.asks else job.stages[0].start
            assert begins == str(needed)
        passed.add(name)
    # Tables that share a row share its run, and at full scale rows that share a config; beside the
    # rows' jobs there are the start, and stage 1 of each seed and of each method that projects.
    own = {name for name in plan.jobs if name.startswith("stage1-") and name.count("-") > 1}
    first = 3 if scale == "digits" else 2
    assert len(set(plan.names.values())) == len(plan.jobs) - first - len(own)
    assert len(own) == (4 if scale == "digits" else 0)
    assert plan.jobs[plan.names["mini", 0]].stages[-1].seed == 0
    if scale == "full":
        assert plan.names["low-mini", 1] == plan.names["mini", 1]


def test_a_model_of_several_numbers_of_tokens_is_trained_once_and_asked_for_each():
    plan = make_plan("digits", ("mqt", "mqt-2", "mqt-9", "any-grids-0"), seeds=(0,))
    trained = plan.jobs["mqt-seed0"]
    assert trained.stages[-1].draw_tokens == (1, 2, 4, 9) and trained.vision_tokens is None
    asked = [plan.jobs[plan.names[row, 0]] for row in ("mqt-2", "mqt-9", "any-grids-0")]
    assert [job.vision_tokens for job in asked] == [2, 9, 0]
    assert [job.steps for job in asked] == [0, 0, 0] and not any(job.stages for job in asked)
    assert asked[0].model(Path("out")) == asked[1].model(Path("out")) == trained.model(Path("out"))
    assert asked[0].results(Path("out")) != trained.results(Path("out"))
    # MQT is its own projector, and has a stage 1 of its own; the nested kinds begin with LLaVA's.
    assert trained.needs == "stage1-mqt-seed0" and plan.jobs[asked[2].needs].needs == "stage1-seed0"
    assert plan.jobs["stage1-mqt-seed0"].stages[0].trainable == ("compressor/*",)


def test_seeds_change_what_the_paper_trains_and_nothing_before_it():
    plan = make_plan("digits", ("mini",))
    first, second = (plan.jobs[plan.names["mini", seed]].stages[-1] for seed in (0, 1))
    assert first.seed != second.seed and first.data.seed != second.data.seed
    assert first.model == second.model and first.steps == second.steps
    starts = {job.needs for name, job in plan.jobs.items() if name.startswith("stage1")}
    assert starts == {"start"}


def test_the_claims_are_the_papers():
    """Each holds in the paper's own figures, where it has them for all rows."""
    for table in TABLES.values():
        assert set(table.rows) <= set(ROWS)
        for claim in table.claims:
            assert set(claim.order) <= set(table.rows)
            scores = {n: {0: sum(ROWS[n].paper) / 3} for n in claim.order if ROWS[n].paper}
            verdict = judge(claim, scores)
            known = len(scores) == len(claim.order)
            assert str(verdict).startswith("holds") if known else math.isnan(verdict.step)


def test_a_claim_is_judged_by_its_smallest_step():
    scores = {
        "a": {0: 80.0, 1: 82.0, 2: 84.0},
        "b": {0: 90.0, 1: 90.0, 2: 90.0},
        "c": {0: 89.0, 1: 88.5, 2: 88.0, 3: 0.0},  # the others have no seed 3
    }
    verdict = judge(Claim(text="", order=("a", "b", "c"), by=-1), scores)
    assert verdict.step == pytest.approx(-1.5)
    assert verdict.error == pytest.approx(0.5 / math.sqrt(3))
    assert str(verdict) == "does not hold, not clearly (-1.5 ± 0.3)"
    assert str(judge(Claim(text="", order=("a", "b"), by=2), scores)) == "holds (+8.0 ± 1.2)"
    near = judge(Claim(text="", order=("a", "b"), by=5), scores)  # 2.6 standard errors: of 3
    assert str(near) == "holds, not clearly (+8.0 ± 1.2)"
    one = {name: {0: seeds[0]} for name, seeds in scores.items()}
    assert str(judge(Claim(text="", order=("b", "a")), one)) == "does not hold (-10.0)"
    assert str(judge(Claim(text="", order=("a", "d")), scores)) == "–"


def leave_results(plan, out, scores):
    for key, score in scores.items():
        path = plan.jobs[plan.names[key]].results(out)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([result_of("digits", score)]))


def result_of(benchmark, score):
    """One digit is 6 points better than the mean, a line 6 worse."""
    kinds = {"position": score + 4, "largest": score + 8, "row": score - 3, "column": score - 9}
    return {
        "benchmark": benchmark,
        "value": score,
        "headline": "exact",
        "rules": {"exact": {"value": score, "details": {"parts": kinds}}},
        "settings": {"limit": None},
    }


def test_the_page_has_what_the_runs_left(tmp_path, capsys):
    plan = make_plan("digits", TABLES["table8"].rows, out=tmp_path)
    leave_results(plan, tmp_path, {("mini", 0): 90.0, ("mini", 1): 92.0, ("pool-1", 0): 81.25})
    options = ["--seeds", "0,1", "--out", str(tmp_path), "--configs", str(CONFIGS)]
    assert cli.main(["reproduce", "table8", "--collect", *options]) == 0
    text = (tmp_path / "table8.md").read_text()
    (mini,) = [line for line in text.splitlines() if line.startswith("| LLaVA-Mini | 4 | 1 |")]
    assert "| **91.0** | 90.0 92.0 | 97.0 | 85.0 | 1 | 77.6 | 60.9 | 65.6 |" in mini
    steps = " | holds (+8.8)" * 3  # seed 0 only: pool-1 has no other
    assert f"{steps} | holds (+1.4) |" in text
    assert "| – | – | – | holds" in text  # four tokens are not trained yet
    assert "A trial" not in text and "[0m" not in text
    rows = list(csv.DictReader((tmp_path / "table8.csv").open()))
    found = {(r["row"], r["seed"]): r for r in rows}
    assert found["mini", "1"]["score"] == "92.000" and found["pool-1", "0"]["score"] == "81.250"
    assert found["mini", "1"]["one digit"] == "98.000" and found["mini", "1"]["a line"] == "86.000"
    assert found["mini", "1"]["paper_gqa"] == "60.9"
    assert found["pool-4", ""]["score"] == "" and found["pool-4", ""]["paper_gqa"] == "60.3"
    with Image.open(tmp_path / "table8.png") as picture:
        assert picture.width > 600
    said = capsys.readouterr().out
    assert "here: holds (+8.8); in the paper: holds (+1.4)" in said
    assert "one digit: holds (+8.8); a line: holds (+8.8)" in said


def test_what_is_missing_is_not_averaged_over(tmp_path):
    """A trial may ask too few questions for a kind; a set without answers has null for a score."""
    plan = make_plan("digits", TABLES["table11"].rows, seeds=(0,), out=tmp_path)
    for row, right in (("llava", 90.0), ("whole", 80.0)):
        result = result_of("digits", right)
        kinds = result["rules"]["exact"]["details"]["parts"]
        kinds["column"] = None
        del kinds["row"]
        path = plan.jobs[plan.names[row, 0]].results(tmp_path)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([result]))
    trained = collect("table11", "digits", plan, (0,), tmp_path)
    ((_, ours, _),) = claims("table11", "digits", trained)
    assert [str(verdict) for verdict in ours.values()] == ["–", "does not hold (-10.0)", "–"]
    page.write("table11", "digits", trained, tmp_path, "the command", "")
    assert "| **–** | – | 96.0 | – |" in (tmp_path / "table11.md").read_text()


def test_at_full_scale_each_benchmark_is_a_part_of_the_score(tmp_path):
    plan = make_plan("full", TABLES["table11"].rows, seeds=(0,), out=tmp_path)
    for row, scores in (("llava", (78.0, 62.0, 64.0)), ("whole", (80.0, 61.0, 66.0))):
        path = plan.jobs[plan.names[row, 0]].results(tmp_path)
        path.parent.mkdir(parents=True)
        found = [result_of(*each) for each in zip(BENCHMARKS, scores, strict=True)]
        path.write_text(json.dumps(found))
    llava, whole = collect("table11", "full", plan, (0,), tmp_path)
    assert llava.mean(SCORE) == pytest.approx(68)
    assert [whole.mean(title) for title in ("VQAv2 val", "GQA", "MMBench")] == [80, 61, 66]
    ((_, ours, _),) = claims("table11", "full", [llava, whole])
    assert {title: verdict.step for title, verdict in ours.items()} == {
        SCORE: pytest.approx(1),
        "VQAv2 val": 2,
        "GQA": -1,
        "MMBench": 2,
    }


def test_a_trial_is_not_taken_for_a_run(tmp_path, capsys):
    plan = make_plan("digits", ("llava",), seeds=(0,), out=tmp_path)
    leave_results(plan, tmp_path, {("llava", 0): 90.0})
    words = ["reproduce", "table11", "--collect", "--seeds", "0", "--out", str(tmp_path)]
    words += ["--configs", str(CONFIGS)]
    assert cli.main([*words, "--limit", "8"]) == 2
    assert "llava-seed0 holds a run with other settings (limit)" in capsys.readouterr().err
    job = plan.jobs["llava-seed0"]
    stages = [dataclasses.asdict(stage) for stage in job.stages]
    (tmp_path / job.name / "config.json").write_text(json.dumps([{**stages[0], "steps": 3}]))
    assert cli.main(words) == 2
    assert "llava-seed0 holds a run with other settings (stage2.steps)" in capsys.readouterr().err
    (tmp_path / job.name / "config.json").write_text(json.dumps(stages))
    assert cli.main(words) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["table9"], '"table9" is not a table; give all, or some of table7'),
        (["table7", "--seeds", "a"], "--seeds is 'a'"),
        (["table7", "--seeds", "-1"], "--seeds"),
        (["table7", "--jobs", "0"], "--jobs is 0"),
        (["table7", "--steps", "-3"], "--steps is -3"),
        (["table7", "--configs", "nowhere"], "nowhere is not the project's folder of configs"),
        (["table7", "--collect", "--out", "nowhere"], "nowhere does not exist"),
        (["table7", "--scale", "half"], "invalid choice"),
    ],
)
def test_wrong_words_get_one_sentence(words, said, capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert cli.main(["reproduce", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_full_scale_is_told_as_commands(capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert cli.main(["reproduce", "table11", "--scale", "full", "--dry-run", "--out", "o"]) == 0
    lines = capsys.readouterr().out.splitlines()
    trains = [line for line in lines if line.startswith("python train.py")]
    assert trains[0].startswith("python train.py configs/stage1_vicuna_7b.py --workdir o/stage1")
    assert trains[2].endswith("--start o/stage1-seed0/stage1/model --seed 0")
    assert sum(line.startswith("python eval.py") for line in lines) == 2
    trial = ["--steps", "5", "--limit", "3"]
    words = ["reproduce", "table11", "--scale", "full", "--dry-run", "--out", "o", *trial]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith("--steps 5") for line in lines if line.startswith("python train"))
    assert sum(line.endswith("--limit 3") for line in lines) == 2
    with pytest.raises(InputError):
        scales.plan("full", Path("docs"), ("mini",), (0,), Path("o"))


def test_methods_are_curves_over_tokens_and_flops(tmp_path):
    rows = ("mqt", "mqt-2", "any-grids-0", "voco-1", "fastv-4", "vid", "prumerge")
    plan = make_plan("digits", rows, seeds=(0, 1), out=tmp_path)
    scores = {(row, seed): 50.0 + seed for row in rows for seed in (0, 1)}
    leave_results(plan, tmp_path, scores)
    found = {each.name: each for each in collect("compressors", "digits", plan, (0, 1), tmp_path)}
    assert {name: found[name].tokens for name in rows} == {
        **{"mqt": 1, "mqt-2": 2, "any-grids-0": 0, "voco-1": 1, "fastv-4": 4, "vid": 2},
        "prumerge": 3,  # at most
    }
    # More tokens cost more; VoCo's language model reads all patches first.
    assert found["mqt"].flops < found["mqt-2"].flops < found["voco-1"].flops
    assert math.isnan(found["prumerge"].paper) and found["mqt-2"].paper == pytest.approx(55.4)
    page.write("compressors", "digits", list(found.values()), tmp_path, "the command", "")
    text = (tmp_path / "compressors.md").read_text()
    assert "- PruMerge, PruMerge+: LoRA instead of all weights." in text
    with Image.open(tmp_path / "compressors.png") as picture:
        assert picture.width > 1000
