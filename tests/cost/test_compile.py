"""`llava-mini profile compile`: what it refuses, and what it tells, with CPU devices as a slice.

Compilers for TPUs and GPUs are not among the tests' packages: `make compile-check` has them.
"""

import dataclasses
import json
import os

import jax
import pytest

from llava_mini_jax import cli
from llava_mini_jax.cost import baseline, chips, compiled, programs, topology
from llava_mini_jax.cost.compiled import MemoryUse
from llava_mini_jax.cost.flops import step_flops
from llava_mini_jax.training import step_program
from llava_mini_jax.training.stages import load_config, stages_of
from tests import tiny_model
from tests.conftest import ROOT

DIGITS = str(ROOT / "configs" / "digits.py")
NOTHING = MemoryUse(arguments=0, temporaries=0, outputs=0, code=0)


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """What the command sets is undone."""
    for name, value in os.environ.items():
        monkeypatch.setenv(name, value)
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.fixture
def here(monkeypatch):
    """The slice's devices are this process's CPU devices."""

    def devices(name: str, shape: str) -> list:
        count = 1
        for size in shape.split("x"):
            count *= int(size)
        return jax.devices()[:count]

    monkeypatch.setattr(topology, "absent_devices", devices)


def run(capsys, *words: str) -> tuple[int, str, str]:
    status = cli.main(["profile", "compile", *words])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    "words, said",
    [
        ("vicuna-7b", "no chip is given; give --chip v5e, v5p, v6e or h100"),
        ("vicuna-7b --chip h200", 'chip "h200" is unknown; give one of v5e, v5p, v6e, h100'),
        ("vicuna-7b --chip v5e --slice 3x3", 'a slice "3x3" of v5e is unknown; give --slice 1x1'),
        ("vicuna-7b --chip h100 --slice 3", 'a slice "3" of h100 is unknown; give --slice 1, 2'),
        ("vicuna-7b --chip h100 --rows 0", "--rows is 0; give 1 or more"),
        ("vicuna-7b --chip h100 --remat full", "--remat changes nothing of a model that answers"),
        (f"{DIGITS} --chip h100 --program decode", "--program changes nothing of a training step"),
        ("vicuna-7b --chip h100 --option fast", '--option has "fast"; give one as name=value'),
    ],
)
def test_wrong_words_are_refused(capsys, words, said):
    status, out, err = run(capsys, *words.split())
    assert (status, out, err.count("\n")) == (2, "", 1) and said in err


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "vicuna-7b --chip h100 --program speak",
            'program "speak" is unknown; give one or more of',
        ),
        ("vicuna-7b --chip h100 --dtype int2", '--dtype is "int2"; give one of float32'),
        ("nobody/nothing --chip h100", "is not a local folder"),
        ("vicuna-7b --chip v5e --slice 2x2 --mesh fsdp=2", "has 2 devices, but --slice 2x2 of v5e"),
        (f"{DIGITS} --chip h100", "several stages; give --stage captions, baseline"),
        (f"{DIGITS} --chip h100 --stage last", 'no stage "last"; give --stage captions'),
        (f"{DIGITS} --chip h100 --stage stage2 --rows 5 --accumulate 2", "batch_size 5 cannot be"),
    ],
)
def test_what_does_not_fit_is_refused(capsys, here, words, said):
    status, out, err = run(capsys, *words.split())
    assert (status, out, err.count("\n")) == (2, "", 1) and said in err


@pytest.mark.parametrize(
    "chip, package, extra",
    [("v5e", "libtpu", "compile-tpu"), ("h100", "jax-cuda12-plugin", "compile-gpu")],
)
def test_a_plugin_that_is_missing_is_named_with_its_extra(
    capsys, monkeypatch, chip, package, extra
):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    status, _, err = run(capsys, "vicuna-7b", "--chip", chip)
    assert status == 2 and f"compiling for {chip} needs {package}, not installed" in err
    assert f"pip install -c constraints.txt '.[{extra}]'" in err


def test_a_plugin_of_another_version_is_named(capsys, monkeypatch):
    versions = {"jax-cuda12-plugin": "0.9.0", "jax": "0.10.2"}
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topology.metadata, "version", versions.__getitem__)
    status, _, err = run(capsys, "vicuna-7b", "--chip", "h100")
    assert (
        status == 2 and "needs jax-cuda12-plugin 0.10.2, as JAX is, but 0.9.0 is installed" in err
    )


def test_a_plugin_that_does_not_start_says_why(capsys, monkeypatch):
    monkeypatch.setattr(topology, "_check_plugin", lambda *given: None)

    def broken(**given):
        raise RuntimeError("no such\n  version")

    from jax.experimental import topologies

    monkeypatch.setattr(topologies, "get_topology_desc", broken)
    status, _, err = run(capsys, "vicuna-7b", "--chip", "v5e")
    assert status == 2 and "the compiler for v5e does not start (no such version)" in err


def test_a_training_step_is_told_of_one_device(capsys, here, tmp_path):
    words = f"{DIGITS} --stage stage2 --chip h100 --slice 4 --rows 8 --accumulate 2".split()
    file = tmp_path / "found.json"
    status, out, err = run(capsys, *words, "--report", str(file), "--text", str(tmp_path))
    assert (status, err) == (0, "")
    (found,) = json.loads(file.read_text())
    stage = {s.name: s for s in stages_of(load_config(DIGITS))}["stage2"]
    stage = dataclasses.replace(stage, batch_size=8)
    flops = step_flops(stage.model, stage.trainable, step_program.shape_of(stage, 1))
    assert found["model_tflop"] == pytest.approx(flops / 4 / 1e12)
    # Recomputed products, if any, and none of them forgotten.
    assert 0.95 <= found["tflop"] / found["model_tflop"] <= 1.4
    assert (found["mesh"], found["chip"], found["slice"]) == ("fsdp=4", "h100", "4")
    assert found["collectives"]["all-gather"]["gb"] > 0
    (text,) = tmp_path.glob("*.hlo")
    reading = compiled.read_text(text.read_text(), NOTHING)
    assert reading.total("flops") == found["tflop"] * 1e12
    assert "collectives, loops multiplied out" in out and "; --dry-run " in out


def test_a_models_programs_are_told(capsys, here, tmp_path):
    folder, file = str(tiny_model.folder("release")), tmp_path / "found.json"
    sizes = ["--length", "16", "--slots", "64"]
    status, out, _ = run(capsys, folder, "--chip", "h100", *sizes, "--report", str(file))
    found = json.loads(file.read_text())
    assert status == 0 and len(found) == len(programs.NAMES) == 6
    assert [each["program"].split(", ")[-1] for each in found] == list(programs.NAMES)
    assert all(each["tflop"] > 0 and each["traffic_gb"] > 0 for each in found)
    assert out.count("copies of a layer's keys or more") == 3  # of slots


def test_the_baseline_has_the_models_own_parts(capsys, here):
    words = [str(tiny_model.folder("release")), "--chip", "h100", "--baseline"]
    status, out, err = run(capsys, *words, "--program", "prefuse_images", "--json")
    (found,) = json.loads(out)
    assert (status, err) == (0, "")
    assert found["program"].startswith("LLaVA-1.5 of ")
    cfg = baseline.llava_1_5(tiny_model.bundle("release").model)
    # Nothing but the projector: two products of every patch.
    both = cfg.vision.width * cfg.llm.width + cfg.llm.width**2
    assert found["tflop"] * 1e12 == pytest.approx(2 * cfg.vision.grid**2 * both)
    assert programs.names(cfg) == [name for name in programs.NAMES if name != "prefuse_text"]
    status, _, err = run(capsys, *words, "--program", "prefuse_text")
    assert status == 2 and "no pre-fusion, so there is no program prefuse_text" in err


def test_narrow_weights_are_small(capsys, here, tmp_path):
    words = ["vicuna-7b", "--layers", "1", "--chip", "h100", "--program", "decode", "--slots", "16"]
    found = {}
    for dtype in ("bfloat16", "int8", "int4"):
        file = tmp_path / f"{dtype}.json"
        assert run(capsys, *words, "--dtype", dtype, "--report", str(file))[0] == 0
        found[dtype] = json.loads(file.read_text())[0]["memory_gib"]["arguments"]
    assert 0.5 < found["int8"] / found["bfloat16"] < 0.78  # the table of embeddings stays
    # Of one layer's 202 M weights; the head's 131 M stay int8.
    assert found["int8"] - found["int4"] == pytest.approx(202.4e6 * (1 - 0.547) / 2**30, rel=0.01)


# -------------------------------------------------------------------------------- bounds on time


def reading(*lines: str) -> compiled.Reading:
    body = "\n".join(f"  {line}" for line in lines)
    text = f"HloModule m\n\nENTRY %main (x: f32[1]) -> f32[1] {{\n{body}\n}}\n"
    return compiled.read_text(text, NOTHING)


def test_a_gpus_time_is_products_and_scores_one_after_the_other():
    found = reading(
        "%x = bf16[8192,8192]{1,0} parameter(0)",
        "%y = bf16[8192,8192]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        '%s = f32[8192,8192]{1,0} exponential(%y), metadata={op_name="jit(f)/shard_map/exp"}',
        "ROOT %z = f32[8192,8192]{1,0} negate(%s)",
    )
    h100 = chips.chip("h100")
    times = compiled.times(found, h100)
    product, numbers = 2 * 8192**3 / 989e12, 8192**2
    first, second = times.floors.values()
    assert first == pytest.approx(product + 6 * numbers / 3350e9)
    assert second == pytest.approx(product + (6 + 8) * numbers / 3350e9)
    assert times.traffic == pytest.approx((6 + 6 + 8) * numbers / 3350e9)


def test_xlas_attention_is_told_by_its_largest_scores():
    found = reading(
        "%q = bf16[4,512,64]{2,1,0} parameter(0)",
        "%k = bf16[4,512,64]{2,1,0} parameter(1)",
        "ROOT %s = f32[4,512,512]{2,1,0} dot(%q, %k), lhs_batch_dims={0}, lhs_contracting_dims={2},"
        ' metadata={op_name="jit(f)/llm/BKRH,BKSH->BKRS/dot_general"}',
    )
    assert found.attention() == {"xla": "f32[4,512,512]"}
    assert found.total("bytes", found.xla_attention()) == 4 * 512 * (2 * 2 * 64 + 4 * 512)


def test_copies_of_an_entry_are_told_from_prefetches():
    found = reading(
        "%c = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)",
        "%v = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} copy(%c)",
        "%t = bf16[1024,1024]{0,1:T(8,128)(2,1)} transpose(%c), dimensions={1,0}",
        "ROOT %small = bf16[8,8]{1,0:T(8,128)(2,1)} copy(%c)",
    )
    assert [i.name for i in found.entry_copies(2 * 2**20)] == ["t"]
    assert [i.name for i in found.entry_copies(1)] == ["t", "small"]


def test_a_tpus_time_is_its_compilers_cycles():
    found = reading(
        "%x = f32[8,128]{1,0:T(8,128)} parameter(0)",
        "ROOT %y = f32[8,128]{1,0:T(8,128)} add(%x, %x),"
        ' backend_config={"estimated_cycles":"3000"}',
    )
    (floor,) = compiled.times(found, chips.chip("v5e")).floors.values()
    assert floor == pytest.approx(3000 / 1.5e9)


def test_every_chip_that_can_be_compiled_for_has_all_its_numbers():
    for name, chip in chips.COMPILED.items():
        assert chip.tflops and chip.bandwidth and chip.memory and chip.links and chip.slices, name
        assert bool(chip.clock) == chip.is_tpu
