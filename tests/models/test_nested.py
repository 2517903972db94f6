"""Any number of tokens from one checkpoint: each count is the compressor of so many, in any row."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.data.batches.examples import TrainBatch, positions
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.models.compressors import nested, similarity
from llava_mini_jax.models.compressors.grid import GridConfig
from llava_mini_jax.models.compressors.nested import WAYS, Nested, NestedConfig
from llava_mini_jax.models.compressors.positions import sincos
from llava_mini_jax.models.compressors.similarity import SimilarityCompressor
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.training.loss import Sums, loss
from llava_mini_jax.training.step import init_state, train_step
from tests import tiny
from tests.sharding.test_one_and_eight import GRADIENT_RTOL, LOSS_ATOL, place

fast_compilation = tiny.fast_compilation

D, COUNTS = tiny.LLM.width, (0, 1, 4, 9, 16)
# A model each.
EACH = ["grids", *(pytest.param(way, marks=pytest.mark.slow) for way in ("prefix", "separate"))]
BUCKETS = tiny.Buckets(lengths=(16, 64), images=(2,))

# Products of other shapes add in another order: float32, values of order 1, and logits of order 5.
TOKENS_ATOL, ATOL = 1e-5, 1e-4
GRADIENT_ATOL = 1e-6


def config(way: str, counts: tuple[int, ...] = COUNTS, count: int = 4) -> NestedConfig:
    return NestedConfig(way=way, width=D, counts=counts, count=count)


def model(way: str, **changes) -> LlavaMiniConfig:
    return tiny.model("paper", compressor=config(way, **changes), prefusion_layers=1)


def seen() -> Seen:
    patches = np.random.default_rng(0).standard_normal((3, 16, D)).astype(np.float32)
    return Seen(jnp.asarray(patches))


def params_of(way: str) -> Nested:
    spec = nested.spec(config(way))
    table = np.random.default_rng(1).standard_normal(spec.query.shape)
    return Nested(jnp.asarray(table, jnp.float32))


def own_queries(way: str, params: Nested, count: int) -> np.ndarray:
    """The table [count, D] of the plain compressor of `count` tokens that is in the nested one."""
    query, grid = np.asarray(params.query), math.isqrt(count)
    if way == "separate":
        start = sum(n for n in COUNTS if n < count)
        return query[start : start + count]
    fine = sincos(4, D)
    if way == "prefix":
        return query[:count] + fine[nested.spread(4)[:count]] - sincos(grid, D)
    # Windows by hand, where they are whole ones.
    whole = (query + fine).reshape(grid, 4 // grid, grid, 4 // grid, D)
    return whole.mean(axis=(1, 3)).reshape(count, D) - sincos(grid, D)


@pytest.mark.parametrize(
    ("way", "count"), [(way, n) for way in WAYS for n in COUNTS[1:] if (way, n) != ("grids", 9)]
)
def test_a_count_is_the_papers_compressor_of_so_many_tokens(way: str, count: int) -> None:
    params = params_of(way)
    made = nested.apply(params, seen(), config(way)).tokens_IQE
    choice = nested.declare(config(way)).choice
    assert choice is not None and made.shape[1] == choice.made
    grid = GridConfig(kind="similarity", width=D, heads=1, grid=math.isqrt(count), norm_eps=1e-5)
    plain = SimilarityCompressor(jnp.asarray(own_queries(way, params, count)))
    expected = similarity.apply(plain, seen(), grid).tokens_IQE
    np.testing.assert_allclose(
        made[:, choice.taken(count).places], expected, atol=TOKENS_ATOL, err_msg=way
    )


def test_a_grid_that_does_not_divide_the_finest_takes_shares_of_its_places() -> None:
    found = nested.window_means(3, 2)
    expected = np.array([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])
    np.testing.assert_allclose(found, np.kron(expected, expected), atol=1e-7)


def test_any_first_places_are_spread_over_the_picture() -> None:
    for grid in (3, 4, 6):
        assert sorted(nested.spread(grid)) == list(range(grid * grid))
    assert nested.spread(3).tolist()[:5] == [4, 0, 2, 6, 8]  # the middle, then the corners
    # Of 24 x 24 places, the first 16 leave none farther than a third of the side.
    rows, columns = np.divmod(nested.spread(24), 24)
    away = np.hypot(rows[:, None] - rows[:16], columns[:, None] - columns[:16])
    assert away.min(axis=1).max() <= 8


def rows_of(cfg: LlavaMiniConfig, counts: tuple[int | None, ...] = (*COUNTS, None)) -> list:
    kinds = [{2: 1}, {0: 1, 5: 1}, {1: 2}]
    rows = [tiny.example(i, 8 + i % 3, kinds[i % 3], cfg, answer=3) for i in range(len(counts))]
    return [dataclasses.replace(row, tokens=n) for row, n in zip(rows, counts, strict=True)]


@pytest.mark.parametrize("way", EACH)
def test_rows_of_any_counts_are_what_they_are_alone(way: str) -> None:
    cfg = model(way)
    params, rows = tiny.on_device(tiny.weights(cfg)), rows_of(cfg)
    whole = batch(cfg, rows)
    together = np.asarray(tiny.logits(params, whole.inputs, cfg))
    assert whole.tokens_B is not None
    assert whole.tokens_B.tolist() == [*COUNTS, 4]  # the model's own, of a row that does not ask
    for number, row in enumerate(rows):
        alone = batch(cfg, [row])
        length = (alone.inputs.slots_BS >= 0).sum()
        assert length == positions(row, cfg.tokens_per_image(1))
        found = tiny.logits(params, alone.inputs, cfg)[0, :length]
        np.testing.assert_allclose(found, together[number, :length], atol=ATOL)


def test_a_row_is_what_it_is_in_a_model_of_that_one_count() -> None:
    """The composed model, through projector, pre-fusion, splice and language model."""
    cfg = model("separate")
    params = tiny.on_device(tiny.weights(cfg))
    table = np.asarray(params.compressor.query)
    for row in rows_of(cfg):
        count = cfg.tokens_per_image(1) if row.tokens is None else row.tokens
        if not count:
            continue
        plain = tiny.model("paper", grid=math.isqrt(count), prefusion_layers=1)
        start = sum(n for n in COUNTS if n < count)
        own = SimilarityCompressor(jnp.asarray(table[start : start + count]))
        of_count = dataclasses.replace(params, compressor=own)
        unasked = dataclasses.replace(row, tokens=None)
        found = tiny.logits(params, batch(cfg, [row]).inputs, cfg)
        expected = tiny.logits(of_count, batch(plain, [unasked]).inputs, plain)
        np.testing.assert_allclose(found, expected, atol=ATOL)


def test_without_tokens_the_picture_is_still_read_by_the_fused_text() -> None:
    cfg = model("prefix")
    params = tiny.on_device(tiny.weights(cfg))
    (row,) = rows_of(cfg, (0,))
    other = dataclasses.replace(row, pixels=-row.pixels)
    first, second = (tiny.logits(params, batch(cfg, [r]).inputs, cfg) for r in (row, other))
    assert np.abs(np.asarray(first - second)).max() > 0.01


def batch(cfg: LlavaMiniConfig, rows: list) -> TrainBatch:
    return tiny.batch(rows, cfg, buckets=BUCKETS)


@pytest.mark.parametrize("way", EACH)
def test_gradients_reach_every_query_over_the_counts(way: str) -> None:
    cfg = model(way)
    params = tiny.on_device(tiny.weights(cfg))
    _, grads = tiny.loss_and_grads(params, batch(cfg, rows_of(cfg, (16, 9, 4, 1, 0))), cfg)
    for path, gradient in param_tree.paths(grads).items():
        if path.startswith(("compressor", "prefusion")):
            assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path
    each = np.abs(np.asarray(grads.compressor.query)).max(axis=1)
    assert (each > 0).all()
    # Of one count alone, only the queries that it takes: else another count's would be read.
    _, grads = tiny.loss_and_grads(params, batch(cfg, rows_of(cfg, (4,) * 5)), cfg)
    touched = np.flatnonzero(np.abs(np.asarray(grads.compressor.query)).max(axis=1))
    expected = {"prefix": range(4), "grids": range(16), "separate": range(1, 5)}[way]
    assert touched.tolist() == list(expected)


@functools.partial(jax.jit, static_argnames=("cfg", "chunk"))
def sums_of(params, made: TrainBatch, cfg: LlavaMiniConfig, chunk: int = 0) -> Sums:
    return loss(params, made, cfg, chunk=chunk)[1]


def test_losses_of_each_count_add_up_to_that_of_all() -> None:
    cfg = model("grids")
    params, rows = tiny.on_device(tiny.weights(cfg)), rows_of(cfg)
    sums = sums_of(params, batch(cfg, rows), cfg)
    in_chunks = sums_of(params, batch(cfg, rows), cfg, chunk=16)
    for name, total in sums.items():
        np.testing.assert_allclose(in_chunks[name], total, rtol=1e-5, err_msg=name)
    for name in ("cross_entropy", "tokens"):
        apart = [float(sums[f"{name}_at_{n}"]) for n in COUNTS]
        assert sum(apart) == pytest.approx(float(sums[name]), rel=1e-5)
    assert [int(sums[f"rows_at_{n}"]) for n in COUNTS] == [1, 1, 2, 1, 1]
    unread = [dataclasses.replace(row, labels=row.labels * 0 + IGNORE) for row in rows]
    alone = sums_of(params, batch(cfg, [*unread[:3], rows[3], *unread[4:]]), cfg)
    np.testing.assert_allclose(sums["cross_entropy_at_9"], alone["cross_entropy"], rtol=1e-5)


def test_training_lowers_the_loss_of_every_count() -> None:
    import optax

    cfg = model("grids")
    made, optimizer = batch(cfg, rows_of(cfg, (*COUNTS, 9))), optax.adam(3e-3)
    # A copy of the weights: the state is donated.
    start = jax.tree.map(jnp.array, tiny.weights(cfg))
    state, found = init_state(start, ("compressor/*", "prefusion/*", "llm/*"), optimizer), []
    for _ in range(30):
        state, values = train_step(state, made, cfg=cfg, optimizer=optimizer)
        found.append({n: float(values[f"cross_entropy_at_{n}"]) for n in COUNTS})
    for n in COUNTS:
        assert found[-1][n] < 0.5 * found[0][n], n


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_eight_devices_give_the_loss_and_gradients_of_one(way: str) -> None:
    cfg = model(way)
    made = batch(cfg, rows_of(cfg, (0, 1, 4, 9, 16, 1, 9, 4)))
    value, grads = tiny.loss_and_grads(tiny.weights(cfg), made, cfg)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        placed = sharding.put_batch(made)
        found_value, found = tiny.loss_and_grads(place(tiny.weights(cfg), cfg), placed, cfg)
    assert float(found_value) == pytest.approx(float(value), abs=LOSS_ATOL)
    expected = param_tree.paths(grads)
    for path, gradient in param_tree.paths(found).items():
        atol = GRADIENT_ATOL + GRADIENT_RTOL * np.abs(expected[path]).max()
        np.testing.assert_allclose(gradient, expected[path], atol=atol, err_msg=path)


def test_high_resolution_compresses_the_whole_map() -> None:
    """2 x 2 parts and the whole image: the same queries on a map of twice the side."""
    cfg = model("separate")
    params = tiny.on_device(tiny.weights(cfg))
    row = tiny.example(0, 8, {2: 1}, cfg, parts=5, answer=2)
    plain = tiny.model("paper", grid=3, prefusion_layers=1)
    own = SimilarityCompressor(params.compressor.query[5:14])
    found = tiny.logits(params, batch(cfg, [dataclasses.replace(row, tokens=9)]).inputs, cfg)
    of_count = dataclasses.replace(params, compressor=own)
    expected = tiny.logits(of_count, batch(plain, [row]).inputs, plain)
    np.testing.assert_allclose(found, expected, atol=ATOL)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(way="onion"), 'no way "onion"; use one of prefix, grids, separate'),
        (dict(counts=(0, 1, 5)), "give square numbers that grow"),
        (dict(counts=(1, 1)), "give square numbers that grow"),
        (dict(counts=(-1, 4)), "give square numbers that grow"),
        (dict(counts=(0,), count=0), "give one above 0"),
        (dict(count=3), "nested has no 3 tokens; use one of 0, 1, 4, 9, 16"),
        (dict(width=30), "not a multiple of 4"),
    ],
)
def test_a_wrong_configuration_is_told_in_a_sentence(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        NestedConfig(**dict(way="grids", width=D, counts=COUNTS, count=4) | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(prefusion_layers=0), "would leave nothing of an image"),
        (dict(fuse_compressed=True), "set fuse_compressed to false"),
        (dict(prefusion_layers=0, inside_layers=1), "set inside_layers to 0|nothing of an image"),
        (dict(compress="features"), 'cannot be put at compress "features"'),
        (dict(compressor=config("grids", counts=(1, 25), count=1)), "give counts up to 16"),
    ],
)
def test_a_model_that_cannot_have_one_says_so(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(model("grids"), **changes)
