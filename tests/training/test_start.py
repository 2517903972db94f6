"""What a stage begins with: what the one before left, and what is new."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import digits
from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.training.stages import STAGE_1, TrainConfig
from llava_mini_jax.training.start import starting_params
from tests import tiny
from tests.training.runs import arrays, assert_same

fast_compilation = tiny.fast_compilation

VISION = dataclasses.replace(tiny.VISION, layers=2)
BASELINE = tiny.model("llava-1.5", vision=VISION)
MINI = tiny.model("paper", vision=VISION, prefusion_layers=1)
KEY = jax.random.key(0)


def stage(model=MINI, **changes) -> TrainConfig:
    """Stage 2 of the digits world with a tiny model."""
    changes = dict(model=model, scan_layers=True) | changes
    return dataclasses.replace(digits.config().stage2, **changes)


@functools.cache
def previous(model=BASELINE, unrolled=False):
    """What the stage before left."""
    params = tiny.on_device(tiny.weights(model))
    return llava_mini.unrolled(params) if unrolled else params


def test_parameters_are_carried_over_and_new_ones_are_made():
    one = stage(prefusion_init="fresh")
    begun, before = arrays(starting_params(one, previous(), KEY)), arrays(previous())
    assert_same({path: begun[path] for path in before}, before)
    new = {path: leaf.shape for path, leaf in begun.items() if path not in before}
    spec = param_tree.paths(llava_mini.spec(MINI))
    assert new == {
        path: leaf.shape
        for path, leaf in spec.items()
        if path.startswith(("compressor/", "prefusion/"))
    }
    assert not np.array_equal(begun["prefusion/layers/q_proj"], begun["llm/layers/q_proj"])


def test_fresh_parameters_are_made_anew_and_no_others():
    one = stage(BASELINE, fresh=STAGE_1)
    begun, again, other = (
        arrays(starting_params(one, previous(), jax.random.key(seed))) for seed in (0, 0, 1)
    )
    before = arrays(previous())
    for path in before:
        is_fresh = path.startswith("projector/")
        assert np.array_equal(begun[path], before[path]) != is_fresh, path
        assert np.array_equal(begun[path], other[path]) != is_fresh, path
    assert_same(begun, again)


@pytest.mark.parametrize(
    ("layers", "scan_layers"),
    [(1, True), (2, True), (1, False)],  # fewer layers than the language model has, or as many
)
def test_new_prefusion_layers_are_copies_of_the_first_ones(layers, scan_layers):
    model = tiny.model("paper", vision=VISION, prefusion_layers=layers, compressor="average_pool")
    one = stage(model, scan_layers=scan_layers, prefusion_init="copy")
    params = starting_params(one, previous(unrolled=not scan_layers), KEY)
    where = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(params)]
    assert len(set(where)) == len(where)  # a training step cannot donate an array twice
    params = llava_mini.unrolled(params)
    assert len(params.prefusion.layers) == layers
    for ours, theirs in zip(params.prefusion.layers, params.llm.layers[:layers], strict=True):
        assert_same(arrays(ours), arrays(theirs))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_new_prefusion_layers_may_change_no_text_at_first(scan_layers):
    model = tiny.model("paper", vision=VISION, prefusion_layers=2)
    one, before = stage(model, scan_layers=scan_layers), previous(unrolled=not scan_layers)
    params = starting_params(dataclasses.replace(one, prefusion_init="identity"), before, KEY)
    memory = llava_mini.prefusion.ImageMemory(*jax.random.normal(KEY, (2, 2, 3, 2, 5, 8)))
    text_IFD = jax.random.normal(KEY, (3, 4, 32))
    assert np.array_equal(llava_mini.prefuse_text(params, memory, text_IFD, model), text_IFD)
    fresh = starting_params(dataclasses.replace(one, prefusion_init="fresh"), before, KEY)
    expected = {
        path: 0 * array
        if path.startswith("prefusion/") and path.endswith(("o_proj", "down_proj"))
        else array
        for path, array in arrays(fresh).items()
    }
    assert_same(arrays(params), expected)


def test_prefusion_that_exists_is_not_overwritten():
    one = stage(prefusion_init="copy")
    assert_same(arrays(starting_params(one, previous(MINI), KEY)), arrays(previous(MINI)))


def test_a_parameter_that_changed_its_shape_is_refused():
    wider = tiny.model("llava-1.5", dataclasses.replace(tiny.LLM, mlp_width=64), VISION)
    with pytest.raises(
        InputError, match=r"stage2: llm/layers/\w+ has shape .*start from scratch in `fre"
    ):
        starting_params(stage(wider), previous(), KEY)
    fresh = ("*/gate_proj", "*/up_proj", "*/down_proj")
    params = starting_params(stage(wider, fresh=fresh), previous(), KEY)
    assert params.llm.layers.up_proj.shape == (2, 64, 32)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_layers_that_were_stacked_are_taken_apart_and_the_reverse(scan_layers):
    one = stage(BASELINE, scan_layers=scan_layers)
    begun = starting_params(one, previous(unrolled=scan_layers), KEY)
    assert_same(arrays(begun), arrays(previous(unrolled=not scan_layers)))


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("unrolled", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_refused(layers, unrolled, scan_layers):
    """Both stages' models have two."""
    other = tiny.model("llava-1.5", dataclasses.replace(tiny.LLM, layers=layers), VISION)
    with pytest.raises(InputError, match=r"stage2: llm/layers/.* has shape .*, and \d more: name"):
        starting_params(stage(other, scan_layers=scan_layers), previous(unrolled=unrolled), KEY)


def test_parameters_are_taken_over_in_the_dtype_of_the_stage():
    begun = starting_params(stage(param_dtype="bfloat16"), previous(), KEY)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(begun)} == {"bfloat16"}


def test_more_prefusion_layers_than_there_are_to_copy_are_refused():
    model = tiny.model("paper", vision=VISION, prefusion_layers=3)
    with pytest.raises(InputError, match="3 pre-fusion layers cannot be copies of 2 layers"):
        starting_params(stage(model, prefusion_init="copy"), previous(), KEY)


def test_a_stage_may_have_another_mesh_than_the_one_before():
    model = tiny.model("paper", vision=VISION, prefusion_layers=1, compressor="average_pool")
    one = stage(model, prefusion_init="copy")
    previous(), previous(unrolled=True)  # kept for all tests, so not those of the mesh below
    with jax.set_mesh(sharding.make_mesh(fsdp=2, tensor=2)):
        split = starting_params(one, previous(), KEY)
        wanted = param_tree.paths(param_tree.abstract(llava_mini.spec(model)))
        for path, leaf in param_tree.paths(split).items():
            assert leaf.sharding.spec == wanted[path].sharding.spec, path
            assert len(leaf.devices()) == 4, path
        stacked = starting_params(one, previous(unrolled=True), KEY)
    assert_same(arrays(split), arrays(starting_params(one, previous(), KEY)))
    assert_same(arrays(split), arrays(stacked))
    with jax.set_mesh(sharding.make_mesh()):  # of one device, as the loop would
        apart = starting_params(dataclasses.replace(one, scan_layers=False), split, KEY)
        whole = starting_params(one, split, KEY)
    assert_same(arrays(apart), arrays(llava_mini.unrolled(jax.device_get(split))))
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(whole)} == {1}
    assert_same(arrays(whole), arrays(split))
