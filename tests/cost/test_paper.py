"""The paper's figures against the rule that is said to reproduce them."""

import pytest

from llava_mini_jax.config import LLAMA_3_1_8B, VICUNA_7B
from llava_mini_jax.cost import flops_table, paper_figures
from llava_mini_jax.cost.paper_figures import (
    PRINTED,
    ROWS,
    TEXT,
    PaperModel,
    build,
    paper_flops,
    shape,
)
from llava_mini_jax.errors import InputError

# Totals that the rule does not give: CONTRADICTIONS names both.
WRONG = {(("7", 1, 3)): 1.71, ("12", 1, 0): 1.89}


def total(row: PaperModel, text: int = TEXT) -> float:
    cfg = build(row, VICUNA_7B)
    return sum(paper_flops(cfg, shape(cfg, text, row.resolution)).values()) / 1e12


@pytest.mark.parametrize("row", [row for row in ROWS if row.tera], ids=lambda row: row.name)
def test_every_total_is_the_papers_or_a_named_contradiction(row):
    expected = WRONG.get((row.table, row.tokens, row.layers), row.tera)
    assert total(row) == pytest.approx(expected, abs=PRINTED / 2)


def test_43_tokens_are_the_only_length_that_reproduces_the_totals():
    assert paper_figures.shared_length(ROWS, VICUNA_7B) == (43, 14, 16)
    consistent = [r for r in ROWS if r.tera and (r.table, r.tokens, r.layers) not in WRONG]
    assert all(paper_figures.reproducing_lengths(row, VICUNA_7B) == [43] for row in consistent)


def test_table_14_splits_llava_1_5_rightly_and_llava_mini_wrongly():
    for row in (row for row in ROWS if row.parts):
        cfg = build(row, VICUNA_7B)
        flops = paper_flops(cfg, shape(cfg, TEXT, row.resolution))
        vision, projector, _, fusion, llm = (flops[part] / 1e12 for part in paper_figures.PARTS)
        assert (vision, projector) == pytest.approx(row.parts[:2], abs=2e-3)
        agrees = (fusion, llm) == pytest.approx(row.parts[3:], abs=5e-3)
        assert agrees == (row.tokens == 0)
        assert fusion + llm == pytest.approx(sum(row.parts[3:]), rel=2e-3)


def test_table_8s_cost_of_compression():
    """+2.42 G and +2.44 G over average pooling, attention scores included."""
    for tokens, giga in ((1, 2.42), (4, 2.44)):
        cfg = build(PaperModel(tokens=tokens, layers=4), VICUNA_7B)
        linear = paper_flops(cfg, shape(cfg, TEXT, 336))["compressor"]
        scores = 4.0 * tokens * 576 * 1024
        assert (linear + scores) / 1e9 == pytest.approx(giga, abs=5e-3)


def test_settings_give_rows_and_other_backbones_have_no_figures_of_the_paper():
    rows = paper_figures.rows([1, 4], [0, 4], [336, 672])
    entries = flops_table.of_rows(rows, LLAMA_3_1_8B, 43)
    assert len(entries) == 2 * (1 + 4)
    assert all(e.paper is None for e in flops_table.of_rows(ROWS, LLAMA_3_1_8B, 43))
    printed = [e.paper and e.paper["total"] for e in flops_table.of_rows(ROWS, VICUNA_7B, 43)]
    assert printed == [row.tera for row in ROWS]
    cell = flops_table.measure(entries[0], with_xla=False)
    assert cell["ours"]["total"] == pytest.approx(9.23, abs=5e-3)


@pytest.mark.parametrize(
    ("row", "side"),
    [(dict(tokens=5, layers=4), 336), (dict(tokens=1, layers=4), 500)],
    ids=["no square", "no multiple"],
)
def test_sizes_that_cannot_be(row, side):
    with pytest.raises(InputError, match=r"5 vision tokens|500 pixels"):
        shape(build(PaperModel(**row), VICUNA_7B), TEXT, side)
