"""The paper's runs: what Table 9 and sections 4 and 5 say of them, written down a second time."""

import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.models import llava_mini
from llava_mini_jax.training.stages import check, load_config, stages_of
from tests.conftest import ROOT

STAGE_1 = dict(batch=256, rate=1e-3, rates={}, tokens=576, samples=558_128, epochs=1)
STAGE_2 = dict(batch=256, rate=1e-4, rates={"projector": 1e-5}, tokens=1, samples=665_298, epochs=2)
RUNS = {
    "stage1_vicuna_7b": (STAGE_1, "plain", 4096),
    "stage2_vicuna_7b": (STAGE_2, "vicuna_v1", 4096),
    "stage1_vicuna_13b": (STAGE_1, "plain", 5120),
    "stage2_vicuna_13b": (STAGE_2, "vicuna_v1", 5120),
    "stage2_vicuna_7b_hd": (STAGE_2 | dict(tokens=64), "vicuna_v1", 4096),
    "stage2_llava_1_5_7b": (
        STAGE_1 | dict(batch=128, rate=2e-5, samples=665_298),
        "vicuna_v1",
        4096,
    ),
    "stage1_llama_3_1_8b": (STAGE_1, "plain", 4096),
    "stage2_llama_3_1_8b_video": (STAGE_2 | dict(samples=3_000_000), "llama_3_1", 4096),
}


def load(name):
    (stage,) = stages_of(load_config(str(ROOT / "configs" / f"{name}.py")))
    return stage


def test_every_run_is_listed_here():
    files = {path.stem for path in (ROOT / "configs").glob("stage*.py")}
    assert files == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_as_the_paper_says(name):
    said, template, width = RUNS[name]
    stage = load(name)
    check(stage)
    optimizer = stage.optimizer
    assert stage.batch_size == said["batch"]
    assert optimizer.learning_rate == said["rate"]
    assert (optimizer.warmup_ratio, optimizer.weight_decay) == (0.03, 0.0)
    seen = stage.steps * stage.batch_size
    assert 0 <= seen - said["epochs"] * said["samples"] < stage.batch_size
    assert stage.model.tokens_per_image(stage.images.parts) == said["tokens"]
    assert (stage.prompt.template, stage.model.llm.width) == (template, width)
    assert stage.lengths[-1] == stage.prompt.max_length
    for path in param_tree.paths(llava_mini.spec(stage.model)):
        part = path.split("/")[0]
        learns = part == "projector" if name.startswith("stage1") else part != "vision"
        assert param_tree.matches(path, stage.trainable) == learns, path
        own = [g.learning_rate for g in optimizer.groups if param_tree.matches(path, g.patterns)]
        expected = said["rates"].get(part)
        assert own == ([] if expected is None else [expected]), path


def test_the_high_resolution_run_sees_four_parts_and_the_whole():
    stage = load("stage2_vicuna_7b_hd")
    assert stage.images.parts == 5
    assert stage.model.patches_per_image(5) == 5 * 576
    assert stage.model.detail_per_image(5) == 4 * 576


def test_stage_2_begins_from_what_stage_1_leaves():
    for one, two in (("vicuna_7b", "vicuna_7b"), ("llama_3_1_8b", "llama_3_1_8b_video")):
        first, second = load(f"stage1_{one}"), load(f"stage2_{two}")
        shared, whole = (
            {path: leaf.shape for path, leaf in param_tree.paths(llava_mini.spec(s.model)).items()}
            for s in (first, second)
        )
        assert {path: whole[path] for path in shared} == shared
        new = {path.split("/")[0] for path in whole.keys() - shared.keys()}
        assert new == {"compressor", "prefusion"}
        assert second.start.endswith(f"{first.name}/model")
