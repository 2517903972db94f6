"""A model folder of the released checkpoint's shapes with random weights.

    python -m tests.real_size FOLDER [--layers 32]

LLaMA-3.1-8B, CLIP ViT-L/14-336, the release's compressor and four pre-fusion layers in bfloat16:
18.5 GB on disk, written shard by shard. Numbers have the spread of trained ones, so answers are
noise of ordinary size and no NaN. The tokenizer has as many tokens as LLaMA-3.1's; every one but
the special ones is readable, so that answers can be seen.
"""

import argparse
import dataclasses
import itertools
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llava_mini_jax import config as configs
from llava_mini_jax import params as param_tree
from llava_mini_jax.models import llava_mini
from llava_mini_jax.weights.export_hf import export_model
from llava_mini_jax.weights.lazy_params import lazy_params

WORDS = 128_000  # LLaMA-3.1's tokens before the special ones
SPECIALS = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
SPECIALS |= {8: "eom_id", 9: "eot_id"}
POSITIONS = 8192  # of a prompt


def bundle(layers: int) -> configs.Bundle:
    llm = dataclasses.replace(configs.LLAMA_3_1_8B, layers=layers)
    return configs.Bundle(
        model=configs.build(llm, configs.CLIP_L_336, "release", prefusion_layers=min(4, layers)),
        images=configs.image_config("release", configs.CLIP_L_336),
        prompt=configs.prompt_config("release", "llama_3_1", POSITIONS),
        eos_ids=(WORDS + 1, WORDS + 8, WORDS + 9),
        pad_id=WORDS + 4,
    )


def tokenizer() -> Any:
    """Bytes, pairs and triples of printable characters up to LLaMA-3.1's number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["Ġ" if c == " " else c for c in string.printable if c == " " or c.isprintable()]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(itertools.product(letters, letters))
    triples = itertools.product(letters, letters, letters)
    triples = list(itertools.islice(triples, WORDS - len(bytes_) - len(pairs)))
    merges = [*pairs, *((a + b, c) for a, b, c in triples)]
    vocab = {word: i for i, word in enumerate([*bytes_, *map("".join, merges)])}
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = [SPECIALS.get(i, f"reserved_special_token_{i}") for i in range(256)]
    core.add_special_tokens([f"<|{name}|>" for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )


def random_leaf(spec: param_tree.ParamSpec, noise: np.ndarray) -> Callable[[], np.ndarray]:
    """Norms and biases as they begin; everything else normal, from some place in `noise`."""

    def make() -> np.ndarray:
        if spec.init in (param_tree.ones, param_tree.zeros):
            return np.full(spec.shape, float(spec.init is param_tree.ones), noise.dtype)
        return np.resize(np.roll(noise, len(spec.shape) * spec.shape[0]), spec.shape)

    return make


def write(folder: Path, layers: int) -> None:
    given = bundle(layers)
    drawn = np.random.default_rng(0).standard_normal(2**22 + 3, np.float32)
    noise = (0.02 * drawn).astype(ml_dtypes.bfloat16)
    spec = llava_mini.unrolled(llava_mini.spec(given.model))
    made = {path: random_leaf(leaf, noise) for path, leaf in param_tree.paths(spec).items()}
    params = lazy_params(given, {}, dtype="bfloat16", made=made)
    export_model(params, given, folder, tokenizer=tokenizer())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="of the language model; default: 32")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.layers)
