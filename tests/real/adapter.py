"""An adapter that training leaves here, its base, and both merged, for tests/real/peft_back.py.

python -m tests.real.adapter OUT      (this project's environment)
"""

import dataclasses
import sys
from pathlib import Path

from llava_mini_jax import cli
from llava_mini_jax.models.lora import LoraConfig
from llava_mini_jax.training import loop
from llava_mini_jax.training.stages import with_lora
from tests.training import tiny_stages


def main(out: Path) -> None:
    *_, stage1, stage2 = tiny_stages.stages()
    stage1 = dataclasses.replace(stage1, start="fresh", steps=2)
    stage2 = with_lora(dataclasses.replace(stage2, lora=LoraConfig(rank=4), steps=4))
    loop.run([stage1, stage2], str(out / "run"))
    adapter, merged = out / "run" / "stage2" / "model", out / "merged"
    if cli.main(["convert", str(adapter), str(merged), "--merge"]):
        sys.exit("convert --merge failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
