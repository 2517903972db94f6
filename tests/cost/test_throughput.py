"""Requests a second: the same work both ways, and what is printed of it."""

import re

import llava_mini_jax
from llava_mini_jax.cli import main
from llava_mini_jax.cost import throughput
from tests import tiny_model


def test_both_ways_answer_the_same_requests() -> None:
    model = llava_mini_jax.load(tiny_model.folder("paper"))
    examples, settings = throughput.mixed(model, 7, 12)
    again = throughput.mixed(model, 7, 12)
    assert settings == again[1]
    assert [e.ids.tolist() for e in examples] == [e.ids.tolist() for e in again[0]]
    assert len({own.max_new_tokens for own in settings}) > 2
    speed = throughput.measure(model, examples, settings, slots=3, repeats=2)
    assert speed.equal == speed.requests == 7
    assert speed.tokens == sum(own.max_new_tokens for own in settings)
    assert len(speed.engine) == len(speed.batches) == 2 and min(*speed.engine, *speed.batches) > 0
    speed = throughput.Speed([2.0, 4.0], [6.0, 5.0], 7, 7, 70)
    assert throughput.lines(speed, 3)[1:] == [
        "  engine       3.50 requests/s      35.0 tokens/s",
        "  batches      1.40 requests/s      14.0 tokens/s",
        "  engine / batches: 2.50",
    ]


def test_the_command(capsys) -> None:
    folder = str(tiny_model.folder("paper"))
    words = ["profile", "requests", folder, "--requests", "3", "--new-tokens", "6"]
    assert main([*words, "--repeats", "1"]) == 0
    assert re.search(
        r"3 requests, \d+ tokens, 8 slots; tokens equal in 3 of 3", capsys.readouterr().out
    )
    for option, value in (("--requests", "0"), ("--new-tokens", "3"), ("--slots", "-1")):
        assert main([*words, option, value]) == 2
        assert f"{option} is {value}; give " in capsys.readouterr().err
