"""M3 and MQT with several numbers of tokens: each is the method of that number alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.models import compressors
from llava_mini_jax.models.compressors import CompressorConfig
from llava_mini_jax.models.compressors.m3 import M3Config
from llava_mini_jax.models.compressors.mqt import MqtConfig
from llava_mini_jax.models.seen import Seen
from tests import tiny

E, D = tiny.VISION.width, tiny.LLM.width
MQT = MqtConfig(
    width=E, out_width=D, heads=4, queries=9, count=4, norm_eps=1e-6, counts=(1, 2, 4, 9)
)
M3 = M3Config(count=4, counts=(1, 4, 16))


@pytest.mark.parametrize(
    "cfg", [pytest.param(MQT, id="mqt", marks=pytest.mark.slow), pytest.param(M3, id="m3")]
)
def test_a_count_is_the_method_of_that_count_alone(cfg: MqtConfig | M3Config) -> None:
    patches = np.random.default_rng(0).standard_normal((3, 16, E)).astype(np.float32)
    spec = compressors.spec(cfg)
    params = spec and param_tree.init(jax.random.key(0), spec)
    choice = compressors.declare(cfg).choice
    assert choice is not None and choice.counts == cfg.counts
    made = compressors.apply(params, Seen(jnp.asarray(patches)), cfg).tokens_IQE
    assert made.shape[1] == choice.made and compressors.tokens(cfg, 4) == 4
    for count in cfg.counts:
        alone = dataclasses.replace(cfg, count=count, counts=())
        expected = compressors.apply(params, Seen(jnp.asarray(patches)), alone).tokens_IQE
        assert compressors.declare(alone).choice is None and expected.shape[1] == count
        # The same sums of other shapes.
        np.testing.assert_allclose(made[:, choice.taken(count).places], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("cfg", "changes", "said"),
    [
        (
            MQT,
            {"counts": (4, 1)},
            r"mqt: counts are \(4, 1\) and count is 4; give numbers that grow",
        ),
        (MQT, {"counts": (1, 2)}, "one of them as count"),
        (MQT, {"counts": (4, 10)}, "from 1 to 9"),
        (M3, {"counts": (0, 4)}, "m3: counts are"),
    ],
)
def test_counts_that_make_no_sense(cfg: CompressorConfig, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(cfg, **changes)


def test_a_count_of_m3_that_its_rule_does_not_make() -> None:
    with pytest.raises(
        ValueError, match="m3 has no 5 tokens of 4 x 4 patches; use one of 1, 4, 16"
    ):
        compressors.tokens(M3Config(count=4, counts=(4, 5)), 4)
