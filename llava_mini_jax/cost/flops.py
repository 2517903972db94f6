"""FLOPs by formula: of a forward pass by component, and of a training step.

    model config, Shape of a batch --products--> matrix products  --+--> forward_flops: each once
                                                                    |
    trainable path patterns ------------> operands with a gradient -+--> step_flops: once more each

A matrix product of n multiply-adds is 2n FLOPs, and n * 2 again for each of its operands whose
gradient is needed: a weight that is trained, an activation behind something that is trained. Below
the first trained part nothing is computed backwards. That is the model's work: recomputation
(`remat`, `loss_chunk`) is not counted, nor is anything elementwise, with one exception below.
Attention counts all keys of a sequence, seen or not, and padding counts, because devices compute
both.

The paper counts otherwise (paper_figures.py): by its rule, 43 tokens of text give its 8.55 TFLOPs
for LLaVA-1.5; ours are 8.77 there.
"""

import functools
import math
from collections.abc import Callable

from llava_mini_jax import params as param_tree
from llava_mini_jax.cost.network import COMPONENTS, Behind, Product, Shape, products
from llava_mini_jax.data.batches.examples import TrainBatch
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.models.lora import NO_LORA, LoraConfig, plain_paths, with_changes


def shape_of(batch: TrainBatch) -> Shape:
    """The sizes of a training batch of arrays, of abstract ones too."""
    B, I, J = batch.inputs.pixels_BIJYXC.shape[:3]
    T, F = batch.inputs.ids_BT.shape[1], batch.inputs.fuse_BF.shape[1]
    S, wide = batch.labels_BS.shape[1], batch.inputs.wide_slots_BU
    question = batch.inputs.question_BIT
    return Shape(
        rows=B,
        images=I,
        parts=J,
        text=T,
        fused=None if F == T else F,
        sequence=S,
        wide=0 if wide is None else wide.shape[1],
        logits=S - 1,
        question=None if question is None else question.shape[2],
    )


def forward_flops(cfg: LlavaMiniConfig, shape: Shape) -> dict[str, float]:
    """FLOPs of a forward pass over a batch, by component (COMPONENTS)."""
    total = dict.fromkeys(COMPONENTS, 0.0)
    for product in products(cfg, shape):
        total[product.component] += product.flops
    return total


@functools.cache
def step_flops(
    cfg: LlavaMiniConfig, trainable: tuple[str, ...], shape: Shape, lora: LoraConfig = NO_LORA
) -> float:
    """FLOPs of a training step over a batch of all devices' rows, whatever `accumulate` is.

    `trainable` are path patterns as in a TrainConfig, with its `lora`. The optimiser's work is not
    counted.
    """
    spec = with_changes(llava_mini.spec(cfg), lora)
    trained, changes = _trained(spec, trainable), _changes(spec)

    def flops(product: Product) -> float:
        path = product.operands[1][0] if product.linear else ""
        if path not in changes:
            return product.flops * (1 + sum(map(trained, product.operands)))
        # The base's own gradient is not computed; of the two thin matrices' products it is.
        once = 1 + trained(product.operands[0])
        return product.flops * (once + changes[path] * (once + 1))

    return sum(map(flops, products(cfg, shape)))


def _changes(spec: LlavaMini) -> dict[str, float]:
    """Numbers of a LoRA's two matrices by the path of their weight, as a part of the weight's."""
    size = {path: math.prod(leaf.shape) for path, leaf in param_tree.paths(spec).items()}
    return {
        path: (size[f"{path}/lora_a"] + size[f"{path}/lora_b"]) / size[own]
        for path, (own, _) in plain_paths(spec).items()
        if own != path
    }


def recomputed_flops(
    cfg: LlavaMiniConfig,
    trainable: tuple[str, ...],
    shape: Shape,
    lora: LoraConfig = NO_LORA,
    *,
    loss_chunk: int,
) -> float:
    """FLOPs beside `step_flops`: of what the backward pass computes again, as nothing kept it.

    By `remat`, of the decoder's layers and pre-fusion's; and chunks of logits.
    """
    trained = _trained(with_changes(llava_mini.spec(cfg), lora), trainable)
    chunked = 0 < loss_chunk < shape.logits

    def again(product: Product) -> bool:
        path = product.operands[1][0] if product.linear else "attention"
        if product.component == "lm_head":
            return chunked
        in_layers = product.component in ("llm", "prefusion")
        return in_layers and not path.endswith(_KEPT[cfg.remat])

    found = (p for p in products(cfg, shape) if any(map(trained, p.operands)))
    return sum(p.flops for p in found if again(p))


# Products of a layer that a remat policy (ops/layers.py) need not compute again. Nobody reads the
# last one's result a second time.
_INTO_ATTENTION = ("q_proj", "k_proj", "v_proj")
_KEPT = {
    "none": ("",),
    "matmuls": ("proj",),
    "attention": ("attention", "down_proj", *_INTO_ATTENTION),
    "full": ("down_proj",),
}


def _trained(spec: LlavaMini, trainable: tuple[str, ...]) -> Callable[[Behind], bool]:
    """Whether anything that an operand depends on is trained."""
    paths = param_tree.paths(spec)
    names = [path for path in paths if param_tree.matches(path, trainable)]
    return lambda behind: any(
        name == part or name.startswith(f"{part}/") for part in behind for name in names
    )
