"""LoRA in a tree of parameters: frozen weights, and changes of low rank that are learnt.

    spec --LoraConfig.targets--> LoraWeight(base, lora_a, lora_b) in place of a weight
                                  |           '--- trained: a random, b zero: it begins as the base
                                  '-- frozen; the product of both is ops/einsum.py's

Hu et al. 2021, section 4.1; the beginning and the scale are PEFT's. No function of a model knows of
it: `einsum` alone looks inside a weight.
"""

import dataclasses
import math
from typing import Any

import jax

from llava_mini_jax import params as param_tree
from llava_mini_jax.ops.einsum import LoraWeight
from llava_mini_jax.params import ParamSpec, Tree, torch_linear, zeros

LEARNT = ("*/lora_a", "*/lora_b")
BASES = ("same", "int8", "int4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 0  # of the adapters; 0: no LoRA, the weights themselves are trained
    alpha: float = 0.0  # adapters are scaled by alpha / rank; 0: twice the rank, as in LLaVA
    targets: tuple[str, ...] = ("llm/layers/*_proj",)  # path patterns of the weights with adapters
    base: str = "same"  # dtype of the frozen weights: param_dtype ("same"), or one of BASES

    @property
    def effective_alpha(self) -> float:
        return self.alpha or 2.0 * self.rank


NO_LORA = LoraConfig()


def is_lora(leaf: Any) -> bool:
    return isinstance(leaf, LoraWeight)


def with_changes(spec: Tree, cfg: LoraConfig) -> Tree:
    """The spec with a LoraWeight in place of every weight that `targets` match."""

    def one(path: str, leaf: ParamSpec) -> ParamSpec | LoraWeight:
        return _change(leaf, cfg) if param_tree.matches(path, cfg.targets) else leaf

    return param_tree.map_paths(one, spec) if cfg.rank else spec


def _change(leaf: ParamSpec, cfg: LoraConfig) -> LoraWeight:
    first, outputs = int(leaf.stacked), leaf.output_axes
    layers, out, into = leaf.shape[:first], leaf.shape[first:outputs], leaf.shape[outputs:]
    axes = leaf.axes[:first], leaf.axes[first:outputs], leaf.axes[outputs:]
    return LoraWeight(
        base=leaf,
        # PEFT's beginning: Kaiming's uniform with a = sqrt(5), which is torch.nn.Linear's.
        lora_a=ParamSpec(
            (*layers, cfg.rank, *into), (*axes[0], None, *axes[2]), torch_linear(math.prod(into))
        ),
        lora_b=ParamSpec((*layers, *out, cfg.rank), (*axes[0], *axes[1], None), zeros),
        scale=cfg.effective_alpha / cfg.rank,
    )


def plain_paths(tree: Tree) -> dict[str, tuple[str, Any]]:
    """{path without LoRA: (path, leaf)} of what a tree has beside its changes."""
    return {
        path.removesuffix("/base"): (path, leaf)
        for path, leaf in param_tree.paths(tree).items()
        if not param_tree.matches(path, LEARNT)
    }


def bases(tree: Tree) -> Tree:
    """The tree with the base of every LoraWeight in its place."""
    return jax.tree.map(lambda leaf: leaf.base if is_lora(leaf) else leaf, tree, is_leaf=is_lora)
