"""One device and eight give the same: forward, loss, gradients, a training step, generation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.data.batches.examples import Buckets
from llava_mini_jax.inference.sampling import Sampling
from llava_mini_jax.models import llama, llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.ops.rope import RopeConfig, YarnScaling
from llava_mini_jax.reproduce import stepwise
from llava_mini_jax.training import step
from llava_mini_jax.training.optimizer import Group, OptimizerConfig, make_optimizer
from tests import tiny

fast_compilation = tiny.fast_compilation

# Sums split over devices and added in another order, in float32, with logits of order 5.
LOGITS_ATOL = 5e-5
LOSS_ATOL = 1e-5
# Relative to the largest gradient of the tensor; the floor is for gradients that are zero but for
# rounding, as that of the key bias under a softmax.
GRADIENT_RTOL = 5e-5
GRADIENT_ATOL = 1e-7
# AdamW multiplies a gradient's error by up to learning rate / eps = 10; steps are 1e-4 to 1e-2.
PARAMETER_ATOL = 5e-6

ONE_KEY_HEAD = dataclasses.replace(tiny.LLM, kv_heads=1)
# What all families have of their own, in one model: no published one has it all.
FAMILIES = dataclasses.replace(
    tiny.LLM,
    qkv_bias=True,
    qk_norm=True,
    window=6,
    nope_layers=(0,),
    rope=RopeConfig(
        theta=100.0,
        scaling=YarnScaling(
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=2.0,
            beta_slow=0.25,
            truncate=True,
            attention_factor=1.14,
        ),
    ),
)
SIGLIP = dataclasses.replace(
    tiny.VISION,
    image_size=18,
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    activation="gelu_pytorch_tanh",
)
MODELS = {
    "paper": tiny.model("paper", prefusion_layers=1),
    "release": tiny.release_model(),
    "llava-1.5": tiny.model("llava-1.5"),
    # The tensor axis does not divide one key/value head: every device has it.
    "one key head": tiny.model("llava-1.5", ONE_KEY_HEAD),
    "families": tiny.model("paper", FAMILIES, SIGLIP),
}
MESHES = [(2, 2, 2), (1, 4, 2), (8, 1, 1)]
# Each takes seconds to compile: the rest is slow. (8, 1, 1) and LLaVA-1.5 have tests below.
QUICK = {("paper", (1, 4, 2)), ("release", (2, 2, 2))}


def place(params: LlavaMini, cfg: LlavaMiniConfig) -> LlavaMini:
    """Host parameters in the shards of the current mesh."""
    spec = llava_mini.spec(cfg)
    if isinstance(params.llm.layers, tuple):
        spec = llava_mini.unrolled(spec)
    return jax.tree.map(
        lambda array, spec: jax.device_put(array, spec.sharding.spec),
        params,
        param_tree.abstract(spec),
    )


@functools.cache
def on_one_device(name: str) -> tuple[float, LlavaMini]:
    cfg = MODELS[name]
    loss, grads = tiny.loss_and_grads(tiny.weights(cfg), tiny.training_batch(cfg), cfg)
    return float(loss), jax.tree.map(np.asarray, grads)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(
            name,
            mesh,
            marks=[] if (name, mesh) in QUICK else pytest.mark.slow,
            id=f"{name}, {'x'.join(map(str, mesh))}",
        )
        for name in MODELS
        for mesh in MESHES
    ],
)
def test_loss_and_gradients(name: str, mesh: tuple[int, int, int]) -> None:
    cfg = MODELS[name]
    loss, grads = on_one_device(name)
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        params = place(tiny.weights(cfg), cfg)
        batch = sharding.put_batch(tiny.training_batch(cfg))
        found_loss, found_grads = tiny.loss_and_grads(params, batch, cfg)
    assert float(found_loss) == pytest.approx(loss, abs=LOSS_ATOL)
    expected = param_tree.paths(grads)
    placed = param_tree.paths(params)
    for path, gradient in param_tree.paths(found_grads).items():
        atol = GRADIENT_ATOL + GRADIENT_RTOL * np.abs(expected[path]).max()
        np.testing.assert_allclose(gradient, expected[path], atol=atol, err_msg=path)
        if not path.startswith("vision/"):  # all zero there, of any layout
            assert gradient.sharding.is_equivalent_to(placed[path].sharding, gradient.ndim), path


# Four query heads on four devices share two key/value heads: each gets a copy of its own.
@pytest.mark.parametrize("mesh", [(2, 1, 4), (8, 1, 1)], ids=str)
def test_logits_of_high_resolution(mesh: tuple[int, int, int]) -> None:
    cfg = MODELS["release"]
    examples = [tiny.example(i, 6 + i % 3, {1: 1}, cfg, parts=5) for i in range(8)]
    batch = tiny.batch(examples, cfg, buckets=Buckets(lengths=(16,), images=(1,)))
    expected = tiny.logits(tiny.weights(cfg), batch.inputs, cfg)
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        inputs = sharding.put_batch(batch.inputs)
        found = tiny.logits(place(tiny.weights(cfg), cfg), inputs, cfg)
        rows, _, vocabulary = found.sharding.shard_shape(found.shape)
    assert rows == 8 // mesh[0] and vocabulary == cfg.llm.vocab_size // mesh[2]
    np.testing.assert_allclose(found, expected, atol=LOGITS_ATOL)


OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3,
    groups=(Group(patterns=("projector/*",), learning_rate=1e-2),),
    warmup_ratio=0.1,
    weight_decay=0.1,
    max_grad_norm=1.0,
    beta1=0.9,
    beta2=0.999,
    # Large, so that a step is smooth in the gradient: with 1e-8 the rounding error of a gradient
    # that is zero would decide where its parameter goes.
    eps=1e-3,
)
TRAINABLE = ("projector/*", "compressor/*", "prefusion/*", "llm/*")


def two_steps(cfg: LlavaMiniConfig, params: LlavaMini, batch, optimizer):
    state = step.init_state(params, TRAINABLE, optimizer)
    losses = []
    for _ in range(2):  # the first one's learning rate is the warm-up's zero
        state, metrics = step.train_step(state, batch, cfg=cfg, optimizer=optimizer)
        losses.append(float(metrics["loss"]))
    return state, losses


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("release", "paper")]


@pytest.mark.parametrize("name", ["llava-1.5", *SLOW])
def test_training_steps(name: str) -> None:
    cfg = MODELS[name]
    start, batch = tiny.weights(cfg), tiny.training_batch(cfg)
    chosen, _ = param_tree.split(start, lambda path: param_tree.matches(path, TRAINABLE))
    optimizer = make_optimizer(OPTIMIZER, 10, chosen)
    state, losses = two_steps(cfg, tiny.on_device(start), batch, optimizer)
    expected = param_tree.paths(state.trainable)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        params = place(start, cfg)
        layout = {p: a.sharding for p, a in param_tree.paths(params).items()}
        state, found_losses = two_steps(cfg, params, sharding.put_batch(batch), optimizer)
    assert found_losses == pytest.approx(losses, abs=LOSS_ATOL)
    before = param_tree.paths(start)
    for path, found in param_tree.paths(state.trainable).items():
        np.testing.assert_allclose(found, expected[path], atol=PARAMETER_ATOL, err_msg=path)
        assert found.sharding.is_equivalent_to(layout[path], found.ndim), path
        if path != "compressor/k_proj/bias":  # its gradient is zero: a softmax ignores it
            assert np.abs(found - before[path]).max() > 10 * PARAMETER_ATOL, path
    for path, found in param_tree.paths(state.frozen).items():
        np.testing.assert_array_equal(found, before[path], err_msg=path)
    moments = [
        leaf.sharding.spec
        for path, leaf in param_tree.paths(state.opt_state).items()
        if path.endswith("llm/layers/q_proj")
    ]
    assert moments == [PartitionSpec(None, "tensor", None, "fsdp")] * 2


def test_fresh_parameters_are_the_same_and_lie_in_shards() -> None:
    spec = llama.spec(tiny.LLM)
    alone = param_tree.paths(param_tree.init(jax.random.key(3), spec))
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        params = param_tree.paths(param_tree.init(jax.random.key(3), spec))
        abstract = param_tree.paths(param_tree.abstract(spec))
    for path, array in params.items():
        # The same random bits; the normal distribution's inverse is compiled differently.
        np.testing.assert_allclose(array, alone[path], rtol=1e-5, err_msg=path)
        assert array.sharding.spec == abstract[path].sharding.spec, path
    piece = params["layers/gate_proj"].addressable_shards[0].data
    assert piece.shape == (2, 48 // 2, 32 // 2)


def test_where_parameters_lie() -> None:
    spec = llava_mini.spec(MODELS["release"])
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        abstract = param_tree.paths(param_tree.abstract(spec))
    specs = {path: leaf.sharding.spec for path, leaf in abstract.items()}
    assert specs["llm/embed_tokens"] == PartitionSpec("tensor", "fsdp")
    assert specs["llm/layers/q_proj"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert specs["llm/layers/k_proj"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert specs["prefusion/layers/o_proj"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert specs["llm/layers/down_proj"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["vision/layers/fc1/kernel"] == PartitionSpec(None, "tensor", None)
    assert specs["llm/final_norm"] == PartitionSpec(None)
    with jax.set_mesh(sharding.make_mesh(8, 1, 1)):
        abstract = param_tree.paths(param_tree.abstract(spec))
    assert all(set(leaf.sharding.spec) <= {None} for leaf in abstract.values()), "replicas"


def test_a_key_head_that_is_not_divided_stays_whole() -> None:
    cfg = MODELS["one key head"]
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        specs = param_tree.abstract(llava_mini.spec(cfg))
    assert specs.llm.layers.k_proj.sharding.spec == PartitionSpec(None, None, None, "fsdp")
    assert specs.llm.layers.q_proj.sharding.spec == PartitionSpec(None, "tensor", None, "fsdp")


def test_generation_with_split_weights() -> None:
    cfg = MODELS["release"]
    kinds = [{1: 1}, {0: 1, 3: 1}, {}, {2: 3}]
    examples = [tiny.example(i, 6 + i, kinds[i], cfg) for i in range(4)]
    buckets = Buckets(lengths=(32,), images=(4,))
    weights = llava_mini.unrolled(tiny.weights(cfg, seed=9))

    def answer(params: LlavaMini) -> np.ndarray:
        model = tiny.loaded(cfg, params, buckets)
        return stepwise.answers(model, examples, Sampling.greedy(4, ()), 6).tokens_BN

    expected = answer(tiny.on_device(weights))
    with jax.set_mesh(sharding.make_mesh(tensor=2)):
        found = answer(place(weights, cfg))
    assert found.tolist() == expected.tolist()
