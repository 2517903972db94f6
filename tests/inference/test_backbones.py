"""Greedy answers of other families than LLaMA, with a cache and without, token for token."""

import dataclasses

import pytest

from llava_mini_jax import config as configs
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.inference import blocks, bounds, recompute
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.inference.session import Session
from llava_mini_jax.models import llava_mini
from llava_mini_jax.ops.rope import RopeConfig, YarnScaling
from tests import tiny, tiny_model
from tests.inference.steps import said

fast_compilation = tiny.fast_compilation

QUESTIONS = ["what", "which digit is in row 2 column 1 ?", "read the page " * 12]
PICTURES = [[tiny_model.picture(1)], None, [tiny_model.picture(2), tiny_model.picture(3)]]
TOKENS = 24
SIGLIP = dict(
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    activation="gelu_pytorch_tanh",
    image_size=18,
)
YARN = YarnScaling(
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=4.0,
    beta_slow=0.5,
    truncate=True,
    attention_factor=1.14,
)
FAMILIES = {
    "qwen3": dict(qk_norm=True, head_width=12),
    "mistral": dict(window=11),
    "qwen2 and yarn": dict(qkv_bias=True, rope=RopeConfig(theta=100.0, scaling=YARN)),
    "smollm3": dict(nope_layers=(1,)),
}


def model(family: str) -> Model:
    bundle = tiny_model.bundle("release" if family == "mistral" else "paper")
    llm = dataclasses.replace(bundle.model.llm, layers=2, **FAMILIES[family])
    vision = dataclasses.replace(bundle.model.vision, **SIGLIP if family == "qwen3" else {})
    kind = "release" if family == "mistral" else "paper"
    cfg = tiny.model(kind, llm, vision, grid=1, prefusion_layers=2)
    images = configs.image_config(kind, vision)
    bundle = dataclasses.replace(bundle, model=cfg, images=images, eos_ids=())
    params = llava_mini.unrolled(tiny.weights(cfg))
    found = Model(params, bundle, build_tokenizer(), bounds.buckets_for(bundle))
    found.__dict__["stop_ids"] = (cfg.llm.vocab_size,)  # which no token has: answers do not end
    return found


QUICK = ("mistral",)  # the others compile for as long


@pytest.fixture(
    scope="module",
    params=[f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def opened(request) -> Model:
    return model(request.param)


def recomputed(model: Model, examples: list, settings: Settings) -> list[list[int]]:
    texts = [
        bounds.empty_text(one, model.bundle, model.tokenizer, model.stop_ids, settings)
        for one in examples
    ]
    rows = [*examples, *recompute.padding_rows(examples)]
    sampling = make_sampling(len(rows), 0.0, 1.0, 0, [0] * len(rows), ())
    logits = recompute.whole_model(model.params, model.bundle, model.buckets)
    list(recompute.decode(logits, rows, texts, sampling))
    return [text.ids for text in texts]


def test_a_cache_changes_no_token(opened: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest prompt is read in blocks, behind the places that its slot holds already."""
    monkeypatch.setattr(blocks, "FRESH", 32)
    examples = [
        opened.request(question, opened.read_pictures(shown, None))
        for question, shown in zip(QUESTIONS, PICTURES, strict=True)
    ]
    settings = Settings(max_new_tokens=TOKENS)
    expected = recomputed(opened, examples, settings)
    assert said(opened, examples, settings).ids == expected
    assert [len(ids) for ids in expected] == [TOKENS] * 3 and len(set(map(tuple, expected))) > 1
    # As people ask, one at a time.
    for question, shown, ids in zip(QUESTIONS, PICTURES, expected, strict=True):
        answer = opened.generate(question, shown, max_new_tokens=TOKENS)
        assert answer == opened.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_session_says_the_same(opened: Model) -> None:
    session = Session(opened, Settings(max_new_tokens=TOKENS))
    session.show_image(PICTURES[0][0])
    answer = "".join(session.ask(QUESTIONS[0]))
    assert answer == opened.generate(QUESTIONS[0], PICTURES[0], max_new_tokens=TOKENS)


def test_another_window_says_something_else() -> None:
    """So that the test above sees it: what is forgotten matters."""
    settings = Settings(max_new_tokens=TOKENS)
    given = model("mistral")
    llm = dataclasses.replace(given.bundle.model.llm, window=12)
    cfg = dataclasses.replace(given.bundle.model, llm=llm)
    other = dataclasses.replace(given, bundle=dataclasses.replace(given.bundle, model=cfg))
    examples = [given.request(QUESTIONS[1], given.read_pictures(None, None))]
    assert recomputed(given, examples, settings) != recomputed(other, examples, settings)
