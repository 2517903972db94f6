"""THE table: every parameter has one name of its own, in the layouts that hold it."""

import dataclasses
from pathlib import Path

import pytest
from safetensors import safe_open

from llava_mini_jax import config as configs
from llava_mini_jax import params as param_tree
from llava_mini_jax.json_fields import Fields, read_json
from llava_mini_jax.models import llava_mini
from llava_mini_jax.weights import names
from llava_mini_jax.weights.hf_config import llama_from_hf
from llava_mini_jax.weights.hf_processor import OPENAI_CLIP
from llava_mini_jax.weights.towers import clip_from_hf
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "model"

EIGHT_B = configs.build(configs.LLAMA_3_1_8B, configs.CLIP_L_336, "release")


def named(cfg, layout: str, unrolled: bool = False) -> dict[str, list[names.Source] | None]:
    spec = llava_mini.spec(cfg)
    spec = llava_mini.unrolled(spec) if unrolled else spec
    table = names.table(names.LAYOUTS[layout], cfg)
    return {
        path: names.sources(path, leaf, table, cfg.vision.used_layers)
        for path, leaf in param_tree.paths(spec).items()
    }


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize(
    "cfg",
    [EIGHT_B, tiny.model("paper"), tiny.model("release", projector="linear")],
    ids=["8b", "paper", "linear projector"],
)
def test_every_parameter_has_names_of_its_own(cfg, unrolled: bool) -> None:
    found = named(cfg, "release", unrolled)
    assert all(sources for sources in found.values())
    every = [source for sources in found.values() for source in sources]
    assert len(set(every)) == len(every)
    whole = {source.name for source in every if source.parts == 1}
    parts = [source for source in every if source.parts > 1]
    assert not whole & {source.name for source in parts}
    for name in {source.name for source in parts}:
        pieces = sorted((s.part, s.parts) for s in parts if s.name == name)
        assert pieces == [(i, len(pieces)) for i in range(len(pieces))]


def test_stacked_and_unrolled_trees_have_the_same_names() -> None:
    def every(unrolled: bool) -> set[names.Source]:
        return {s for sources in named(EIGHT_B, "release", unrolled).values() for s in sources}

    assert every(False) == every(True)


def test_the_released_names() -> None:
    """Names and shapes of docs/release.md, "Checkpoint files"."""
    found = named(EIGHT_B, "release")
    assert found["llm/layers/q_proj"][31].name == "model.layers.31.self_attn.q_proj.weight"
    assert found["llm/lm_head"] == [names.Source("lm_head.weight")]
    assert found["llm/final_norm"] == [names.Source("model.norm.weight")]
    assert (
        found["prefusion/layers/mlp_norm"][3].name
        == "model.prefusion_layers.3.post_attention_layernorm.weight"
    )
    assert found["projector/fc2/bias"] == [names.Source("model.mm_projector.2.bias")]
    assert found["compressor/k_proj/kernel"] == [
        names.Source("model.compressor.attn.in_proj_weight", 1, 3)
    ]
    tower = "model.vision_tower.vision_tower.vision_model."
    assert found["vision/pre_norm/scale"] == [names.Source(f"{tower}pre_layrnorm.weight")]
    assert len(found["vision/layers/fc1/kernel"]) == 23
    # The 24th layer is not read, but it is kept.
    assert [s.name for s in found["vision/unread_layers/fc1/bias"]] == [
        f"{tower}encoder.layers.23.mlp.fc1.bias"
    ]


# Paths that checkpoints, freezing patterns and docs use.
LAYER = ("attn_norm", "q_proj", "k_proj", "v_proj", "o_proj", "mlp_norm")
DOCUMENTED = [
    *(f"vision/{name}" for name in ("patch_embed", "class_token", "position")),
    *(f"vision/pre_norm/{name}" for name in ("scale", "bias")),
    *(f"vision/layers/{name}" for name in (*LAYER, "fc1", "fc2")),
    *(f"projector/{layer}/{name}" for layer in ("fc1", "fc2") for name in ("kernel", "bias")),
    *(f"compressor/{name}" for name in ("query", "position")),
    *(f"compressor/{norm}/scale" for norm in ("query_norm", "patch_norm")),
    *(f"compressor/{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"prefusion/layers/{name}" for name in (*LAYER, "gate_proj", "up_proj", "down_proj")),
    *(f"llm/layers/{name}" for name in (*LAYER, "gate_proj", "up_proj", "down_proj")),
    *(f"llm/{name}" for name in ("embed_tokens", "final_norm", "lm_head")),
]


@pytest.mark.parametrize("path", DOCUMENTED)
def test_documented_paths_exist(path: str) -> None:
    paths = param_tree.paths(llava_mini.spec(EIGHT_B))
    assert any(found == path or found.startswith(f"{path}/") for found in paths)


def test_stacks_have_their_depth_in_front() -> None:
    paths = param_tree.paths(llava_mini.spec(EIGHT_B))
    depths = {"llm": 32, "prefusion": 4, "vision": 23}
    for path, leaf in paths.items():
        stacked = "/layers/" in path
        assert (leaf.axes[0] == "layers") == (stacked or "/unread_layers/" in path)
        if stacked:
            assert leaf.shape[0] == depths[path.split("/")[0]], path


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_the_names_are_exactly_those_of_a_release_save(case: str) -> None:
    values = read_json(GOLDEN / case / "model" / "config.json")
    tower = read_json(GOLDEN / case / "clip" / "config.json")
    vision = clip_from_hf(
        tower, "clip", select_layer=-2, select_feature="patch", processor=OPENAI_CLIP
    )
    cfg = configs.build(
        llama_from_hf(Fields(values, "model"), "llama"),
        vision,
        "release",
        grid=values["compressor_size"],
        prefusion_layers=values["prefusion_layer_num"],
    )
    ours = {s.name for sources in named(cfg, "release").values() for s in sources}
    with safe_open(GOLDEN / case / "model" / "model.safetensors", "numpy") as file:
        theirs = set(file.keys())
    assert ours == theirs


LLAVA_HF = {
    "llava-hf": (
        "language_model.model.layers.1.mlp.down_proj.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias",
    ),
    "llava-hf-4.52": (
        "model.language_model.layers.1.mlp.down_proj.weight",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
        "model.multi_modal_projector.linear_2.bias",
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias",
    ),
}


@pytest.mark.parametrize("layout", LLAVA_HF)
def test_llava_hf_in_both_spellings(layout: str) -> None:
    cfg = tiny.model("llava-1.5")
    found = named(cfg, layout)
    paths = (
        ("llm/layers/down_proj", 1),
        ("llm/embed_tokens", 0),
        ("llm/lm_head", 0),
        ("projector/fc2/bias", 0),
        ("vision/layers/o_proj/bias", 0),
    )
    assert tuple(found[path][layer].name for path, layer in paths) == LLAVA_HF[layout]
    assert all(found.values())


def test_what_a_layout_does_not_hold() -> None:
    for layout in ("llava-hf", "clip", "llama"):
        found = named(tiny.release_model(), layout)
        assert found["compressor/query"] is None and found["prefusion/layers/q_proj"] is None
    assert named(tiny.release_model(), "llama")["vision/position"] is None
    assert named(tiny.release_model(), "clip")["llm/lm_head"] is None


def test_a_linear_projector_has_another_name() -> None:
    cfg = tiny.model("release", projector="linear")
    assert named(cfg, "release")["projector/fc1/kernel"] == [
        names.Source("model.mm_projector.weight")
    ]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_model.embeddings.position_ids",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "visual_projection.weight",
        "logit_scale",
    ],
)
def test_what_other_formats_carry_besides(name: str) -> None:
    assert any(pattern.fullmatch(name) for pattern in names.IGNORED)


def test_nothing_of_the_model_is_ignored() -> None:
    sources = named(EIGHT_B, "release").values()
    every = [source.name for group in sources for source in group]
    assert not any(p.fullmatch(name) for p in names.IGNORED for name in every)
    tied = dataclasses.replace(tiny.LLM, tied_head=True)
    assert "llm/lm_head" not in named(tiny.model("release", tied), "release")
    assert len(every) > 400
