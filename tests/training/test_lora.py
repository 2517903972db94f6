"""LoRA in training: what is learnt and what is not, the adapter that a stage leaves, resuming."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.cost.flops import step_flops
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.lora import LoraConfig, bases, is_lora, with_changes
from llava_mini_jax.ops.einsum import LoraWeight, einsum
from llava_mini_jax.training import loop, stages, step_program
from llava_mini_jax.training.dry_run import estimate
from llava_mini_jax.training.stages import with_lora
from llava_mini_jax.weights import adapters, folders, import_hf
from llava_mini_jax.weights.quantize import quantize
from tests import tiny
from tests.training import tiny_stages
from tests.training.runs import arrays, assert_same, metrics_of, run

fast_compilation = tiny.fast_compilation
LORA = LoraConfig(rank=4)
INT8 = dataclasses.replace(LORA, base="int8")
# All but `down_proj`, whose 48 inputs make no groups.
INT4 = dataclasses.replace(LORA, base="int4", targets=("llm/layers/[!d]*_proj",))
# Float32 sums in another order: numpy adds the change up here, XLA there.
MERGED = 2e-5


def two(lora=LORA, steps=4, **changes):
    """A stage 1 and a stage 2 with LoRA that goes on from it."""
    *_, stage1, stage2 = tiny_stages.stages()
    stage1 = dataclasses.replace(stage1, start="fresh", steps=2)
    stage2 = dataclasses.replace(stage2, lora=lora, steps=steps, **changes)
    return [stage1, with_lora(stage2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return folder, run(two(), folder)


def opened(folder):
    bundle, published = folders.open_model(folder, compute_dtype="float32")
    return bundle, import_hf.load_params(bundle, published, dtype="float32", unrolled=True)


def merged(leaf):
    """What a LoraWeight stands for, by its definition."""
    out = leaf.lora_b.reshape(-1, leaf.lora_b.shape[-1])
    into = leaf.lora_a.reshape(leaf.lora_a.shape[0], -1)
    return leaf.base + leaf.scale * (out @ into).reshape(leaf.base.shape)


def test_frozen_weights_stay_bit_for_bit_and_changes_are_learnt(trained):
    _, finals = trained
    before, after = finals["stage1"].params, finals["stage2"].params
    for path, array in after.items():
        component, plain = path.split("/")[0], path.removesuffix("/base")
        if path.endswith(("/lora_a", "/lora_b")):
            assert np.abs(array).max() > 0
        elif component in ("llm", "vision"):
            assert np.array_equal(array, before[plain]), path
        elif component == "projector":
            assert not np.array_equal(array, before[plain]), path
    changed = [path for path in after if path.endswith("/lora_b")]
    assert len(changed) == 7 * tiny_stages.stages()[-1].model.llm.layers


def test_a_stage_leaves_an_adapter_that_opens_as_base_and_change(trained):
    folder, finals = trained
    model = folder / "stage2" / "model"
    said = json.loads((model / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", 4, 8)
    assert said["base_model_name_or_path"] == "../../stage1/model"
    names = adapters.open_tensors(model / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert names[name].shape == (4, 32)
    whole = adapters.open_tensors(model / "non_lora_trainables.bin")
    assert "base_model.model.model.mm_projector.0.weight" in whole
    bundle, params = opened(model)
    assert bundle.model == tiny_stages.stages()[-1].model
    for path, array in arrays(params).items():
        final = finals["stage2"].params
        if path in final:
            assert np.array_equal(array, final[path]), path
        else:
            leaf = LoraWeight(*(final[f"{path}/{n}"] for n in ("base", "lora_a", "lora_b")), 2.0)
            np.testing.assert_allclose(array, merged(leaf), atol=MERGED)


def test_a_next_stage_begins_from_base_and_change(trained, tmp_path):
    folder, _ = trained
    stage2 = tiny_stages.stages()[-1]
    after = dataclasses.replace(stage2, name="after", steps=2, trainable=("projector/*",))
    finals = run([*two(), after], tmp_path)
    _, params = opened(folder / "stage2" / "model")
    begun = arrays(params)
    for path, array in finals["after"].params.items():
        if not path.startswith("projector/"):
            assert np.array_equal(array, begun[path]), path


def test_a_run_that_stops_goes_on_as_if_it_had_not(trained, tmp_path):
    _, finals = trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", failing_after(loop.train_step, steps=2 + 3))
        with pytest.raises(RuntimeError, match="killed"):
            loop.run(two(), str(tmp_path))
    assert_same(run(two(), tmp_path)["stage2"].params, finals["stage2"].params)


def failing_after(train_step, steps):
    taken = []

    def step(*args, **named):
        taken.append(1)
        if len(taken) > steps:
            raise RuntimeError("killed")
        return train_step(*args, **named)

    step._cache_size = train_step._cache_size
    step.lower = train_step.lower
    return step


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "lora, dtype",
    [
        pytest.param(INT8, np.int8, id="int8", marks=pytest.mark.slow),
        pytest.param(INT4, np.uint8, id="int4"),
    ],
)
def test_narrow_bases_learn_nearly_the_same(trained, tmp_path, lora, dtype, scan_layers):
    folder, finals = trained
    final = run(two(lora, scan_layers=scan_layers), tmp_path)["stage2"].params
    narrow = [path for path in final if path.endswith("/base/values")]
    assert narrow and all(final[path].dtype == dtype for path in narrow)
    loss = metrics_of(tmp_path)["stage2", 4][0]
    # Rounded to 1/254 of a channel's largest weight, or to 1/30 of what a group spans (and without
    # an adapter of down_proj): the loss of an untrained model hardly moves.
    most = 0.02 if dtype == np.int8 else 0.05
    assert loss == pytest.approx(metrics_of(folder)["stage2", 4][0], abs=most)
    if dtype == np.uint8 and not scan_layers:  # frozen: just the base, rounded
        path = "llm/layers/0/up_proj/base"
        begun = quantize(jnp.asarray(finals["stage2"].params[path]), 1, "int4")
        for part in ("values", "scale", "zero"):
            np.testing.assert_array_equal(final[f"{path}/{part}"], getattr(begun, part))


@pytest.mark.slow
def test_a_run_over_four_bits_learns_like_lora_and_goes_on_after_a_stop(tmp_path):
    losses = {}
    for name, lora in (("lora", dataclasses.replace(LORA, targets=INT4.targets)), ("int4", INT4)):
        finals = run(two(lora, steps=40), tmp_path / name)
        found = [m[0] for (stage, _), m in metrics_of(tmp_path / name).items() if stage == "stage2"]
        losses[name] = np.mean(found[:3]), np.mean(found[-5:])
    for first, last in losses.values():
        assert last < 0.9 * first
    assert losses["int4"][1] == pytest.approx(losses["lora"][1], rel=0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", failing_after(loop.train_step, steps=2 + 31))
        with pytest.raises(RuntimeError, match="killed"):
            loop.run(two(INT4, steps=40), str(tmp_path / "again"))
    again = run(two(INT4, steps=40), tmp_path / "again")
    assert_same(again["stage2"].params, finals["stage2"].params)


@pytest.mark.slow
def test_stacked_and_unrolled_layers_learn_the_same(trained, tmp_path):
    _, finals = trained
    final = run(two(scan_layers=True), tmp_path)["stage2"].params
    for path, array in finals["stage2"].params.items():
        if "/layers/0/" in path and "lora" in path:
            stacked = final[path.replace("/layers/0/", "/layers/")][0]
            np.testing.assert_allclose(array, stacked, atol=1e-4)


@pytest.mark.parametrize(
    "equation, x_shape, shape, outputs, axes",
    [
        ("BTD,NHD->BTNH", (2, 3, 8), (4, 6, 8), 2, ("batch", None, "heads", None)),
        ("BTNH,DNH->BTD", (2, 3, 4, 6), (8, 4, 6), 1, ("batch", None, None)),
        ("BTD,MD->BTM", (2, 3, 8), (5, 8), 1, ("batch", None, "mlp")),
    ],
)
def test_a_product_is_that_with_the_merged_weight(equation, x_shape, shape, outputs, axes):
    keys = jax.random.split(jax.random.key(0), 4)
    x, base = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], shape)
    a = jax.random.normal(keys[2], (2, *shape[outputs:]))
    b = jax.random.normal(keys[3], (*shape[:outputs], 2))
    leaf = LoraWeight(base=base, lora_a=a, lora_b=b, scale=0.5)
    expected = einsum(equation, x, merged(leaf), axes)
    np.testing.assert_allclose(einsum(equation, x, leaf, axes), expected, atol=1e-4)


def test_flops_count_two_thin_products_and_no_gradient_of_the_base():
    _, stage = two()
    shape = step_program.shape_of(stage, 1)
    everything = tiny_stages.stages()[-1]
    full = step_flops(everything.model, everything.trainable, shape)
    found = step_flops(stage.model, stage.trainable, shape, stage.lora)
    assert 0.6 * full < found < full
    wider = dataclasses.replace(stage.lora, rank=8)
    more = step_flops(stage.model, stage.trainable, shape, wider) - found
    llm, positions = stage.model.llm, shape.rows * shape.sequence
    weights = [leaf for leaf in jax.tree.leaves(changed(stage, wider)) if leaf is not None]
    numbers = sum(np.prod(leaf.shape) for leaf in weights) // 2  # those that rank 4 lacks
    # Two a multiply-add; forwards, and backwards for both operands.
    assert more == pytest.approx(3 * 2 * positions * numbers)
    assert llm.layers == 1


def changed(stage, lora):
    spec = with_changes(llava_mini.spec(stage.model), lora)
    learnt, _ = param_tree.split(spec, lambda path: path.endswith(("/lora_a", "/lora_b")))
    return learnt


def test_memory_counts_adapters_and_narrow_bases():
    _, stage = two()
    whole = estimate(tiny_stages.stages()[-1]).always
    found = estimate(stage).always
    assert found["first moments"] < 0.6 * whole["first moments"]
    narrow = estimate(dataclasses.replace(stage, lora=LoraConfig(rank=4, base="int8"))).always
    spec = with_changes(llava_mini.spec(stage.model), LORA)
    layers = jax.tree.leaves(bases(spec.llm.layers), is_leaf=param_tree.is_spec)
    saved = 3 * sum(np.prod(leaf.shape) for leaf in layers if len(leaf.shape) > 2)
    assert found["frozen parameters"] - narrow["frozen parameters"] == saved
    least = estimate(dataclasses.replace(stage, lora=INT4)).always
    layers = {path: leaf for path, leaf in param_tree.paths(spec.llm).items() if "/base" in path}
    kept = sum(np.prod(leaf.shape) for path, leaf in layers.items() if "down_proj" not in path)
    # Of 32 inputs with one scale: 16 bytes of codes, 2 of a scale, 1 of a zero.
    saved = 4 * kept - kept * 19 // 32
    assert found["frozen parameters"] - least["frozen parameters"] == saved


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(lora=LoraConfig(rank=-1)), "lora.rank and .alpha are -1 and 0"),
        (
            dict(lora=LoraConfig(rank=4, base="int3")),
            'lora.base is "int3"; expected same, int8, int4',
        ),
        (dict(lora=dataclasses.replace(LORA, base="int4")), "has 48 inputs, not a multiple"),
        (dict(lora=LoraConfig(rank=4, targets=("llm/nothing",))), '"llm/nothing" matches no'),
        (dict(lora=LoraConfig(rank=4, targets=("llm/*norm",))), "is not a weight of a product"),
        (dict(lora=LORA, trainable=("*",)), 'the pattern "*" of trainable means llm'),
        (dict(lora=LORA, start="fresh"), "start is fresh"),
        (
            dict(lora=LoraConfig(rank=4, targets=("prefusion/*_proj",))),
            "which this stage starts from scratch",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, said, tmp_path):
    _, _, stage1, stage2 = tiny_stages.stages()
    stage1 = dataclasses.replace(stage1, start="fresh", steps=1)
    with pytest.raises(InputError, match=said.replace("*", r"\*")):
        loop.run([stage1, with_lora(dataclasses.replace(stage2, **changes))], str(tmp_path))


def test_int8_weights_have_no_gradient_and_pass_one_on():
    _, stage = two(dataclasses.replace(LORA, base="int8"))
    params = stages.abstract_params(stage)
    leaves = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_lora) if is_lora(leaf)]
    assert all(leaf.base.values.dtype == jnp.int8 for leaf in leaves)
