"""Import and export: bit for bit in every layout and type, on one device and eight, and strict."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoProcessor, LlavaProcessor

from llava_mini_jax import config as configs
from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.config import Bundle
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.data.media.images import preprocess
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.compressors import CompressorConfig
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.tensorfiles.save import save_tensors
from llava_mini_jax.weights import names
from llava_mini_jax.weights.export_hf import export_model, published_tensors
from llava_mini_jax.weights.export_json import config_files
from llava_mini_jax.weights.folders import open_model, open_parts
from llava_mini_jax.weights.import_hf import load_params
from llava_mini_jax.weights.lazy_params import start_from_parts
from tests import golden_backbones, tiny
from tests.tiny_compressors import METHODS
from tests.tiny_model import language_config

fast_compilation = tiny.fast_compilation

RELEASE = Path(__file__).parents[1] / "golden" / "model" / "hd_c2"
GREY_LEVEL = 0.02  # a grey level and a half, normalised: Pillow's versions round differently
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def bundle(model: LlavaMiniConfig, **image_changes: Any) -> Bundle:
    images = configs.image_config("release", model.vision)
    return Bundle(
        model=model,
        images=dataclasses.replace(images, **image_changes),
        prompt=configs.prompt_config("release", "vicuna_v1", 200, "left"),
        eos_ids=(2, 5),
        pad_id=3,
    )


def opened(folder: Path, dtype: str, unrolled: bool = False, **options: Any):
    found, published = open_model(folder, compute_dtype="float32", **options)
    return found, load_params(found, published, dtype=dtype, unrolled=unrolled)


def assert_same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].tobytes() == array.tobytes(), name


def assert_same_params(found: LlavaMini, expected: LlavaMini) -> None:
    ours, theirs = (param_tree.paths(tree) for tree in (found, expected))
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert np.asarray(ours[path]).tobytes() == np.asarray(array).tobytes(), path


def random_bits(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    """Any finite number of a type: tiny ones, huge ones, both zeros."""
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    values = np.frombuffer(bits, dtype).reshape(shape).copy()
    with np.errstate(invalid="ignore"):
        values[~np.isfinite(values.astype(np.float64))] = -0.0
    return values


@pytest.fixture(scope="module", params=DTYPES)
def release(request, tmp_path_factory: pytest.TempPathFactory):
    """(dtype, a folder as the release saves it, its tensors), with every kind of bit pattern."""
    folder = tmp_path_factory.mktemp(request.param) / "case"
    shutil.copytree(RELEASE, folder)
    tensors = {
        name: random_bits(array.shape, DTYPES[request.param], seed)
        for seed, (name, array) in enumerate(load_file(folder / "model/model.safetensors").items())
    }
    save_file(tensors, folder / "model" / "model.safetensors")
    return request.param, folder / "model", tensors


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_release_comes_back_bit_for_bit(release, unrolled: bool, tmp_path: Path) -> None:
    dtype, folder, tensors = release
    found, params = opened(folder, dtype, unrolled)
    assert len(param_tree.paths(params.vision.unread_layers)) == 16
    export_model(params, found, tmp_path / "out")
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    again, params_again = opened(tmp_path / "out", dtype, unrolled)
    assert again.model == found.model and again.prompt == found.prompt
    assert again == found
    assert_same_params(params_again, params)


def test_a_file_of_another_type_is_converted() -> None:
    _, single = opened(RELEASE / "model", "float32")
    _, half = opened(RELEASE / "model", "bfloat16")
    assert_same_params(half, jax.tree.map(lambda a: a.astype(jnp.bfloat16), single))


def write(folder: Path, cfg: LlavaMiniConfig, layout: str, *, format: str = "release", **options):
    """A model folder with random weights in a layout, and those weights."""
    folder.mkdir(parents=True)
    params = tiny.weights(cfg)
    for name, content in config_files(bundle(cfg), format).items():
        (folder / name).write_text(json.dumps(content))
    save_tensors(folder, published_tensors(params, cfg, names.LAYOUTS[layout]), **options)
    return params


@pytest.mark.parametrize(
    ("layout", "format"),
    [("release", "llava-1.5"), ("llava-hf", "llava-hf"), ("llava-hf-4.52", "llava-hf")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_llava_1_5_layouts_come_back(layout: str, format: str, dtype: str, tmp_path: Path) -> None:
    cfg = tiny.model("llava-1.5")
    write(tmp_path / "in", cfg, layout, format=format)
    tensors = {
        name: array.astype(DTYPES[dtype])
        for name, array in load_file(tmp_path / "in" / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    found, params = opened(tmp_path / "in", dtype)
    assert found.model.llm == cfg.llm and found.model.vision == cfg.vision
    assert (found.model.compressor.kind, found.model.prefusion_layers) == ("none", 0)
    export_model(params, found, tmp_path / "out", format=format)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    if layout == "llava-hf-4.52":  # read in both spellings, written in the first one
        _, again = opened(tmp_path / "out", dtype)
        assert_same_params(again, params)
        tensors = dict(published_tensors(params, cfg, names.LAYOUTS["llava-hf"]))
    assert_same_tensors(exported, tensors)


def compressed(compressor: CompressorConfig) -> LlavaMiniConfig:
    return tiny.model("paper", compressor=compressor, prefusion_layers=0)


VARIANTS = {
    "paper": tiny.model("paper"),
    "release with rope scaling": tiny.release_model(),
    "linear projector": tiny.model("release", projector="linear"),
    "average pooling": tiny.model("paper", compressor="average_pool", grid=3),
    "no pre-fusion": tiny.model("release", prefusion_layers=0),
    "no compression": tiny.model("release", compressor="none"),
    "llava-1.5": tiny.model("llava-1.5"),
    **{name: compressed(cfg) for name, cfg in METHODS.items()},
    "tied head": tiny.model("paper", dataclasses.replace(tiny.LLM, tied_head=True)),
    "another tower": tiny.model(
        "release",
        vision=dataclasses.replace(
            tiny.VISION,
            select_layer=-1,
            activation="gelu",
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.3, 0.4),
        ),
    ),
}


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=list(VARIANTS))
def test_our_own_exports_say_everything(cfg: LlavaMiniConfig, tmp_path: Path) -> None:
    changes = dict(split="pad_then_split", aspect="crop", grid=2)
    params, given = tiny.weights(cfg), bundle(cfg, **changes)
    export_model(params, given, tmp_path / "model")
    found, again = opened(tmp_path / "model", "float32")
    assert found == given
    assert_same_params(again, params)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }


def test_sharded_files_with_an_index(tmp_path: Path) -> None:
    cfg = tiny.release_model()
    params = write(tmp_path / "model", cfg, "release", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "model").glob("model-*-of-*.safetensors"))
    assert len(shards) > 5 and (tmp_path / "model" / "model.safetensors.index.json").is_file()
    _, found = opened(tmp_path / "model", "float32")
    assert_same_params(found, params)
    shards[2].unlink()
    with pytest.raises(InputError, match=shards[2].name):
        opened(tmp_path / "model", "float32")


def split_tower(folder: Path, tower: Path, *, full_clip: bool) -> None:
    """Moves an embedded tower into a folder of its own, as openai publishes it."""
    tensors = load_file(folder / "model.safetensors")
    prefix = names.LAYOUTS["release"].vision
    own = {n.replace(prefix, "vision_model."): a for n, a in tensors.items() if prefix in n}
    assert own
    save_file({n: a for n, a in tensors.items() if prefix not in n}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    vision = values.pop("vision_config")
    if full_clip:
        vision = {"model_type": "clip", "text_config": {}, "vision_config": vision}
        own["text_model.final_layer_norm.weight"] = np.ones(3, np.float32)
        own["visual_projection.weight"] = np.ones((3, 3), np.float32)
        own["logit_scale"] = np.array(1.0, np.float32)
        own["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps(vision))
    shutil.copy(folder / "preprocessor_config.json", tower)
    save_file(own, tower / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**values, "mm_vision_tower": tower.name}))


@pytest.mark.parametrize("full_clip", [False, True])
def test_a_tower_in_its_own_folder(full_clip: bool, tmp_path: Path) -> None:
    cfg = tiny.release_model()
    params = write(tmp_path / "model", cfg, "release")
    split_tower(tmp_path / "model", tmp_path / "tower", full_clip=full_clip)
    found, again = opened(tmp_path / "model", "float32")
    assert found.model == cfg
    assert_same_params(again, params)
    (tmp_path / "tower").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match='the vision tower "tower" is neither a folder'):
        opened(tmp_path / "model", "float32")
    _, again = opened(tmp_path / "model", "float32", vision_tower=tmp_path / "elsewhere")
    assert_same_params(again, params)


def test_an_embedded_tower_wins_over_its_folder() -> None:
    """As does the release when it trains the tower; published ones are equal anyway."""
    found, published = open_model(RELEASE / "model", compute_dtype="float32")
    assert len(published) == 1 and found.model.vision.image_size == 56


def test_parts_of_a_training_run(tmp_path: Path) -> None:
    cfg = tiny.model("paper")
    params = write(tmp_path / "model", cfg, "release")
    split_tower(tmp_path / "model", tmp_path / "clip", full_clip=True)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    llm = {n: a for n, a in tensors.items() if n.startswith(("model.layers", "lm_head"))}
    llm |= {n: tensors[n] for n in ("model.embed_tokens.weight", "model.norm.weight")}
    llm["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    (tmp_path / "llm").mkdir()
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(language_config(values)))
    save_file(llm, tmp_path / "llm" / "model.safetensors")
    started, found = start_from_parts(
        tmp_path / "clip",
        tmp_path / "llm",
        dialect="paper",
        grid=cfg.compressor.grid,
        prefusion_layers=cfg.prefusion_layers,
        prefusion_init="fresh",
        seed=0,
        dtype="float32",
    )
    assert (started.model.vision, started.model.llm) == (cfg.vision, cfg.llm)
    new = ("projector/*", "compressor/*", "prefusion/*")
    ours, theirs = (param_tree.paths(t) for t in (found, llava_mini.unrolled(params)))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        same = np.asarray(leaf).tobytes() == np.asarray(theirs[path]).tobytes()
        assert same != param_tree.matches(path, new), path
    _, _, published = open_parts(tmp_path / "clip", tmp_path / "llm")
    with pytest.raises(InputError, match="missing for compressor/query"):
        load_params(bundle(cfg), published, dtype="float32", unrolled=False)


@pytest.mark.parametrize("format", ["release", "llava-hf", "beside"])
def test_a_training_run_may_begin_with_the_tower_of_a_whole_model(
    format: str, tmp_path: Path
) -> None:
    """Which says by its own config what of the tower is read; its other tensors are left out."""
    cfg = tiny.model("llava-1.5", vision=dataclasses.replace(tiny.VISION, select_layer=-1))
    layout = "release" if format == "beside" else format
    params = write(tmp_path / "model", cfg, layout, format=layout)
    if format == "beside":
        split_tower(tmp_path / "model", tmp_path / "tower", full_clip=True)
    golden = golden_backbones.FOLDER / "qwen3"
    started, found = start_from_parts(
        tmp_path / "model",
        golden,
        dialect="paper",
        grid=1,
        prefusion_layers=0,
        prefusion_init="fresh",
        seed=0,
        dtype="float32",
    )
    assert started.model.vision == cfg.vision
    assert started.model.llm == open_parts(tmp_path / "model", golden)[1] != cfg.llm
    assert_same_params(found.vision, llava_mini.unrolled(params).vision)


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 2)], ids=str)
def test_eight_devices_read_what_one_reads(mesh, unrolled: bool) -> None:
    _, alone = opened(RELEASE / "model", "float32", unrolled)
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        found, params = opened(RELEASE / "model", "float32", unrolled)
        spec = llava_mini.spec(found.model)
        spec = llava_mini.unrolled(spec) if unrolled else spec
        abstract = param_tree.paths(param_tree.abstract(spec))
    assert_same_params(params, alone)
    split = 0
    for path, array in param_tree.paths(params).items():
        assert array.sharding.spec == abstract[path].sharding.spec, path
        split += not array.sharding.is_fully_replicated
    assert split > 20


# ------------------------------------------------------------------------------------- strictness


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[tuple[Path, dict[str, np.ndarray]]]:
    """A folder and its tensors, to be changed and written by the test."""
    shutil.copytree(RELEASE, tmp_path / "case")
    folder = tmp_path / "case" / "model"
    return folder, load_file(folder / "model.safetensors")


def test_all_that_does_not_fit_is_named_at_once(damaged) -> None:
    folder, tensors = damaged
    del tensors["model.compressor.query"], tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.ones((2, 3), np.float32)
    tensors["model.image_newline"] = np.ones(64, np.float32)
    tensors["model.mm_projector.0.weight"] = np.ones((64, 47), np.float32)
    tensors["model.compressor.attn.in_proj_bias"] = np.ones(143, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError) as caught:
        opened(folder, "float32")
    lines = str(caught.value).splitlines()
    assert str(folder) in lines[0]
    assert "LLaVA-NeXT's newline" in lines[1]
    problems = {line.strip() for line in lines[2:-1]}
    assert problems == {
        "missing for compressor/query: model.compressor.query",
        "missing for llm/layers/q_proj: model.layers.1.self_attn.q_proj.weight",
        f"unexpected in {folder}: model.layers.7.mlp.up_proj.weight (2, 3)",
        f"unexpected in {folder}: model.image_newline (64,)",
        "wrong shape: model.mm_projector.0.weight is (64, 47), but projector/fc1/kernel needs "
        "(64, 48)",
        *(
            "wrong shape: model.compressor.attn.in_proj_bias is (143,), "
            f"but compressor/{name}/bias needs (8, 6) x 3"
            for name in ("q_proj", "k_proj", "v_proj")
        ),
        "wrong shape: lm_head.weight is (64, 256), but llm/lm_head needs (256, 64)",
    }
    assert f"{len(problems)} tensors do not match the model" in lines[0]


def test_many_missing_layers_are_counted(tmp_path: Path) -> None:
    cfg = tiny.model("llava-1.5", dataclasses.replace(tiny.LLM, layers=6))
    write(tmp_path / "model", cfg, "release")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    kept = {n: a for n, a in tensors.items() if not n.endswith("mlp.up_proj.weight")}
    save_file(kept, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match=r"missing for llm/layers/up_proj: .* and 3 more"):
        opened(tmp_path / "model", "float32")


def test_a_head_beside_a_tied_table_is_no_error(tmp_path: Path) -> None:
    cfg = tiny.model("release", dataclasses.replace(tiny.LLM, tied_head=True))
    params = write(tmp_path / "model", cfg, "release")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    found, again = opened(tmp_path / "model", "float32")
    assert found.model.llm.tied_head and again.llm.lm_head is None
    assert_same_params(again, params)


def test_nothing_is_written_where_something_is_or_half_way(tmp_path: Path) -> None:
    cfg = tiny.model("paper")
    params, given = tiny.weights(cfg), bundle(cfg)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        export_model(params, given, tmp_path / "full")
    with pytest.raises(InputError, match='format "onnx" is unknown; use one of release'):
        export_model(params, given, tmp_path / "out", format="onnx")
    with pytest.raises(InputError, match='"llava-hf" has no place for compressor and pre-fusion'):
        export_model(params, given, tmp_path / "out", format="llava-hf")
    broken = dataclasses.replace(params, compressor=dataclasses.replace(params.compressor, query=7))
    with pytest.raises(ValueError, match="reshape"):
        export_model(broken, given, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    export_model(params, given, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_tokenizer_files_are_taken_over(tmp_path: Path) -> None:
    cfg = tiny.model("llava-1.5")
    (tmp_path / "from").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "x.txt"):
        (tmp_path / "from" / name).write_text(name)
    export_model(tiny.weights(cfg), bundle(cfg), tmp_path / "out", copy_from=tmp_path / "from")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    assert not (tmp_path / "out" / "x.txt").exists()


def test_public_towers_keep_their_name(tmp_path: Path) -> None:
    """LLaVA's own code builds no tower that is called anything else."""
    public = dataclasses.replace(configs.CLIP_L_336, select_layer=-1)
    for vision, name in ((public, "openai/clip-vit-large-patch14-336"), (tiny.VISION, "vision")):
        for model in (tiny.model("release", vision=vision), tiny.model("llava-1.5", vision=vision)):
            config = config_files(bundle(model), "release")["config.json"]
            assert config["mm_vision_tower"] == name
    # The embedded copy is read, without any network.
    export_model(tiny.weights(tiny.release_model()), bundle(tiny.release_model()), tmp_path / "m")
    values = json.loads((tmp_path / "m/config.json").read_text())
    values["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    (tmp_path / "m/config.json").write_text(json.dumps(values))
    found, params = opened(tmp_path / "m", "float32")
    assert found.model.vision == tiny.VISION
    assert_same_params(params, tiny.weights(tiny.release_model()))


@pytest.mark.parametrize("spare", [0, 7], ids=["a full table", "rows to spare"])
def test_transformers_finds_pictures_in_a_llava_hf_folder(spare: int, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    words = len(tokenizer)
    cfg = tiny.model("llava-1.5", dataclasses.replace(tiny.LLM, vocab_size=words + spare))
    params, given = tiny.weights(cfg), bundle(cfg, aspect="crop")
    export_model(params, given, tmp_path / "hf", format="llava-hf", tokenizer=tokenizer)
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    rows = words + max(1, spare)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert len(tensors[name]) == config.text_config.vocab_size == rows > config.image_token_id
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert isinstance(processor, LlavaProcessor)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3)).astype(np.uint8)
    read = processor(text="what is <image>?", images=Image.fromarray(pixels), return_tensors="np")
    assert (read["input_ids"] == config.image_token_id).sum() == cfg.vision.grid**2
    assert config.image_seq_length == cfg.vision.grid**2
    (parts,) = preprocess(Image.fromarray(pixels), given.images)
    ours = (parts / 255.0 - cfg.vision.mean) / cfg.vision.std
    theirs = np.asarray(read["pixel_values"])[0].transpose(1, 2, 0)
    np.testing.assert_allclose(theirs, ours, atol=GREY_LEVEL)
    found, again = opened(tmp_path / "hf", "float32")
    assert found.model.llm == cfg.llm
    assert_same_params(again, params)


def test_a_part_of_the_parameters_keeps_its_names() -> None:
    cfg, layout = tiny.release_model(), names.LAYOUTS["release"]
    params = tiny.weights(cfg)
    some, _ = param_tree.split(params, lambda path: path.startswith(("projector/", "llm/layers/")))
    partly = dict(published_tensors(some, cfg, layout))
    whole = dict(published_tensors(params, cfg, layout))
    expected = {
        n: a for n, a in whole.items() if "mm_projector" in n or n.startswith("model.layers")
    }
    assert_same_tensors(partly, expected)


FOREIGN = {
    "a field that is missing": (
        dict(kind="mqt", width=32),
        'of kind "mqt" with the fields kind, width; expected kind, width, out_width',
    ),
    "a field of another type": (dict(count="4"), "compressor.count is '4', expected int"),
    "a count that it does not have": (dict(count=5), "m3 has no 5 tokens of 4 x 4 patches"),
    "a list that holds no numbers": (
        dataclasses.asdict(METHODS["token_packer"]) | dict(levels=[1, "2"]),
        "compressor.levels is .*, expected whole numbers",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_a_method_cannot_be_is_said(case: str, tmp_path: Path) -> None:
    said, message = FOREIGN[case]
    cfg = compressed(METHODS["m3"])
    export_model(tiny.weights(cfg), bundle(cfg), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    own = config["llava_mini_jax"]["model"]["compressor"]
    config["llava_mini_jax"]["model"]["compressor"] = said if "kind" in said else own | said
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "model", "float32")


def test_a_weight_with_its_inputs_first_is_not_made_int8(tmp_path: Path) -> None:
    """A scale for each of its first axis would multiply the wrong numbers, in silence."""
    cfg = compressed(METHODS["mqt"])
    export_model(tiny.weights(cfg), bundle(cfg), tmp_path / "model")
    found, published = open_model(tmp_path / "model", compute_dtype="float32")
    params = load_params(found, published, dtype="float32", narrow="int8", unrolled=True)
    assert isinstance(params.compressor.into_llm, jax.Array)
    assert not isinstance(params.compressor.q_proj.kernel, jax.Array)
