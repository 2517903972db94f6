"""The paper's tables that say what a part of the model is worth, as rows that can be trained.

    PAPER_ROWS, by name --PAPER_TABLES--> rows and claims of each table
    and compared.py's beside them: ROWS, TABLES

A row that stands in several tables is one entry of ROWS, and is trained once.
"""

from collections.abc import Mapping
from typing import Any

from llava_mini_jax.reproduce import compared
from llava_mini_jax.reproduce.rows import Claim, Table, TableRow, World


def _page(**model: Any) -> World:
    return World(model={"grid": 1, "prefusion_layers": 4, **model})


def _dense(parts: int, **model: Any) -> World:
    return World(model={"grid": 1, "prefusion_layers": 4, **model}, dense=True, grid=parts)


_LLAVA: dict[str, Any] = dict(
    label="LLaVA-1.5", tokens=576, paper=(78.5, 62.0, 64.3), full="stage2_llava_1_5_7b"
)
_MINI: dict[str, Any] = dict(
    label="LLaVA-Mini", tokens=1, paper=(77.6, 60.9, 65.6), full="stage2_vicuna_7b"
)
_HD = "stage2_vicuna_7b_hd"
_NONE, _POOL, _HEADS = "without pre-fusion", "average pooling", "the release's queries"


PAPER_ROWS: Mapping[str, TableRow] = {
    "llava": TableRow(**_LLAVA, digits=_page(compressor="none", prefusion_layers=0)),
    "mini": TableRow(**_MINI, digits=_page()),
    # Table 7: pre-fusion
    "n0-1": TableRow(
        _NONE, 1, (72.4, 54.2, 57.7), "table7_no_prefusion_1_token", _page(prefusion_layers=0)
    ),
    "n0-4": TableRow(
        _NONE,
        16,
        (74.1, 55.4, 59.2),
        "table7_no_prefusion_16_tokens",
        _page(prefusion_layers=0, grid=2),
    ),
    "n0-64": TableRow(_NONE, 64, (75.3, 56.7, 62.1), "table7_no_prefusion_64_tokens"),
    "n0-9": TableRow(
        _NONE,
        144,
        (76.9, 58.9, 64.9),
        "table7_no_prefusion_144_tokens",
        _page(prefusion_layers=0, grid=3),
    ),
    "n1-1": TableRow(
        "1 layer", 1, (74.8, 55.5, 60.4), "table7_prefusion_1_layer", _page(prefusion_layers=1)
    ),
    "n2-1": TableRow(
        "2 layers", 1, (76.0, 57.6, 63.1), "table7_prefusion_2_layers", _page(prefusion_layers=2)
    ),
    "n3-1": TableRow(
        "3 layers", 1, (76.9, 59.1, 64.9), "table7_prefusion_3_layers", _page(prefusion_layers=3)
    ),
    # the other "Table 7": tokens, resolution
    "mini-4": TableRow("LLaVA-Mini", 4, (77.7, 60.9, 66.7), "table7_4_tokens", _page(grid=2)),
    "mini-16": TableRow("LLaVA-Mini", 16, (78.1, 61.3, 66.6), "table7_16_tokens"),
    "mini-9": TableRow("LLaVA-Mini", 64, (78.5, 61.6, 67.5), "table7_64_tokens", _page(grid=3)),
    "low-llava": TableRow(**_LLAVA, digits=_dense(1, compressor="none", prefusion_layers=0)),
    "low-mini": TableRow(**_MINI, digits=_dense(1)),
    "hd-1": TableRow("HD", 16, (78.5, 61.5, 67.4), "table7_hd_16_tokens", _dense(2)),
    "hd-4": TableRow("HD", 64, (78.9, 61.8, 67.5), _HD, _dense(2, grid=2)),
    "hd-9": TableRow("HD", 144, (79.3, 62.3, 67.9), "table7_hd_144_tokens", _dense(2, grid=3)),
    "hd-576": TableRow("HD", 576, (80.0, 62.9, 68.1), "table7_hd_576_tokens"),
    # Tables 8 and 10: compression
    "pool-1": TableRow(
        _POOL,
        1,
        (76.1, 59.8, 64.0),
        "table8_average_pool_1_token",
        _page(compressor="average_pool"),
    ),
    "pool-4": TableRow(
        _POOL,
        4,
        (76.9, 60.3, 65.1),
        "table8_average_pool_4_tokens",
        _page(compressor="average_pool", grid=2),
    ),
    "pool0-1": TableRow(
        f"{_POOL}, {_NONE}", digits=_page(compressor="average_pool", prefusion_layers=0)
    ),
    "pool0-4": TableRow(
        f"{_POOL}, {_NONE}", digits=_page(compressor="average_pool", prefusion_layers=0, grid=2)
    ),
    # The release has another compressor than equation 2: attention with heads, projections, scale.
    "heads0-1": TableRow(
        f"{_HEADS}, {_NONE}", digits=_page(compressor="multi_head", prefusion_layers=0)
    ),
    "heads0-4": TableRow(
        f"{_HEADS}, {_NONE}", digits=_page(compressor="multi_head", prefusion_layers=0, grid=2)
    ),
    "cited-mqt-2": TableRow("MQT-LLaVA, cited", 2, (61.0, 50.8, 54.4)),
    "cited-mqt-36": TableRow("MQT-LLaVA, cited", 36, (73.7, 58.8, 63.4)),
    "cited-mqt-256": TableRow("MQT-LLaVA, cited", 256, (76.8, 61.6, 64.3)),
    # Tables 11 and 12
    "whole": TableRow(
        "without compression",
        576,
        (80.0, 62.9, 66.2),
        "table11_no_compression",
        _page(compressor="none"),
    ),
    "inside": TableRow(
        "inside the LLM", 1, (76.3, 60.1, 64.5), "table12_inside_llm", _page(inside_layers=2)
    ),
}

PAPER_TABLES: Mapping[str, Table] = {
    "table7": Table(
        title="Pre-fusion",
        source="Table 7, section 6.1",
        rows=("llava", "n0-1", "n0-4", "n0-64", "n0-9", "n1-1", "n2-1", "n3-1", "mini"),
        claims=(
            Claim(
                text="one token with four layers of pre-fusion is within 2 points of all tokens",
                order=("llava", "mini"),
                by=-2,
            ),
            Claim(
                text="without pre-fusion one token is more than 2 points below all tokens",
                order=("n0-1", "llava"),
                by=2,
            ),
            Claim(
                text="more layers do not hurt (no step down by more than 1 point)",
                order=("n0-1", "n1-1", "n2-1", "n3-1", "mini"),
                by=-1,
            ),
            Claim(
                text="without pre-fusion more tokens do not hurt (no step down by more than 1)",
                order=("n0-1", "n0-4", "n0-9"),
                by=-1,
            ),
            Claim(
                text="one token with pre-fusion is better than the most tokens without",
                order=("n0-9", "mini"),
            ),
        ),
    ),
    "tokens": Table(
        title="Number of vision tokens",
        source='Second "Table 7", section 6.3',
        rows=("llava", "mini", "mini-4", "mini-16", "mini-9"),
        claims=(
            Claim(
                text="more tokens do not hurt (no step down by more than 1 point)",
                order=("mini", "mini-4", "mini-9"),
                by=-1,
            ),
            Claim(
                text="the most tokens are at least as good as LLaVA-1.5",
                order=("llava", "mini-9"),
            ),
        ),
    ),
    "hd": Table(
        title="High resolution",
        source='Second "Table 7", section 6.3',
        rows=("low-llava", "low-mini", "hd-1", "hd-4", "hd-9", "hd-576"),
        claims=(
            Claim(text="high resolution is better than low", order=("low-mini", "hd-1")),
            Claim(
                text="more tokens do not hurt (no step down by more than 1 point)",
                order=("hd-1", "hd-4", "hd-9"),
                by=-1,
            ),
        ),
        note="Pages here have 6 x 6 digits and are 60 pixels wide. A digit has 10 pixels in a part"
        " of the HD image, the size that the tower was trained on, and 5 in the whole, which is all"
        " that the other rows see.",
    ),
    "table8": Table(
        title="Queries against average pooling",
        source="Table 8, section 6.2",
        rows=("pool-1", "mini", "pool-4", "mini-4"),
        claims=(
            Claim(
                text="one query is at least as good as the average of all patches (to 1 point)",
                order=("pool-1", "mini"),
                by=-1,
            ),
            Claim(
                text="four queries are at least as good as four averages (to 1 point)",
                order=("pool-4", "mini-4"),
                by=-1,
            ),
        ),
    ),
    "table10": Table(
        title="Compression alone",
        source="Table 10, appendix E.1",
        rows=(
            *("cited-mqt-2", "cited-mqt-36", "cited-mqt-256", "n0-1", "n0-4", "n0-64", "n0-9"),
            *("pool0-1", "pool0-4", "heads0-1", "heads0-4"),
        ),
        claims=(
            Claim(
                text="one query is at least as good as the average of all patches (to 1 point)",
                order=("pool0-1", "n0-1"),
                by=-1,
            ),
            Claim(
                text="four queries are at least as good as four averages (to 1 point)",
                order=("pool0-4", "n0-4"),
                by=-1,
            ),
            Claim(
                text="the same for the release's queries",
                order=("pool0-4", "heads0-4"),
                by=-1,
            ),
        ),
        note="The paper cites MQT-LLaVA's figures. Average pooling stands for token merging here."
        " The paper has no complete row for PruMerge.",
    ),
    "table11": Table(
        title="Pre-fusion alone",
        source="Table 11, appendix E.2",
        rows=("llava", "whole"),
        claims=(
            Claim(
                text="pre-fusion without compression is at least as good as LLaVA-1.5",
                order=("llava", "whole"),
            ),
        ),
    ),
    "table12": Table(
        title="Inside or outside of the language model",
        source="Table 12, appendix E.3",
        rows=("mini", "inside"),
        claims=(
            Claim(
                text="compression and pre-fusion are better before the language model",
                order=("inside", "mini"),
            ),
        ),
        note="Inside, compression follows layer 2 of 4 here, and layer 4 of 32 at full scale.",
    ),
}

ROWS: Mapping[str, TableRow] = {**PAPER_ROWS, **compared.METHODS, **compared.DENSE_ROWS}
TABLES: Mapping[str, Table] = {
    **PAPER_TABLES,
    "compressors": compared.TABLE,
    "dense": compared.DENSE_TABLE,
}
