"""Our adapter in PEFT itself: merged weights and logits beside those of `convert --merge`.

python tests/real/peft_back.py OUT      (torch, transformers, peft; OUT: of tests/real/adapter.py)
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

# Float32 sums of as many products as the width, in another order.
SUMS = 1e-5


def main(out: Path) -> None:
    adapter, base = out / "run" / "stage2" / "model", out / "run" / "stage1" / "model"
    plain = language_model(base)
    ids = torch.arange(1, 20)[None]
    before = plain(ids).logits
    adapted = PeftModel.from_pretrained(plain, adapter)
    after, wanted = adapted(ids).logits, language_model(out / "merged")(ids).logits
    merged = adapted.merge_and_unload().state_dict()
    ours = load_file(out / "merged" / "model.safetensors")
    errors = [(merged[n] - ours[n]).abs().max().item() for n in merged if n in ours]
    moved = (after - before).abs().max().item()
    error = (after - wanted).abs().max().item()
    print(
        f"{len(errors)} weights, error {max(errors):.1e}; logits {error:.1e}, moved by {moved:.1e}"
    )
    if max(errors) > SUMS or error > 10 * SUMS or moved < 100 * SUMS:
        sys.exit("PEFT does not see what was learnt here")


def language_model(folder: Path) -> LlamaForCausalLM:
    said = json.loads((folder / "config.json").read_text())
    names = LlamaConfig().to_dict().keys() & said.keys() - {"model_type", "architectures"}
    model = LlamaForCausalLM(LlamaConfig(**{name: said[name] for name in names}))
    tensors = load_file(folder / "model.safetensors")
    lacks, _ = model.load_state_dict(tensors, strict=False)
    assert not lacks, lacks
    return model.eval()


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
