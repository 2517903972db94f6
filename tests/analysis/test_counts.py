"""Rules that choose the vision tokens: found where there is something to find, and else not."""

import json

import numpy as np
import pytest

from llava_mini_jax.analysis import counts
from llava_mini_jax.analysis.counts import Measured
from llava_mini_jax.cli import main
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation
N = 2000


def measured(right_KN: np.ndarray, sure_KN: np.ndarray, begins_N: np.ndarray) -> Measured:
    """With 1, 4 and 16 tokens, and 20 positions of text."""
    cost_KN = np.broadcast_to(np.array([[21], [24], [36]]), right_KN.shape)
    return Measured((1, 4, 16), right_KN, sure_KN.astype(np.float32), cost_KN, begins_N)


def hard(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(which questions are hard, right_KN): few tokens do for the others."""
    hard_N = rng.random(N) < 0.3
    right_KN = np.stack([rng.random(N) < np.where(hard_N, p, 0.95) for p in (0.1, 0.3, 0.95)])
    return hard_N, right_KN


def test_a_rule_is_found_where_doubt_or_words_tell_what_is_hard() -> None:
    rng = np.random.default_rng(0)
    hard_N, right_KN = hard(rng)
    doubt_KN = np.where(hard_N, 0.2, 0.9) + 0.05 * rng.random((3, N))
    found = counts.judge(measured(right_KN, doubt_KN, np.full(N, "what is")))
    by_kind = {one.kind: one for one in found}
    sure = by_kind["confidence"]
    # A third of the questions is asked twice; lots would have 85 % for that.
    assert sure.helps and sure.accuracy > 0.93 and sure.accuracy - sure.fixed > 0.05
    assert not by_kind["words"].helps
    begins_N = np.where(hard_N, "read row", "which is")
    noise_KN = rng.random((3, N))
    found = counts.judge(measured(right_KN, noise_KN, begins_N))
    by_kind = {one.kind: one for one in found}
    assert by_kind["words"].helps and by_kind["words"].accuracy > 0.93
    assert '"read row" 16' in by_kind["words"].rule
    assert not by_kind["confidence"].helps


@pytest.mark.parametrize("seed", range(5))
def test_no_rule_is_found_where_nothing_tells(seed: int) -> None:
    """Chosen among hundreds on the questions that it is judged by, one would seem to help."""
    rng = np.random.default_rng(seed)
    _, right_KN = hard(rng)
    begins_N = rng.permutation(np.repeat(["a b", "c d"], N // 2))
    found = counts.judge(measured(right_KN, rng.random((3, N)), begins_N))
    assert [one.helps for one in found] == [False, False]


def test_costs_of_first_tries_count() -> None:
    right_KN = np.array([[True, False], [True, True], [True, True]])
    sure_KN = np.array([[0.9, 0.1], [1, 1], [1, 1]])
    of_two = measured(right_KN, sure_KN, np.array(["a", "b"]))
    right_N, cost_N = counts.confidence(0, 2, 0.5)(of_two)
    assert right_N.tolist() == [True, True] and cost_N.tolist() == [21, 21 + 36]


def test_fixed_counts_of_a_cost_are_the_best_mixture_of_two() -> None:
    right_KN = np.zeros((3, 10), bool)
    right_KN[1, :1], right_KN[2] = True, True  # 0 %, 10 % and 100 %
    found = measured(right_KN, np.ones((3, 10)), np.full(10, "a"))
    assert counts.mixture(found, 21).mean() == 0
    # At 24 positions 4 tokens have 10 %, but one question in five with 16 tokens has 20 %.
    assert counts.mixture(found, 24).mean() == pytest.approx(0.2)
    assert counts.mixture(found, 1000).mean() == 1


def test_the_command(tmp_path, capsys) -> None:
    words = ["analyze", "counts", str(tiny_model.folder("nested")), "--limit", "8"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "16 vision tokens" in shown and "does not help" in shown
    found = json.loads((tmp_path / "counts.json").read_text())
    costs = [one["positions"] for one in found["fixed"].values()]
    assert np.diff(costs).tolist() == [1, 3, 5, 7]
    assert [rule["kind"] for rule in found["rules"]] == ["confidence", "words"]
    assert main([*words[:2], str(tiny_model.folder("paper")), "--out", str(tmp_path)]) == 2
    assert "one number of vision tokens" in capsys.readouterr().err
    assert main([*words[:3], "--limit", "3", "--out", str(tmp_path)]) == 2
    assert "4 or more questions" in capsys.readouterr().err
