"""Latency and memory of tiny models, and the command in front of them."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.arguments import BACKBONES_HELP
from llava_mini_jax.cli import main
from llava_mini_jax.config import BACKBONES, VICUNA_7B
from llava_mini_jax.cost import follow_up, inference_memory, latency, machine, paper_figures
from llava_mini_jax.cost.baseline import llava_1_5, shared_params
from llava_mini_jax.cost.latency import Candidate, Request
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import seeing_programs, slots
from llava_mini_jax.inference.engine import Engine
from llava_mini_jax.models import llava_mini
from llava_mini_jax.ops import int4
from llava_mini_jax.ops.einsum import Int8Weight
from llava_mini_jax.ops.int4 import Int4Weight
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

REQUEST = Request(text=9, images=2, parts=1, new_tokens=3)


@pytest.mark.slow  # four models
def test_models_take_turns_and_each_does_its_whole_request(monkeypatch):
    cfg = tiny.model("release")
    models = latency.random_candidates({"base": llava_1_5(cfg), "mini": cfg}, "float32")
    asked, drawn = [], []
    submit, decode = Engine.submit, slots.decode

    def watch_submit(self, request, listener):
        asked.append((self.model.bundle.model.compressor.kind, request.example.frames))
        return submit(self, request, listener)

    def watch_decode(*args):
        lane, told = decode(*args)
        drawn.append(int((np.asarray(told.tokens_BN) >= 0).sum()))
        return lane, told

    watch_decode._cache_size = decode._cache_size
    monkeypatch.setattr(Engine, "submit", watch_submit)
    monkeypatch.setattr(slots, "decode", watch_decode)
    times = latency.measure(models, REQUEST, 4)
    rounds = 4 + latency.WARM_UPS
    assert asked == [("none", (2,)), ("multi_head", (2,))] * rounds
    assert sum(drawn) == 3 * 2 * rounds  # no token of an answer ends it
    assert {len(t.first) for t in times.values()} == {len(t.token) for t in times.values()} == {4}


def test_candidates_share_what_they_have_in_common():
    one, four = tiny.model("release"), tiny.model("release", grid=2, prefusion_layers=1)
    found = latency.random_candidates({"a": one, "b": four, "c": llava_1_5(one)}, "float32")
    a, b, c = (found[name].params for name in "abc")
    assert a.llm is b.llm is c.llm and a.vision is c.vision
    assert b.prefusion.layers[0] is a.prefusion.layers[0] and len(b.prefusion.layers) == 1
    assert c.prefusion is None and b.compressor.query.shape[0] == 4
    shapes = jax.tree.map(lambda x: x.shape, shared_params(a))
    spec = llava_mini.unrolled(llava_mini.spec(llava_1_5(one)))
    assert shapes == jax.tree.map(lambda x: x.shape, param_tree.abstract(spec))


def test_narrow_candidates_answer_like_floats_and_share_what_those_share():
    cfg = tiny.model("release")
    models = latency.random_candidates({"base": llava_1_5(cfg), "mini": cfg}, "float32")
    small = latency.rounded(models, "int8")
    assert small["base"].params.llm.layers[0].q_proj is small["mini"].params.llm.layers[0].q_proj
    layers = models["mini"].params.llm.layers[0], small["mini"].params.llm.layers[0]
    for name in ("q_proj", "o_proj", "down_proj"):
        float_, int8 = (getattr(layer, name) for layer in layers)
        assert int8.scale.shape == float_.shape[: 2 if name == "q_proj" else 1]
        scale = np.asarray(int8.scale)
        scale = scale.reshape(scale.shape + (1,) * (float_.ndim - scale.ndim))
        np.testing.assert_allclose(int8.values * scale, float_, atol=0.51 * scale.max())
    assert small["mini"].params.llm.embed_tokens is models["mini"].params.llm.embed_tokens
    ratio = machine.token_bytes(models["mini"].params) / machine.token_bytes(small["mini"].params)
    assert 3 < ratio < 4
    smaller = latency.rounded(models, "int4")["mini"].params
    q_proj = smaller.llm.layers[0].q_proj
    assert isinstance(q_proj, Int4Weight) and isinstance(smaller.llm.lm_head, Int8Weight)
    step = np.asarray(q_proj.scale, np.float32).max()
    found = int4.dequantize(q_proj).reshape(layers[0].q_proj.shape)
    np.testing.assert_allclose(found, layers[0].q_proj, atol=0.51 * step)


def test_a_token_reads_layers_and_head_once():
    cfg = tiny.model("paper")
    held = {path: leaf.nbytes for path, leaf in param_tree.paths(tiny.weights(cfg).llm).items()}
    table = held.pop("embed_tokens")
    assert machine.token_bytes(tiny.weights(cfg)) == sum(held.values())
    tied = dataclasses.replace(tiny.weights(cfg).llm, lm_head=None)
    params = dataclasses.replace(tiny.weights(cfg), llm=tied)
    assert machine.token_bytes(params) == sum(held.values()) - held["lm_head"] + table


def test_a_follow_up_question_sees_nothing_again(monkeypatch):
    """The image is looked at once a round, and the second question continues the first."""
    cfg = tiny.model("release")
    candidate = Candidate(tiny.on_device(tiny.weights(cfg)), cfg)
    model = latency.askable(candidate)
    seen, asked = [], []
    look, ask = seeing_programs.encode_vision, follow_up.Session.ask
    monkeypatch.setattr(
        seeing_programs,
        "encode_vision",
        lambda *given: seen.append(1) or look(*given),
    )
    monkeypatch.setattr(
        follow_up.Session,
        "ask",
        lambda self, *given, **more: (
            asked.append((len(self.turns), self.settings.max_new_tokens))
            or ask(self, *given, **more)
        ),
    )
    first, after = follow_up.runner(model, dataclasses.replace(REQUEST, images=1))()
    assert first > 0 and after > 0
    assert (len(seen), asked) == (1, [(0, 1), (0, 3), (2, 1)])


def test_spread_and_requests_that_cannot_be():
    spread = latency.spread(tuple(float(n) for n in range(11)))
    assert (spread.low, spread.median, spread.high) == (1, 5, 9)
    with pytest.raises(InputError, match="text is 0"):
        Request(text=0, images=1, parts=1, new_tokens=1)
    cfg = tiny.model("release")
    models = {"a": Candidate(tiny.weights(cfg), cfg)}
    with pytest.raises(InputError, match="256; ask with fewer"):
        latency.measure(models, Request(text=250, images=2, parts=1, new_tokens=9), 1)


def test_cache_bytes_are_those_of_a_cache():
    cfg = tiny.model("paper")
    slot = slots.empty(1, 7, cfg)
    held = sum(array.nbytes for array in (*slot.keys, *slot.values))
    assert 7 * inference_memory.cache_bytes_per_token(cfg, "float32") == held
    assert inference_memory.cache_bytes_per_image(cfg, 1, "float32") == held * 4 // 7


def test_the_papers_memory_of_an_image():
    """358 MB and 0.6 MB an image are keys, values and a float32 logit vector each, in MiB."""
    cfg = paper_figures.build(paper_figures.PaperModel(tokens=1, layers=4), VICUNA_7B)
    logits = 32000 * 4
    one = inference_memory.cache_bytes_per_image(cfg, 1) + logits
    assert one / 2**20 == pytest.approx(0.62, abs=5e-3)
    base = inference_memory.cache_bytes_per_image(llava_1_5(cfg), 1)
    assert (base + 576 * logits) / 2**20 == pytest.approx(358, abs=0.5)
    weights = sum(inference_memory.weight_bytes(cfg, "bfloat16").values())
    assert weights == pytest.approx(15.75e9, rel=5e-3)


def test_weights_are_those_of_the_arrays():
    cfg = tiny.model("release")
    held = {n: param_tree.paths(getattr(tiny.weights(cfg), n)) for n in ("llm", "compressor")}
    for name, leaves in held.items():
        nbytes = sum(leaf.nbytes for leaf in leaves.values())
        assert inference_memory.weight_bytes(cfg, "float32")[name] == nbytes
        small = inference_memory.weight_bytes(cfg, "int8")[name]
        assert nbytes / 4 < small < nbytes / 2
        smallest = inference_memory.weight_bytes(cfg, "int4")[name]
        assert smallest < small if name == "llm" else smallest == small


def test_compiled_programs_hold_weights_and_cache():
    cfg = tiny.model("release")
    few = inference_memory.compiled_programs(cfg, REQUEST, "float32")
    many = inference_memory.compiled_programs(
        cfg, Request(text=9, images=2, parts=1, new_tokens=103), "float32"
    )
    grown = many["decode"].inputs - few["decode"].inputs
    assert grown == pytest.approx(
        100 * inference_memory.cache_bytes_per_token(cfg, "float32"), rel=0.05
    )
    weights = sum(inference_memory.weight_bytes(cfg, "float32").values())
    assert {program.weights for program in few.values()} == {weights}
    assert all(program.temporaries > 0 for program in few.values())


@pytest.mark.parametrize("dialect", ["release", "llava-1.5"])
def test_the_command_on_a_folder(dialect, capsys):
    folder = str(tiny_model.folder(dialect))
    assert (
        main(["profile", "latency", folder, "--repeats", "2", "--new-tokens", "2", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert list(found["milliseconds"]) == ["LLaVA-1.5", folder]
    assert found["request"]["text"] == 43
    for spread in (spread for times in found["milliseconds"].values() for spread in times.values()):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert found["machine"]["GB/s"] > 0 and found["token bytes"][folder] > 0
    assert main(["profile", "latency", folder, "--dtype", "int8", "bfloat16"]) == 2
    assert "--dtype has 2 names" in capsys.readouterr().err
    assert main(["profile", "memory", folder]) == 0
    assert "this model" in capsys.readouterr().out
    assert main(["profile", "flops", folder, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    ours = [row["ours"]["total"] for row in rows]
    assert np.isclose(*ours) == (dialect == "llava-1.5")


def test_help_names_the_published_shapes():
    assert re.split(", | or ", BACKBONES_HELP) == list(BACKBONES)


def test_the_command_without_a_model(capsys):
    assert main(["profile", "flops"]) == 0
    shown = capsys.readouterr().out
    assert "43 tokens give 14 of the 16" in shown and "Table 14 splits" in shown
    for words, said in (
        (["latency"], "no model is given"),
        (["flops", "--abstract", "gpt"], '"gpt" is unknown'),
        (["flops", "DIR", "--tokens", "4"], "DIR has its own shape"),
        (["memory", "--abstract", "vicuna-7b", "--resolution", "336", "672"], "has 2 numbers"),
        (["memory", "--abstract", "vicuna-7b", "--tokens", "1", "16"], "--tokens has 2 numbers"),
        (["flops", "--tokens", "1", "--layers", "-1"], "--layers is -1; give 0 or more"),
        (["flops", "--tokens", "0"], "--tokens is 0; give 1 or more"),
        (["latency", "DIR", "--llm-layers", "4"], "DIR has its own shape"),
        (["latency", "--vision-layers", "0"], "--vision-layers is 0; give 1 or more"),
        (["latency", "--abstract", "llama-1.1b", "--dtype", "int3"], "int3"),
    ):
        assert main(["profile", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
