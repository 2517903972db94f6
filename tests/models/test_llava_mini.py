"""The composition: high resolution, variants that must run, gradients, sizes of named models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import config as configs
from llava_mini_jax import params as param_tree
from llava_mini_jax.data.batches.examples import Buckets, fused_places
from llava_mini_jax.models import clip, llama, llava_mini, prefusion
from llava_mini_jax.models.parts import detail_and_whole
from tests import tiny

fast_compilation = tiny.fast_compilation

# float32 in another order of the same sums, through two layers of values of order 1.
ATOL = 1e-5

apply_whole = jax.jit(prefusion.apply_whole, static_argnames="cfg")
prefuse_image = jax.jit(prefusion.prefuse_image, static_argnames=("outputs", "cfg", "remat"))
prefuse_text = jax.jit(prefusion.prefuse_text, static_argnames=("cfg", "remat"))
encode_images = jax.jit(llava_mini.encode_images, static_argnames="cfg")
tower = jax.jit(clip.apply, static_argnames=("cfg", "dtype"))


@pytest.mark.parametrize(("k", "side"), [(1, 4), (2, 3), (3, 2)])
def test_sub_images_become_one_row_major_map(k: int, side: int) -> None:
    images, parts, width = 2, k * k + 1, 5
    features = np.random.default_rng(0).standard_normal((images * parts, side * side, width))
    detail, whole = detail_and_whole(jnp.asarray(features), images, parts)
    assert detail.shape == (images, (k * side) ** 2, width)
    for i in range(images):
        for y in range(k * side):
            for x in range(k * side):
                part = i * parts + (y // side) * k + x // side
                patch = (y % side) * side + x % side
                np.testing.assert_array_equal(
                    detail[i, y * k * side + x], jnp.asarray(features)[part, patch]
                )
        np.testing.assert_array_equal(whole[i], jnp.asarray(features)[i * parts + parts - 1])


def test_a_single_part_is_both() -> None:
    features = jnp.ones((3, 16, 5))
    detail, whole = detail_and_whole(features, 3, 1)
    assert detail is features and whole is None


def test_parts_that_are_no_square_and_a_whole() -> None:
    with pytest.raises(ValueError, match="4 parts are not"):
        detail_and_whole(jnp.ones((4, 16, 5)), 1, 4)


VARIANTS = {
    "C=3": dict(dialect="paper", grid=3),
    "release, C=2": dict(dialect="release", grid=2),
    "one pre-fusion layer": dict(dialect="paper", prefusion_layers=1),
    "three pre-fusion layers": dict(dialect="release", prefusion_layers=3),
    "no pre-fusion": dict(dialect="release", prefusion_layers=0),
    "linear projector": dict(dialect="release", projector="linear"),
    "average pooling": dict(dialect="paper", compressor="average_pool"),
    "no compression, fused patches": dict(dialect="release", compressor="none", prefusion_layers=1),
    "no compression, patches around pre-fusion": dict(
        dialect="paper", compressor="none", prefusion_layers=1
    ),
    "LLaVA-1.5": dict(dialect="llava-1.5"),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
@pytest.mark.parametrize("parts", [1, 5])
def test_every_variant_has_its_sequence_length(variant: dict, parts: int) -> None:
    """Traced, not run: shapes show that the parts fit together; the run of each is below."""
    cfg = tiny.model(**variant)
    examples = [tiny.example(0, 9, {1: 2}, cfg, parts=parts), tiny.example(1, 5, {}, cfg)]
    patches = 16 * parts if cfg.compressor.kind == "none" else cfg.compressor.grid**2
    assert cfg.tokens_per_image(parts) == patches
    buckets = tiny.Buckets(lengths=(9, 8 + 2 * patches), images=(2,))
    batch = tiny.batch(examples, cfg, buckets=buckets)
    assert (batch.inputs.slots_BS >= 0).sum(axis=1).tolist() == [8 + 2 * patches, 5]
    params = param_tree.abstract(llava_mini.spec(cfg))
    out = jax.eval_shape(lambda p, i: tiny.logits(p, i, cfg), params, batch.inputs)
    assert out.shape == (2, 8 + 2 * patches, cfg.llm.vocab_size)


RUN = ["no pre-fusion", "linear projector", "no compression, fused patches"]


@pytest.mark.parametrize("name", RUN)
def test_variants_see_the_picture(name: str) -> None:
    cfg = tiny.model(**VARIANTS[name])
    batch = tiny.batch([tiny.example(0, 9, {1: 1}, cfg)], cfg, buckets=tiny.Buckets((16, 32), (1,)))
    params, inputs = tiny.weights(cfg), batch.inputs
    before = tiny.logits(params, inputs, cfg)
    after = tiny.logits(params, inputs.replace(pixels_BIJYXC=inputs.pixels_BIJYXC + 0.1), cfg)
    assert bool(jnp.isfinite(before).all())
    real = np.asarray(inputs.slots_BS) >= 0
    assert np.abs(np.asarray(before - after)[real]).max() > 0.01


def test_fused_patches_are_what_comes_out_of_pre_fusion() -> None:
    """`fuse_compressed` with compressor "none": each patch is a token, read after pre-fusion."""
    cfg = tiny.model(**VARIANTS["no compression, fused patches"])
    params = tiny.on_device(tiny.weights(cfg))
    e = tiny.example(0, 6, {1: 1}, cfg)
    text = llava_mini.embed_text(params, jnp.asarray(e.ids)[None], cfg)
    fuse = jnp.asarray(e.fuse)[None]
    (places,) = np.nonzero(e.fuse)
    tokens, fused = encode_images(params, jnp.asarray(e.pixels), text[:, places], cfg)
    patches, _ = llava_mini.encode_and_compress(params, jnp.asarray(e.pixels), cfg)
    whole, _, _ = apply_whole(params.prefusion, patches, text, fuse, cfg.llm)
    np.testing.assert_allclose(tokens, whole[:, :16], atol=ATOL)
    np.testing.assert_allclose(fused[0], whole[:, 16:][fuse], atol=ATOL)


@pytest.fixture(scope="module")
def split_at_the_image():
    cfg = tiny.release_model()
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((2, 18, cfg.llm.width)), jnp.float32)
    text = jnp.asarray(rng.standard_normal((2, 7, cfg.llm.width)), jnp.float32)
    fuse = rng.random((2, 7)) < 0.6
    return cfg, tiny.on_device(tiny.weights(cfg)).prefusion, image, text, fuse


def fused_in_place(params, memory, text, fuse, cfg, size: int = 7):
    """`prefuse_text` of the positions that take part, put back among the others."""
    places = fused_places(fuse, size)
    taken = prefusion.take_fused(text, places)
    fused = prefuse_text(params, memory, taken, cfg.llm, remat="none")
    return prefusion.put_fused(text, fused, places)


@pytest.mark.parametrize("outputs", [0, 1, 4])
def test_reading_the_image_first_equals_pre_fusion_in_one_piece(
    split_at_the_image, outputs: int
) -> None:
    cfg, params, image, text, fuse = split_at_the_image
    whole, _, _ = apply_whole(params, image, text, fuse, cfg.llm)
    tokens, memory = prefuse_image(params, image, outputs, cfg.llm, remat="none")
    fused = fused_in_place(params, memory, text, fuse, cfg)
    assert tokens.shape[1] == outputs
    np.testing.assert_allclose(tokens, whole[:, 18 - outputs : 18], atol=ATOL)
    np.testing.assert_allclose(fused[fuse], whole[:, 18:][fuse], atol=ATOL)
    np.testing.assert_array_equal(fused[~fuse], text[~fuse])


def test_text_that_is_not_fused_is_seen_by_none(split_at_the_image) -> None:
    cfg, params, image, text, fuse = split_at_the_image
    _, memory = prefuse_image(params, image, 0, cfg.llm, remat="none")
    before = fused_in_place(params, memory, text, fuse, cfg)
    noise = jnp.where(fuse[..., None], text, 50.0)
    after = fused_in_place(params, memory, noise, fuse, cfg)
    np.testing.assert_array_equal(before[fuse], after[fuse])
    # What pads the places is nobody's either: not the last position's, which -1 would be.
    most = int(fuse.sum(axis=1).max())
    tight = fused_in_place(params, memory, text, fuse, cfg, size=most)
    np.testing.assert_allclose(tight, before, atol=ATOL)
    np.testing.assert_array_equal(tight[~fuse], text[~fuse])


def test_the_release_gives_the_embedding_table_no_gradient_and_the_paper_does() -> None:
    for cfg, learns in ((tiny.release_model(), False), (tiny.model("paper"), True)):
        ids = jnp.array([[3, 4, 5]])

        def total(table, cfg=cfg, ids=ids):
            params = tiny.on_device(tiny.weights(cfg))
            params = params.replace(llm=params.llm.replace(embed_tokens=table))
            return llava_mini.embed_text(params, ids, cfg).sum()

        gradient = jax.grad(total)(jnp.asarray(tiny.weights(cfg).llm.embed_tokens))
        assert bool((gradient[3:6] == 1).all()) == learns
        assert bool((gradient == 0).all()) != learns


def test_every_parameter_that_takes_part_gets_a_gradient() -> None:
    cfg = tiny.release_model()
    _, grads = tiny.loss_and_grads(tiny.weights(cfg), tiny.training_batch(cfg), cfg)
    for path, gradient in param_tree.paths(grads).items():
        # The release detaches the text's embeddings and reads patches before the tower's end.
        still = path == "llm/embed_tokens" or path.startswith("vision/unread")
        assert bool((gradient == 0).all()) == still, path


def test_unrolled_trees_have_the_same_leaves() -> None:
    cfg = tiny.release_model()
    params = tiny.weights(cfg)
    loose = llava_mini.unrolled(params)
    np.testing.assert_array_equal(loose.llm.layers[1].q_proj, params.llm.layers.q_proj[1])
    np.testing.assert_array_equal(
        loose.prefusion.layers[0].down_proj, params.prefusion.layers.down_proj[0]
    )
    np.testing.assert_array_equal(
        loose.vision.layers[1].fc1.kernel, params.vision.layers.fc1.kernel[1]
    )
    assert (
        param_tree.count(loose)
        == param_tree.count(params)
        == param_tree.count(llava_mini.unrolled(llava_mini.spec(cfg)))
    )
    specs = param_tree.paths(llava_mini.unrolled(llava_mini.spec(cfg)))
    arrays = param_tree.paths(loose)
    assert {p: s.shape for p, s in specs.items()} == {p: a.shape for p, a in arrays.items()}


def test_the_tower_runs_only_what_is_read() -> None:
    cfg = tiny.VISION
    assert cfg.used_layers == 2
    for select, layers in ((-1, 3), (-2, 2), (-4, 0), (0, 0), (3, 3)):
        assert dataclasses.replace(cfg, select_layer=select).used_layers == layers
    for select in (-5, 4):
        with pytest.raises(ValueError, match=f"select_layer {select} of a tower of 3 layers"):
            dataclasses.replace(cfg, select_layer=select)
    spec = clip.spec(cfg)
    assert spec.layers.fc1.kernel.shape[0] == 2 and spec.unread_layers.fc1.kernel.shape[0] == 1


def test_uint8_pixels_are_normalised_on_the_device() -> None:
    cfg = tiny.VISION
    params = tiny.on_device(tiny.weights(tiny.release_model()).vision)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    normal = ((pixels / 255.0 - configs.CLIP_MEAN) / configs.CLIP_STD).astype(np.float32)
    found = tower(params, jnp.asarray(pixels), cfg, jnp.dtype("float32"))
    assert found.shape == (2, 16, 32)
    np.testing.assert_allclose(
        found, tower(params, jnp.asarray(normal), cfg, jnp.dtype("float32")), atol=10 * ATOL
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(prefusion_layers=-1), "-1 pre-fusion layers; give 0"),
        (dict(grid=0), "grid is 0; give 1 or more"),
        (
            dict(vision=dict(select_feature="cls_patch")),
            'vision feature "cls_patch"; expected "patch"',
        ),
    ],
)
def test_what_is_no_model(change, said) -> None:
    with pytest.raises(ValueError, match=said):
        if "vision" in change:
            change = {"vision": dataclasses.replace(tiny.VISION, **change["vision"])}
        tiny.model("release", **change)


@pytest.mark.parametrize(
    ("name", "llm", "vision"),
    [
        ("smollm2-135m", 134_515_008, 85_843_200),
        ("smollm2-360m", 361_821_120, 85_843_200),
        ("smollm2-1.7b", 1_711_376_384, 413_018_352),
        ("qwen2.5-0.5b", 494_032_768, 85_843_200),
        ("qwen2.5-3b", 3_085_938_688, 413_018_352),
        ("qwen2.5-7b", 7_615_616_512, 413_018_352),
        ("qwen3-4b", 4_022_468_096, 413_018_352),
    ],
)
def test_sizes_of_todays_models(name: str, llm: int, vision: int) -> None:
    """Parameters as their model cards and safetensors headers count them; of the towers those of
    transformers' vision model without its pooling head."""
    cfg = configs.build(configs.backbone(name), configs.tower_of(name), "paper")
    abstract = param_tree.abstract(llava_mini.spec(cfg))
    assert param_tree.count(abstract.llm) == llm
    assert param_tree.count(abstract.vision) == vision


# LLaMA's and CLIP's own papers and model cards: 6.738e9, 8.030e9, 13.016e9 and 0.3035e9.
@pytest.mark.parametrize(
    ("llm", "size"),
    [(configs.VICUNA_7B, 6.738e9), (configs.LLAMA_3_1_8B, 8.030e9), (configs.VICUNA_13B, 13.016e9)],
    ids=["vicuna-7b", "llama-3.1-8b", "vicuna-13b"],
)
@pytest.mark.parametrize("dialect", ["paper", "release"])
def test_sizes_of_the_named_models(llm: llama.LlamaConfig, size: float, dialect: str) -> None:
    cfg = configs.build(llm, configs.CLIP_L_336, dialect)
    abstract = param_tree.abstract(llava_mini.spec(cfg))
    assert param_tree.count(abstract.llm) == pytest.approx(size, rel=1e-4)
    assert param_tree.count(abstract.vision) == pytest.approx(0.3035e9, rel=1e-4)
    assert (
        param_tree.count(abstract.prefusion)
        == 4 * param_tree.count(abstract.llm.layers) // llm.layers
    )
    D, E = llm.width, 1024
    assert param_tree.count(abstract.projector) == E * D + D + D * D + D
    expected = D if dialect == "paper" else 4 * E * E + 4 * E + 2 * E + 4 * E
    assert param_tree.count(abstract.compressor) == expected


def test_abstract_is_what_init_makes() -> None:
    cfg = tiny.LLM
    spec = llama.spec(cfg)
    made = param_tree.init(jax.random.key(0), spec, jnp.bfloat16)
    expected = param_tree.paths(param_tree.abstract(spec, jnp.bfloat16))
    for path, array in param_tree.paths(made).items():
        assert (array.shape, array.dtype) == (expected[path].shape, expected[path].dtype), path
    assert isinstance(expected["lm_head"], jax.ShapeDtypeStruct)
    table = np.asarray(made.layers.q_proj, np.float32)
    assert table.std() == pytest.approx(0.02, rel=0.05)
    assert np.abs(table[0] - table[1]).max() > 0.01, "layers must differ"
    assert np.abs(np.asarray(made.lm_head - made.embed_tokens)).max() > 0.01
    np.testing.assert_array_equal(made.final_norm, np.ones(cfg.width))


@pytest.mark.parametrize("name", ["paper", pytest.param("release", marks=pytest.mark.slow)])
def test_long_videos_are_recomputed_a_few_frames_at_a_time(name: str) -> None:
    """Forty frames beside an image: loss and gradients stay, the memory between passes goes."""
    together = tiny.model(name, grid=1)
    rows = [tiny.example(1, 12, {2: 40}, together, answer=3)]
    rows.append(tiny.example(2, 9, {1: 1}, together, answer=2))
    batch = tiny.batch(rows, together, buckets=Buckets(lengths=(16, 64), images=(40,)))
    params = tiny.on_device(tiny.weights(together))
    chunked = dataclasses.replace(together, remat="full")
    (ours, our_grads), (theirs, their_grads) = (
        tiny.loss_and_grads(params, batch, cfg) for cfg in (chunked, together)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    for path, leaf in param_tree.paths(their_grads).items():
        found = param_tree.paths(our_grads)[path]
        np.testing.assert_allclose(found, leaf, atol=1e-5 * np.abs(leaf).max() + 1e-6, err_msg=path)

    def kept(cfg) -> int:
        """Bytes of temporaries of the compiled gradient, whole videos together or not."""
        compiled = tiny.loss_and_grads.lower(params, batch, cfg).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert kept(chunked) < 0.6 * kept(together)


def test_padding_on_a_side_that_is_not_told_changes_nothing() -> None:
    cfg = tiny.model("paper")
    params = tiny.on_device(tiny.weights(cfg))
    rows = [tiny.example(seed, 6 + 3 * seed, {1: 1}, cfg) for seed in range(2)]
    told = tiny.batch(rows, cfg, padding_side="left").inputs
    assert told.padding_side == "left" and (told.slots_BS[:, 0] < 0).any()
    expected, unsaid, wrong = (
        np.asarray(tiny.logits(params, dataclasses.replace(told, padding_side=side), cfg))
        for side in ("left", None, "right")
    )
    real = np.asarray(told.slots_BS) >= 0
    np.testing.assert_array_equal(unsaid[real], expected[real])
    assert np.abs(wrong[real] - expected[real]).max() > 0.01  # why it is not the default
