"""The paper's runs: what its tables say of them, written down a second time."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from configs import digits_nested, digits_tables
from llava_mini_jax import params as param_tree
from llava_mini_jax.data.batches.examples import TrainBatch
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.models import llava_mini
from llava_mini_jax.training import dry_run
from llava_mini_jax.training.optimizer import make_optimizer
from llava_mini_jax.training.stages import TrainConfig, check, load_config, stages_of
from llava_mini_jax.training.step import init_state, train_step
from llava_mini_jax.training.step_memory import estimate
from tests.conftest import ROOT

ALIGN, TUNE, VIDEO = 558_128, 665_298, 3_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What the paper says of a run; the defaults are its own model's stage 2 (Table 9)."""

    tokens: int = 1
    layers: int = 4  # of pre-fusion
    compressor: str = "similarity"
    inside: int = 0
    parts: int = 1
    width: int = 4096
    template: str = "vicuna_v1"
    length: int = 2048
    learns: tuple[str, ...] = ("projector", "compressor", "prefusion", "llm")
    rate: float = 1e-4
    projector_rate: float | None = 1e-5
    clip: float = 1.0
    batch: int = 256
    samples: int = TUNE
    epochs: int = 2
    prefusion_init: str = "copy"
    start: str = "out/7b-stage1/stage1/model"


def stage_1(model: str, **changes) -> Said:
    said = dict(tokens=576, layers=0, compressor="none", template="plain", learns=("projector",))
    said |= dict(rate=1e-3, projector_rate=None, samples=ALIGN, epochs=1)
    return Said(**(said | dict(start=f"models/{model}-start") | changes))


NO_PREFUSION = partial(Said, layers=0, learns=("projector", "compressor", "llm"))
NO_COMPRESSOR = partial(Said, learns=("projector", "prefusion", "llm"))
RELEASE = dict(compressor="multi_head", tokens=1, layers=4, prefusion_init="fresh")

RUNS = {
    "stage1_vicuna_7b": stage_1("vicuna-7b"),
    "stage2_vicuna_7b": Said(),
    "stage1_vicuna_13b": stage_1("vicuna-13b", width=5120),
    "stage2_vicuna_13b": Said(width=5120, start="out/13b-stage1/stage1/model"),
    "stage2_vicuna_7b_hd": Said(tokens=64, parts=5),
    "stage2_llava_1_5_7b": stage_1(
        "",
        template="vicuna_v1",
        learns=("projector", "llm"),
        rate=2e-5,
        batch=128,
        samples=TUNE,
        start=Said.start,
    ),
    "stage1_llama_3_1_8b": stage_1("llama-3.1-8b"),
    "stage2_llama_3_1_8b_video": Said(
        template="llama_3_1", samples=VIDEO, start="out/8b-stage1/stage1/model"
    ),
    "stage1_llama_3_1_8b_release": stage_1(
        "llama-3.1-8b", learns=("projector", "compressor", "prefusion"), **RELEASE
    ),
    "stage2_llama_3_1_8b_release": Said(
        template="llama_3_1",
        length=4096,
        projector_rate=None,
        clip=0.5,
        batch=16,
        samples=VIDEO,
        start="out/8b-release-stage1/stage1/model",
        **RELEASE,
    ),
    "ablations/table7_no_prefusion_1_token": NO_PREFUSION(tokens=1),
    "ablations/table7_no_prefusion_16_tokens": NO_PREFUSION(tokens=16),
    "ablations/table7_no_prefusion_64_tokens": NO_PREFUSION(tokens=64),
    "ablations/table7_no_prefusion_144_tokens": NO_PREFUSION(tokens=144),
    "ablations/table7_prefusion_1_layer": Said(layers=1),
    "ablations/table7_prefusion_2_layers": Said(layers=2),
    "ablations/table7_prefusion_3_layers": Said(layers=3),
    "ablations/table7_4_tokens": Said(tokens=4),
    "ablations/table7_16_tokens": Said(tokens=16),
    "ablations/table7_64_tokens": Said(tokens=64),
    "ablations/table7_hd_16_tokens": Said(tokens=16, parts=5),
    "ablations/table7_hd_144_tokens": Said(tokens=144, parts=5),
    "ablations/table7_hd_576_tokens": Said(tokens=576, parts=5),
    "ablations/table8_average_pool_1_token": NO_COMPRESSOR(tokens=1, compressor="average_pool"),
    "ablations/table8_average_pool_4_tokens": NO_COMPRESSOR(tokens=4, compressor="average_pool"),
    "ablations/table11_no_compression": NO_COMPRESSOR(tokens=576, compressor="none"),
    "ablations/table12_inside_llm": NO_PREFUSION(inside=4),
}

# Width, and vision tokens of stage 1.
SIGLIP2 = {
    "smollm2-135m": (576, 256),
    "smollm2-360m": (960, 256),
    "smollm2-1.7b": (2048, 576),
    "qwen2.5-0.5b": (896, 256),
    "qwen2.5-3b": (2048, 576),
    "qwen2.5-7b": (3584, 576),
    "qwen3-4b": (2560, 576),
}
FILES = {name: re.sub("[-.]", "_", name) for name in SIGLIP2}
for name, (width, tokens) in SIGLIP2.items():
    start = f"out/{name}-stage1/stage1/model"
    RUNS |= {
        f"stage1_{FILES[name]}": stage_1(name, width=width, tokens=tokens),
        f"stage2_{FILES[name]}": Said(width=width, template="chat", start=start),
    }

# One of each architecture; tracing one takes a second or two.
ARCHITECTURES = [
    "stage1_vicuna_7b",
    "stage2_vicuna_7b",
    "stage2_vicuna_7b_hd",
    "stage2_llama_3_1_8b_release",
    "stage1_qwen2_5_0_5b",
    "stage2_qwen3_4b",
    "ablations/table7_no_prefusion_16_tokens",
    "ablations/table8_average_pool_4_tokens",
    "ablations/table11_no_compression",
    "ablations/table12_inside_llm",
]


CARD = "stage2_llama_3_1_8b_qlora"  # no run of the paper's


def load(name: str) -> TrainConfig:
    (stage,) = stages_of(load_config(str(ROOT / "configs" / f"{name}.py")))
    return stage


def test_every_run_is_listed_here():
    folder = ROOT / "configs"
    files = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.py")}
    small = {name for name in files if name.startswith(("digits", "smollm_digits"))}
    compared = {name for name in files if name.startswith("compressors/")}
    assert {name.split("/")[1] for name in compared} == {*COMPARED, "nested"}
    assert files - small - compared - {"paper", "release", "compared", "siglip2", CARD} == set(RUNS)


def test_an_8b_model_is_tuned_on_one_card_of_24_gb():
    stage = load(CARD)
    assert stage.mesh.devices == 1 and stage.lora.base == "int4"
    assert stage.model.tokens_per_image(1) == 1 and stage.lengths[-1] == 4096
    learnt = set(stage.trainable) - {"*/lora_a", "*/lora_b"}
    assert learnt == {"projector/*", "compressor/*"}
    assert estimate(stage).total < 0.9 * 24 * 2**30


# Tokens of an image at most, and what is trained of the model beside its LLM.
COMPARED = {
    "m3": (36, {"projector"}),
    "mqt": (36, {"compressor"}),
    "token_packer": (144, {"compressor"}),
    "prumerge": (145, {"projector"}),
    "prumerge_plus": (145, {"projector"}),
    "visionzip": (64, {"projector"}),
    "voco": (579, {"projector", "compressor"}),
    "llama_vid": (2, {"compressor"}),
    "fastv": (576, {"projector"}),
}


@pytest.mark.parametrize("name", COMPARED)
def test_another_method_is_trained_as_llava_is(name):
    tokens, learns = COMPARED[name]
    stages = stages_of(load_config(str(ROOT / "configs" / "compressors" / f"{name}.py")))
    for stage in stages:
        check(stage)
        assert stage.model.prefusion_layers == 0
    assert stages[-1].model.tokens_per_image(1) == tokens
    assert stages[-1].model.compressor.kind == name
    of_llava = load("stage2_llava_1_5_7b")
    same = ("data", "batch_size", "steps", "optimizer", "seed", "prompt", "images", "lengths")
    for field in same:
        assert getattr(stages[-1], field) == getattr(of_llava, field), field
    paths = param_tree.paths(llava_mini.spec(stages[-1].model))
    trained = [path for path in paths if param_tree.matches(path, stages[-1].trainable)]
    assert {path.split("/")[0] for path in trained} == learns | {"llm"}
    if len(stages) == 2:
        assert (stages[0].trainable, stages[1].start) == (("compressor/*",), "previous")
    else:
        assert stages[0].start == of_llava.start


def test_any_number_of_tokens_is_trained_as_one_is():
    ours, of_paper = load("compressors/nested"), load("stage2_vicuna_7b")
    check(ours)
    assert ours.draw_tokens == ours.model.compressor.counts == (0, 1, 4, 9, 16, 36, 64, 144, 576)
    assert ours.model.tokens_per_image(1) == 1
    same = dataclasses.replace(ours.model, compressor=of_paper.model.compressor)
    assert dataclasses.replace(ours, model=same, draw_tokens=()) == of_paper


def test_the_three_ways_of_the_digits_world_differ_in_the_way_alone():
    stages = digits_nested.ways()
    assert set(stages) == {"prefix", "grids", "separate"}
    parent = digits_tables.config().stage2
    for way, stage in stages.items():
        check(stage)
        assert (stage.model.compressor.way, stage.draw_tokens) == (way, (0, 1, 4, 9))
        same = dataclasses.replace(stage.model, compressor=parent.model.compressor)
        assert dataclasses.replace(stage, model=same, draw_tokens=()) == parent


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_as_the_paper_says(name):
    said, stage = RUNS[name], load(name)
    check(stage)
    model, optimizer = stage.model, stage.optimizer
    assert model.tokens_per_image(stage.images.parts) == said.tokens
    assert (model.prefusion_layers, model.compressor.kind) == (said.layers, said.compressor)
    assert (model.inside_layers, stage.images.parts) == (said.inside, said.parts)
    assert (stage.prompt.template, model.llm.width) == (said.template, said.width)
    assert stage.lengths[-1] == stage.prompt.max_length == said.length
    assert (stage.batch_size, optimizer.learning_rate) == (said.batch, said.rate)
    assert (optimizer.warmup_ratio, optimizer.weight_decay) == (0.03, 0.0)
    assert optimizer.max_grad_norm == said.clip
    assert (stage.prefusion_init, stage.start) == (said.prefusion_init, said.start)
    seen = stage.steps * stage.batch_size
    assert 0 <= seen - said.epochs * said.samples < stage.batch_size
    for path in param_tree.paths(llava_mini.spec(model)):
        part = path.split("/")[0]
        assert param_tree.matches(path, stage.trainable) == (part in said.learns), path
        own = [g.learning_rate for g in optimizer.groups if param_tree.matches(path, g.patterns)]
        expected = said.projector_rate if part == "projector" else None
        assert own == ([] if expected is None else [expected]), path


def test_the_high_resolution_run_sees_four_parts_and_the_whole():
    stage = load("stage2_vicuna_7b_hd")
    assert stage.model.patches_per_image(5) == 5 * 576
    assert stage.model.detail_per_image(5) == 4 * 576


def test_the_release_differs_where_its_script_does():
    for name in ("stage1_llama_3_1_8b_release", "stage2_llama_3_1_8b_release"):
        stage = load(name)
        assert (stage.model.compress, stage.model.fuse_compressed) == ("features", True)
        assert (stage.model.detach_text, stage.prompt.blank_image) == (True, True)
        assert (stage.images.aspect, stage.data.video) == (
            "crop",
            FrameSampling(count=8, rule="release"),
        )


def test_stage_2_begins_from_what_stage_1_leaves():
    """Every stage 2 has the parameters of the stage 1 that it starts from, and its own new ones."""
    parents = {
        f"out/{model}/stage1/model": load(name)
        for model, name in {
            "7b-stage1": "stage1_vicuna_7b",
            "13b-stage1": "stage1_vicuna_13b",
            "8b-stage1": "stage1_llama_3_1_8b",
            "8b-release-stage1": "stage1_llama_3_1_8b_release",
            **{f"{name}-stage1": f"stage1_{file}" for name, file in FILES.items()},
        }.items()
    }
    for name in RUNS.keys() - {name for name in RUNS if name.startswith("stage1")}:
        stage = load(name)
        first = parents[stage.start]
        shared, whole = (
            {path: leaf.shape for path, leaf in param_tree.paths(llava_mini.spec(s.model)).items()}
            for s in (first, stage)
        )
        assert {path: whole[path] for path in shared} == shared, name
        new = {path.split("/")[0] for path in whole.keys() - shared.keys()}
        had = {"projector", "llm"} | set(RUNS[name].learns if "release" in name else ())
        assert new == set(RUNS[name].learns) - had, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_can_be_traced_at_full_size(name):
    """Shapes fit from the pixels to the updated parameters; nothing is computed or allocated."""
    stage = load(name)
    abstract = param_tree.abstract(llava_mini.spec(stage.model), stage.param_dtype)
    trainable, _ = param_tree.split(abstract, lambda p: param_tree.matches(p, stage.trainable))
    optimizer = make_optimizer(stage.optimizer, stage.steps, trainable)
    state = jax.eval_shape(lambda p: init_state(p, stage.trainable, optimizer), abstract)
    batch = abstract_batch(stage, rows=2 * stage.accumulate)
    step = partial(
        train_step,
        cfg=stage.model,
        optimizer=optimizer,
        accumulate=stage.accumulate,
        loss_chunk=stage.loss_chunk,
        z_loss=stage.z_loss,
    )
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    assert metrics["loss"].shape == ()


def abstract_batch(stage: TrainConfig, rows: int) -> TrainBatch:
    """A batch of one image and 128 positions of text a row."""
    parts, side, text = stage.images.parts, stage.model.vision.image_size, 128

    def array(shape: tuple[int, ...], dtype: object = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    length = text + stage.model.tokens_per_image(parts)
    wide = array((text + stage.model.patches_per_image(parts),))
    inputs = llava_mini.Inputs(
        ids_BT=array((text,)),
        fuse_BF=array((text,)),
        pixels_BIJYXC=array((1, parts, side, side, 3), jnp.uint8),
        frames_BI=array((1,), bool),
        slots_BS=array((length,)),
        wide_slots_BU=wide if stage.model.inside_layers else None,
    )
    return TrainBatch(inputs, array((length,)))


def test_a_method_that_reads_questions_can_be_planned(capsys):
    """Its shapes have questions in them, where no data have been read yet."""
    stages = stages_of(load_config(str(ROOT / "configs" / "compressors" / "llama_vid.py")))
    dry_run.describe(stages[-1:])
    said = " ".join(capsys.readouterr().out.split())  # a table's title is broken into lines
    assert "one image each (an image counts once for each question about it)" in said
    assert "products of a device" in said
