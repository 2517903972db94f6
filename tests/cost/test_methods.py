"""What each compressor costs by image and by question, and the command that shows it."""

import argparse
import dataclasses
import functools
import json

import jax
import pytest

from llava_mini_jax import sharding
from llava_mini_jax.cli import main, profile_compressors
from llava_mini_jax.config import CLIP_L_336, VICUNA_7B
from llava_mini_jax.cost import inference_memory, methods, network, programs
from llava_mini_jax.cost.flops import forward_flops
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from tests import tiny
from tests.tiny_compressors import METHODS

fast_compilation = tiny.fast_compilation

TEXT = 7


def config(name: str, **changes) -> LlavaMiniConfig:
    own = dataclasses.replace(METHODS[name], **changes)
    return tiny.model("paper", compressor=own, prefusion_layers=0)


def llm_flops(cfg: LlavaMiniConfig, sequence: int) -> float:
    text = sequence - cfg.tokens_per_image(1)
    shape = network.Shape(
        rows=1, images=1, parts=1, text=text, sequence=sequence, logits=1, question=TEXT
    )
    return forward_flops(cfg, shape)["llm"]


def test_a_next_question_is_the_rest_of_a_longer_one() -> None:
    """The language model's work, but for what the first text's queries see of the second's keys:
    a forward pass counts all keys for all queries."""
    cfg = config("m3")
    first = cfg.tokens_per_image(1) + TEXT
    layer = network.layer(cfg.llm)
    unseen = 4.0 * cfg.llm.layers * layer.scores(first, TEXT) * layer.head_width
    found = methods.cost(cfg, TEXT)
    head = 2.0 * cfg.llm.vocab_size * cfg.llm.width
    rest = llm_flops(cfg, first + TEXT) - llm_flops(cfg, first) - unseen
    assert found.turn_flops == rest + head
    assert found.again == 0 and found.last == cfg.tokens_per_image(1)


def test_pre_fusion_reads_the_text_again_and_no_patch() -> None:
    one, two = (tiny.model("paper", prefusion_layers=n) for n in (1, 2))
    more = methods.cost(two, TEXT).turn_flops - methods.cost(one, TEXT).turn_flops
    layer, patches = network.layer(one.llm), one.patches_per_image(1)
    weights = sum(n for path, n in network.weights(one).items() if "prefusion" in path)
    scores = 4 * 2 * TEXT * layer.scores(1, patches + 2 * TEXT) * layer.head_width
    assert more == 2 * 2 * TEXT * weights + scores
    bytes_ = methods.cost(two, TEXT).fusion_bytes
    assert bytes_ == 2 * patches * layer.keys_values(1) * 4


def test_what_stays_of_a_picture() -> None:
    voco, fastv, mask = config("voco"), config("fastv", variant="drop"), config("fastv")
    each = network.layer(voco.llm).keys_values(1) * 4
    patches = voco.patches_per_image(1)
    assert methods.cost(voco, TEXT).cache_bytes == 2 * 2 * each  # layers, tokens
    assert methods.cost(fastv, TEXT).cache_bytes == (patches + 5) * each
    assert methods.cost(mask, TEXT).cache_bytes == methods.cost(mask, TEXT).last == 0
    for cfg in (voco, fastv):
        found = inference_memory.cache_bytes_per_image(cfg, 1, "float32")
        assert found == methods.cost(cfg, TEXT).cache_bytes


@pytest.mark.parametrize("name", ["fastv", "llama_vid"])
def test_who_reads_the_question_begins_anew(name: str) -> None:
    found = methods.cost(config(name), TEXT)
    assert found.again == found.tokens
    assert found.turn_flops > found.first_flops > found.picture_flops


def test_the_question_s_length_counts() -> None:
    cfg = config("llama_vid")
    assert methods.cost(cfg, TEXT).picture_flops > methods.cost(cfg, TEXT - 1).picture_flops


def test_the_paper_s_sizes(capsys) -> None:
    assert main(["profile", "compressors", "VoCo", "FastV", "LLaVA-1.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    assert list(found) == ["VoCo", "FastV", "LLaVA-1.5"]
    token = 2 * 2 * 32 * 4096  # keys and values, bfloat16, layers
    assert found["VoCo"]["cache_bytes"] == 2 * token
    assert found["LLaVA-1.5"]["cache_bytes"] == 576 * token
    assert found["FastV"]["cache_bytes"] == (2 * 576 + 30 * 288) * token // 32
    assert main(["profile", "compressors", "LLaVA-Mini"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[3].split()[:4] == ["LLaVA-Mini", "1", "1", "0"]
    assert set(methods.full_size(CLIP_L_336, VICUNA_7B)) > {"M3", "MQT", "PruMerge+", "LLaMA-VID"}


@pytest.mark.slow
def test_times_of_those_that_have_sessions(capsys) -> None:
    models = {"a": config("voco"), "b": config("fastv"), "c": config("mqt")}
    args = argparse.Namespace(dtype="float32", text=9, repeats=1)
    found = profile_compressors._times(models, args)
    assert set(found) == {"a", "c"}
    assert all(each.median > 0 for pair in found.values() for each in pair)
    costs = {name: methods.cost(cfg, 9) for name, cfg in models.items()}
    rows = profile_compressors.lines(costs, found, 9)
    assert rows[2].split()[-2:] == ["first", "next"] and "ms" in rows[3] and rows[4][-1] == "-"


@pytest.mark.parametrize(
    "given, said",
    [
        (["BLIP"], 'method "BLIP" is unknown; give one of LLaVA-1.5, LLaVA-Mini, M3'),
        (["--text", "0"], "--text is 0; give 1 or more"),
        (["--repeats", "3"], "without --latency"),
        (["LLaMA-VID", "--text", "600"], "--text 600, method LLaMA-VID: a question of 600 ids"),
    ],
)
def test_mistakes(capsys, given: list[str], said: str) -> None:
    assert main(["profile", "compressors", *given]) == 2
    assert said in capsys.readouterr().err


def test_programs_of_methods() -> None:
    sizes = programs.Sizes(rows=1, length=8, images=2, parts=1, slots=32)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        with pytest.raises(InputError, match='"voco" reads prompts with programs of its own'):
            programs.call("read_fresh", config("voco"), "float32", sizes)
        function, given, static = programs.call(
            "prefuse_images", config("prumerge"), "float32", sizes
        )
        visual, _ = jax.eval_shape(functools.partial(function, **static), *given)
    assert visual.valid_IQ.shape == (2, config("prumerge").tokens_per_image(1))
