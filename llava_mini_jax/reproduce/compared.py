"""Nine other methods that compress images, and LLaVA-Mini's own kinds, as rows of one table.

    METHODS, by row name --reproduce compressors--> one figure over tokens, one over FLOPs
    DENSE_ROWS           --reproduce dense--------> the same of pages that one look does not read

All rows share tower, data, order, steps and rates. A method that is its own projector has a stage 1
of its own, the others begin with LLaVA's. A method that needs no training is trained all the same:
what is compared is what a method can do, not what it can do for nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

from llava_mini_jax.models.compressors import CompressorConfig
from llava_mini_jax.models.compressors.fastv import FastVConfig
from llava_mini_jax.models.compressors.llama_vid import LlamaVidConfig
from llava_mini_jax.models.compressors.m3 import M3Config
from llava_mini_jax.models.compressors.mqt import MqtConfig
from llava_mini_jax.models.compressors.nested import NestedConfig
from llava_mini_jax.models.compressors.prumerge import PruMergeConfig
from llava_mini_jax.models.compressors.prumerge_plus import PruMergePlusConfig
from llava_mini_jax.models.compressors.token_packer import TokenPackerConfig
from llava_mini_jax.models.compressors.visionzip import VisionZipConfig
from llava_mini_jax.models.compressors.voco import VoCoConfig
from llava_mini_jax.reproduce.rows import Claim, Table, TableRow, World

# Of the digits world's tower of two layers and nine patches.
LAYER, PATCHES = 1, 9
WAYS = ("prefix", "grids", "separate")  # to any number of tokens
COUNTS = (0, 1, 4, 9)  # of them; the other methods have no 0
_PRUNED: dict[str, Any] = dict(layer=LAYER, neighbours=2, variant="clean")

_MQT, _VOCO = "MQT-LLaVA", "VoCo-LLaMA"
_PRUMERGE, _PLUS, _PACKER = "PruMerge", "PruMerge+", "TokenPacker"
_LORA = "LoRA instead of all weights"
_TWO = "two epochs instead of one"


def _method(
    compressor: Callable[[int, int], CompressorConfig], draw_tokens: tuple[int, ...] = ()
) -> World:
    model: dict[str, Any] = {"prefusion_layers": 0}
    return World(model=model, compressor=compressor, draw_tokens=draw_tokens)


def _nested(way: str, **world: Any) -> World:
    return World(
        model={"prefusion_layers": 4},
        compressor=lambda _, width: NestedConfig(way=way, width=width, counts=COUNTS, count=1),
        draw_tokens=COUNTS,
        **world,
    )


def _dense(compressor: str, grid: int, layers: int = 4) -> World:
    model = dict(compressor=compressor, grid=grid, prefusion_layers=layers)
    return World(model=model, dense=True, grid=2)


def _mqt(width: int, out_width: int) -> MqtConfig:
    return MqtConfig(
        width=width,
        out_width=out_width,
        heads=4,
        queries=PATCHES,
        count=1,
        norm_eps=1e-6,
        counts=(1, 2, 4, 9),
    )


def _packer(width: int, out_width: int) -> TokenPackerConfig:
    return TokenPackerConfig(
        width=width, out_width=out_width, heads=4, levels=(0, 1, 2), scale=3, norm_eps=1e-6
    )


def _vid(width: int, out_width: int) -> LlamaVidConfig:
    return LlamaVidConfig(
        width=width,
        out_width=out_width,
        content=1,
        class_token=False,
        vision_norm_eps=1e-5,
        qformer_width=48,
        qformer_heads=4,
        qformer_layers=2,
        qformer_mlp_width=96,
        qformer_cross_every=2,
        qformer_cross_width=width,
        qformer_queries=4,
        qformer_vocabulary=85,  # questions are read in the world's own
        qformer_positions=32,
        qformer_norm_eps=1e-12,
    )


def _voco(count: int) -> World:
    return _method(
        lambda _, width: VoCoConfig(
            count=count, token_id=None, width=width, between=(), variant="clean"
        )
    )


def _any_number(start: str, ways: tuple[str, ...] = WAYS, **world: Any) -> dict[str, TableRow]:
    rows: dict[str, TableRow] = {}
    for way in ways:
        label, name = f"LLaVA-Mini, any number: {way}", f"{start}-{way}"
        full = "compressors/nested" if name == "any-grids" else None
        rows[name] = TableRow(label, full=full, digits=_nested(way, **world))
        for count in COUNTS:
            if count != 1:
                rows[f"{name}-{count}"] = TableRow(label, asks=(name, count))
    return rows


METHODS: Mapping[str, TableRow] = {
    "mqt": TableRow(_MQT, digits=_method(_mqt, (1, 2, 4, 9))),
    "mqt-2": TableRow(_MQT, 2, (61.0, 50.8, 54.4), asks=("mqt", 2), unlike=_TWO),
    "mqt-4": TableRow(
        _MQT, 36, (73.7, 58.8, 63.4), "compressors/mqt", asks=("mqt", 4), unlike=_TWO
    ),
    "mqt-9": TableRow(_MQT, 256, (76.8, 61.6, 64.3), asks=("mqt", 9), unlike=_TWO),
    "m3": TableRow("M3", digits=_method(lambda *_: M3Config(count=1, counts=(1, 9)), (1, 9))),
    "m3-9": TableRow("M3", full="compressors/m3", asks=("m3", 9)),
    "packer": TableRow(
        _PACKER, 144, (77.9, 61.9, 65.1), "compressors/token_packer", _method(_packer)
    ),
    "prumerge": TableRow(
        _PRUMERGE,
        32,
        (72.0, None, 60.9),
        "compressors/prumerge",
        _method(lambda *_: PruMergeConfig(ratio=0.0, **_PRUNED)),
        unlike=_LORA,
    ),
    "prumerge-4": TableRow(
        _PRUMERGE, digits=_method(lambda *_: PruMergeConfig(ratio=0.34, **_PRUNED))
    ),
    "prumerge-plus": TableRow(
        _PLUS,
        144,
        (76.8, None, 64.9),
        "compressors/prumerge_plus",
        _method(lambda *_: PruMergePlusConfig(ratio=0.23, **_PRUNED)),
        unlike=_LORA,
    ),
    "visionzip-2": TableRow(
        "VisionZip",
        64,
        (72.4, 55.1, 60.1),
        "compressors/visionzip",
        _method(lambda *_: VisionZipConfig(layer=LAYER, dominant=1, contextual=1)),
        unlike="not trained; measured by others",
    ),
    "visionzip-4": TableRow(
        "VisionZip",
        digits=_method(lambda *_: VisionZipConfig(layer=LAYER, dominant=2, contextual=2)),
    ),
    "vid": TableRow(
        "LLaMA-VID",
        2,
        (None, 55.5, None),
        "compressors/llama_vid",
        _method(_vid),
        unlike="another tower",
    ),
    "voco-1": TableRow(_VOCO, 1, (72.3, 57.0, 58.8), "compressors/voco", _voco(1), unlike=_TWO),
    "voco-4": TableRow(_VOCO, digits=_voco(4)),
    "fastv-1": TableRow(
        "FastV", digits=_method(lambda *_: FastVConfig(layer=2, keep=1, variant="drop"))
    ),
    "fastv-4": TableRow(
        "FastV",
        64,
        (55.0, 46.1, 48.0),
        "compressors/fastv",
        _method(lambda *_: FastVConfig(layer=2, keep=4, variant="drop")),
        unlike="not trained; measured by others",
    ),
    **_any_number("any"),
}

DENSE_ROWS: Mapping[str, TableRow] = {
    "dense-llava": TableRow("LLaVA-1.5 with parts", digits=_dense("none", 1, layers=0)),
    "dense-pool-1": TableRow("average pooling", digits=_dense("average_pool", 1)),
    # One way is enough: TABLE compares the three.
    **_any_number("dense", ("grids",), dense=True, grid=2),
}

OWN = (
    *("llava", "mini", "mini-4", "mini-9", "n0-1", "n0-4", "n0-9"),
    *("pool-1", "pool-4", "pool0-1", "pool0-4", "heads0-1", "heads0-4"),
)
TABLE = Table(
    title="Compressors",
    source="Section 5 and appendix E.1, nine methods",
    rows=(*OWN, *METHODS),
    claims=(
        Claim(
            text="LLaVA-Mini's one token is at least as good as MQT-LLaVA's two",
            order=("mqt-2", "mini"),
        ),
        Claim(text="the same for VoCo-LLaMA's one", order=("voco-1", "mini")),
        Claim(
            text="0 tokens, pre-fusion alone, are within 2 points of one (grids)",
            order=("any-grids", "any-grids-0"),
            by=-2,
        ),
        Claim(
            text="one token of a model of any number is within 2 points of a model of one (grids)",
            order=("mini", "any-grids"),
            by=-2,
        ),
    ),
    curves=True,
    note="PruMerge's tokens are the maximum for an image. LLaMA-VID reads a question and captions"
    " have none, so it has no stage 1. Published scores are those of 7B models on LLaVA-1.5's data,"
    " each as its authors trained it, so they are not comparable with each other. They differ in"
    " this:",
)

DENSE_TABLE = Table(
    title="Compressors, dense pages",
    source="not in the paper",
    rows=("low-llava", "low-mini", "hd-1", "hd-4", "hd-9", *DENSE_ROWS),
    claims=(
        Claim(
            text="one token is within 2 points of all tokens, both with parts",
            order=("dense-llava", "hd-1"),
            by=-2,
        ),
        Claim(
            text="0 tokens, pre-fusion alone, are within 2 points of one (grids)",
            order=("dense-grids", "dense-grids-0"),
            by=-2,
        ),
        Claim(
            text="one token of a model of any number is within 2 points of a model of one (grids)",
            order=("hd-1", "dense-grids"),
            by=-2,
        ),
        Claim(
            text="more tokens do not hurt, any number (grids; no step down by more than 1 point)",
            order=tuple(f"dense-grids{end}" for end in ("-0", "", "-4", "-9")),
            by=-1,
        ),
    ),
    curves=True,
    note="Pages have 6 x 6 digits, are 60 pixels wide, and are read as four parts and the whole."
    " The parts' 36 patches, one digit each, are compressed. None of the nine other methods is"
    " defined on parts, except TokenPacker-HD, which is another model.",
)
