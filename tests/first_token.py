"""The first token and those after it beside transformers', in turns, with random weights.

    python -m tests.first_token PYTHON [--repeats 7] [--tokens 57] [--dtype float32]

PYTHON is one that has torch and transformers; this one has neither. Both have the shapes of
SmolLM2-135M and are asked for 1 token and for 17: the difference is what a token costs.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

SHAPE = dict(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
    max_position_embeddings=8192, rope_theta=100_000.0, rms_norm_eps=1e-5,
)  # fmt: skip
FEW, MANY = 1, 17


def transformers_worker(tokens: int, dtype: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype)).eval()
    ids = torch.randint(3, SHAPE["vocab_size"], (1, tokens))

    def ask(count: int) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=count,
                max_new_tokens=count, do_sample=False, pad_token_id=2,
            )  # fmt: skip
        return time.perf_counter() - began

    for line in sys.stdin:
        print(json.dumps(ask(int(line))), flush=True)


def ours(tokens: int, dtype: str) -> Callable[[int], float]:
    import jax
    import numpy as np

    from llava_mini_jax import config as configs
    from llava_mini_jax import params as param_tree
    from llava_mini_jax.data.batches.examples import Example
    from llava_mini_jax.data.digits.pages import build_tokenizer
    from llava_mini_jax.data.text.conversation import IGNORE
    from llava_mini_jax.inference import bounds
    from llava_mini_jax.inference.answer import Settings
    from llava_mini_jax.inference.model import Model
    from llava_mini_jax.json_fields import Fields
    from llava_mini_jax.models import llava_mini
    from llava_mini_jax.weights.hf_config import llama_from_hf

    vision = dataclasses.replace(configs.CLIP_L_336, layers=2)
    cfg = configs.build(
        llama_from_hf(Fields(SHAPE, "SmolLM2-135M"), "llama"),
        vision, "paper", prefusion_layers=0, compute_dtype=dtype,
    )  # fmt: skip
    bundle = configs.Bundle(
        model=cfg,
        images=configs.image_config("paper", vision),
        prompt=configs.prompt_config("paper", "vicuna_v1", cfg.llm.max_positions),
        eos_ids=(),
        pad_id=0,
    )
    spec = llava_mini.unrolled(llava_mini.spec(cfg))
    params = param_tree.init(jax.random.key(0), spec, dtype)
    model = Model(params, bundle, build_tokenizer(), bounds.buckets_for(bundle))
    ids = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], tokens).astype(np.int32)
    pixels = np.zeros((0, 1, vision.image_size, vision.image_size, 3), np.uint8)
    example = Example(ids, ids > 0, np.full(tokens, IGNORE, np.int32), pixels, ())

    def ask(count: int) -> float:
        began = time.perf_counter()
        model.answer_requests([example], Settings(max_new_tokens=count), batch_size=1)
        return time.perf_counter() - began

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=57)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    command = [args.python, __file__, "--worker", str(args.tokens), args.dtype]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as peer:
        assert peer.stdin is not None and peer.stdout is not None

        def ask_peer(count: int) -> float:
            print(count, file=peer.stdin, flush=True)
            return json.loads(peer.stdout.readline())

        askers = {"this package": ours(args.tokens, args.dtype), "transformers": ask_peer}
        for ask in askers.values():  # compiles, and warms up
            ask(FEW), ask(MANY), ask(FEW)
        found = {name: [] for name in askers}
        for _ in range(args.repeats):
            for name, ask in askers.items():
                found[name].append((ask(FEW), ask(MANY)))
        for name, times in found.items():
            first = [1e3 * few for few, _ in times]
            each = [1e3 * (many - few) / (MANY - FEW) for few, many in times]
            print(
                f"{name}: first token {statistics.median(first):.0f} ms"
                f" ({min(first):.0f} to {max(first):.0f}),"
                f" each after it {statistics.median(each):.1f} ms"
                f" ({min(each):.1f} to {max(each):.1f})"
            )
        peer.stdin.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        transformers_worker(int(sys.argv[2]), sys.argv[3])
    else:
        main()
