"""FLOPs by formula: of a forward pass by component, and of a training step.

    model config, Shape of a batch --_products--> matrix products --+--> forward_flops: each once
                                                                    |
    trainable path patterns ------------> operands with a gradient -+--> step_flops: once more each
    device kind --> peak_flops

A matrix product of n multiply-adds is 2n FLOPs, and n * 2 again for each of its operands whose
gradient is needed: a weight that is trained, an activation behind something that is trained. Below
the first trained part nothing is computed backwards. That is the model's work: recomputation
(`remat`, `loss_chunk`) is not counted, nor is anything elementwise, with one exception below.
Attention counts all keys of a sequence, seen or not, and padding counts, because devices compute
both.

The paper counts otherwise (section 5.3, tables 7 and 14; its tool sees linear layers only): no
attention scores, all 24 layers of the tower, whole last pre-fusion layer, logits of every position.
By its rule, 43 tokens of text give its 8.55 TFLOPs for LLaVA-1.5; ours are 8.77 there.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

from llava_mini_jax import params as param_tree
from llava_mini_jax.data.batches.examples import TrainBatch
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.compressor import CompressorConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMiniConfig

COMPONENTS: tuple[str, ...] = ("vision", "projector", "compressor", "prefusion", "llm", "lm_head")

# Dense bfloat16 TFLOP/s of one device, by the beginning of `jax.Device.device_kind`; vendors' data
# sheets. The first that fits counts.
_PEAK_TFLOPS = {
    "TPU v4 lite": 138.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,  # v5p
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA A100": 312.0,
    "NVIDIA A800": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a batch: what decides how much a device computes."""

    rows: int  # B
    images: int  # I: images or frames of a row, padding included
    parts: int  # J: 1 without high resolution
    text: int  # T
    sequence: int  # S: positions of the language model
    wide: int = 0  # U: positions in front of compression inside the language model
    logits: int  # positions of a row whose logits are computed: S - 1 in training, 1 in prefill


def shape_of(batch: TrainBatch) -> Shape:
    """The sizes of a training batch of arrays, of abstract ones too."""
    B, I, J = batch.inputs.pixels_BIJYXC.shape[:3]
    S, wide = batch.labels_BS.shape[1], batch.inputs.wide_slots_BU
    return Shape(
        rows=B,
        images=I,
        parts=J,
        text=batch.inputs.ids_BT.shape[1],
        sequence=S,
        wide=0 if wide is None else wide.shape[1],
        logits=S - 1,
    )


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device of this `jax.Device.device_kind`; None if unknown."""
    fitting = (peak for kind, peak in _PEAK_TFLOPS.items() if device_kind.startswith(kind))
    tera = next(fitting, None)
    return None if tera is None else tera * 1e12


def forward_flops(cfg: LlavaMiniConfig, shape: Shape) -> dict[str, float]:
    """FLOPs of a forward pass over a batch, by component (COMPONENTS)."""
    total = dict.fromkeys(COMPONENTS, 0.0)
    for product in _products(cfg, shape, lambda _: False):
        total[product.component] += product.flops
    return total


@functools.cache
def step_flops(cfg: LlavaMiniConfig, trainable: tuple[str, ...], shape: Shape) -> float:
    """FLOPs of a training step over a batch of all devices' rows, whatever `accumulate` is.

    `trainable` are path patterns as in a TrainConfig. The optimiser's work is not counted.
    """
    paths = param_tree.paths(llava_mini.spec(cfg))
    names = [path for path in paths if param_tree.matches(path, trainable)]

    def trained(part: str) -> bool:
        return any(name == part or name.startswith(f"{part}/") for name in names)

    return sum(p.flops * (1 + p.gradients) for p in _products(cfg, shape, trained))


# ------------------------------------------------------------------------ the model as products


@dataclasses.dataclass(frozen=True)
class _Product:
    component: str
    flops: float  # forward
    gradients: int  # how many of its two operands need a gradient


_Trained = Callable[[str], bool]  # whether anything in this part of the parameter tree is trained


def _products(cfg: LlavaMiniConfig, shape: Shape, trained: _Trained) -> Iterator[_Product]:
    """The matrix products of models/llava_mini.py's forward pass, in its order.

    `live_*` says whether a gradient runs into these activations.
    """
    text, kind = shape.text, cfg.compressor.kind
    pictures = shape.rows * shape.images
    whole = cfg.patches_per_image(shape.parts)
    detail = cfg.detail_per_image(shape.parts)
    tokens = cfg.tokens_per_image(shape.parts)
    live_text = trained("llm/embed_tokens") and not cfg.detach_text
    live = live_text
    if pictures:
        live_features = trained("vision")
        live_patches = live_features or trained("projector")
        yield from _vision(cfg.vision, pictures * shape.parts, trained)
        uncompressed = kind == "none" or cfg.inside_layers > 0
        before = cfg.compress == "features" and not uncompressed
        read = cfg.prefusion_layers > 0 or uncompressed  # somebody reads the patches themselves
        if read or not before:
            projected = pictures * (whole if read else detail)
            yield from _projector(cfg, projected, live_features, trained)
        if not uncompressed:
            live_source = live_features if before else live_patches
            yield from _compressor(cfg.compressor, pictures, detail, live_source, trained)
        if before:
            live_tokens = live_features or trained("compressor")
            yield from _projector(cfg, pictures * tokens, live_tokens, trained)
        live = live or live_patches or trained("compressor") or trained("prefusion")
        if cfg.prefusion_layers:
            outputs = tokens if cfg.fuse_compressed else 0
            size = whole + (outputs if kind != "none" else 0)
            yield from _prefusion(cfg, pictures, size, outputs, text, live, trained)
    layers, llm = cfg.llm.layers, functools.partial(_layers, "llm", "llm/layers", cfg.llm)
    live = live or trained("llm/layers")
    if cfg.inside_layers:
        yield from llm(cfg.inside_layers, shape.rows, shape.wide, shape.wide, live, trained)
        yield from _compressor(cfg.compressor, pictures, detail, live, trained)
        layers -= cfg.inside_layers
    yield from llm(layers, shape.rows, shape.sequence, shape.sequence, live, trained)
    head = "llm/embed_tokens" if cfg.llm.tied_head else "llm/lm_head"
    flops = 2.0 * shape.rows * shape.logits * cfg.llm.width * cfg.llm.vocab_size
    yield _Product("lm_head", flops, (live or trained("llm/final_norm")) + trained(head))


def _vision(cfg: ClipConfig, pictures: int, trained: _Trained) -> Iterator[_Product]:
    E, M, P, L = cfg.width, cfg.mlp_width, cfg.grid**2, cfg.used_layers
    into = 2.0 * pictures * P * 3 * cfg.patch_size**2 * E
    yield _Product("vision", into, trained("vision/patch_embed"))
    names = ("patch_embed", "class_token", "position", "pre_norm", "layers")
    live, S = any(trained(f"vision/{name}") for name in names), P + 1
    products = {"q_proj": E, "k_proj": E, "v_proj": E, "o_proj": E, "fc1": M, "fc2": M}
    for name, width in products.items():
        flops = 2.0 * L * pictures * S * E * width
        yield _Product("vision", flops, live + trained(f"vision/layers/{name}/kernel"))
    yield _Product("vision", 4.0 * L * pictures * S * S * E, 2 * live)


def _projector(
    cfg: LlavaMiniConfig, tokens: int, live: bool, trained: _Trained
) -> Iterator[_Product]:
    E, D = cfg.projector.in_width, cfg.projector.out_width
    yield _Product("projector", 2.0 * tokens * E * D, live + trained("projector/fc1/kernel"))
    if cfg.projector.kind == "mlp2x_gelu":
        live = live or trained("projector/fc1")
        yield _Product("projector", 2.0 * tokens * D * D, live + trained("projector/fc2/kernel"))


def _compressor(
    cfg: CompressorConfig, pictures: int, patches: int, live: bool, trained: _Trained
) -> Iterator[_Product]:
    """`live` is whether a gradient runs into the patches."""
    E, Q = cfg.width, cfg.grid**2
    if cfg.kind == "average_pool":
        yield _Product("compressor", 2.0 * pictures * Q * patches * E, live)
        return
    learns = trained("compressor")
    either = live or learns
    each = 2.0 * pictures * Q * patches * E
    if cfg.kind == "similarity":
        # With one query the positions that are added to the keys are a fifth of the work.
        yield _Product("compressor", 1.0 * pictures * patches * E, 0)
        yield _Product("compressor", each, live + learns)
        yield _Product("compressor", each, live + either)
        return
    # Once for all pictures: the position table in the patches' size, and the queries.
    if cfg.grid**2 != patches:
        yield _Product("compressor", 2.0 * patches * Q * E, learns)
    sizes = {"q_proj": Q, "k_proj": pictures * patches, "v_proj": pictures * patches}
    for name, positions in (sizes | {"o_proj": pictures * Q}).items():
        gradients = either + trained(f"compressor/{name}/kernel")
        yield _Product("compressor", 2.0 * positions * E * E, gradients)
    yield _Product("compressor", 2 * each, 2 * either)


def _prefusion(
    cfg: LlavaMiniConfig,
    pictures: int,
    size: int,
    outputs: int,
    text: int,
    live: bool,
    trained: _Trained,
) -> Iterator[_Product]:
    """`size` positions of an image, the last `outputs` of which go on to the language model."""
    run = functools.partial(_layers, "prefusion", "prefusion/layers", cfg.llm)
    yield from run(cfg.prefusion_layers - 1, pictures, size, size, live, trained)
    # The last layer: keys and values of all positions, the rest where it is read.
    yield from run(1, pictures, size, 0, live, trained, only=("k_proj", "v_proj"))
    yield from run(1, pictures, outputs, size, live, trained, without=("k_proj", "v_proj"))
    yield from run(cfg.prefusion_layers, pictures, text, size + text, live, trained)


def _layers(
    component: str,
    path: str,
    cfg: LlamaConfig,
    layers: int,
    rows: int,
    positions: int,
    keys: int,
    live: bool,
    trained: _Trained,
    *,
    only: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> Iterator[_Product]:
    """LLaMA layers over `positions` that attend to `keys`, with all or some of their weights."""
    D, H, M = cfg.width, cfg.head_width, cfg.mlp_width
    widths = {"q_proj": cfg.heads * H, "k_proj": cfg.kv_heads * H, "v_proj": cfg.kv_heads * H}
    widths |= {"o_proj": cfg.heads * H, "gate_proj": M, "up_proj": M, "down_proj": M}
    for name in [name for name in only or widths if name not in without]:
        flops = 2.0 * layers * rows * positions * D * widths[name]
        yield _Product(component, flops, live + trained(f"{path}/{name}"))
    yield _Product(component, 4.0 * layers * rows * positions * keys * cfg.heads * H, 2 * live)
