"""Checks this code against recorded outputs: every array of a golden case.

    case/  model/ (+ clip/)  inputs.npz  outputs.npz  case.json
             |                  |            |
             '------- run ------'--compare --'--> one Check per array

The format is that of the golden data: the release's own model folders with its inputs, intermediate
arrays, logits, loss, gradients and greedily generated ids. The release runs images and frames one
call at a time: `CaseBatch.calls` has what each saw, and intermediate arrays lie in their order.
"""

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.batches.examples import (
    Buckets,
    Example,
    TrainBatch,
    fused_places,
    powers_of_two,
)
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.sampling import Sampling
from llava_mini_jax.models import clip, compressors, llama, llava_mini, prefusion, projector
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.models.parts import detail_and_whole
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.models.splice import pad_slots, plan_row
from llava_mini_jax.reproduce import stepwise, verify_compressors
from llava_mini_jax.reproduce.check import Check, read_case
from llava_mini_jax.training.loss import next_token_loss
from llava_mini_jax.weights import names
from llava_mini_jax.weights.export_hf import published_tensors
from llava_mini_jax.weights.folders import open_model
from llava_mini_jax.weights.import_hf import load_params


@dataclasses.dataclass(frozen=True)
class Case:
    bundle: Bundle
    published: list
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    about: dict[str, Any]
    forward_tolerance: float
    gradient_tolerance: float


def open_case(folder: Path) -> Case:
    """Reads a case; InputError where a file is missing or is not what the format says."""
    about, inputs, outputs = read_case(folder, "model/config.json")
    bundle, published = open_model(folder / "model", compute_dtype="float32")
    tolerance = about.get("suggested_tolerance", {})
    return Case(
        bundle=bundle,
        published=published,
        inputs=inputs,
        outputs=outputs,
        about=about,
        forward_tolerance=_first_number(tolerance.get("forward"), 2e-4),
        gradient_tolerance=_first_number(tolerance.get("gradients"), 1e-3),
    )


def _first_number(text: str | None, default: float) -> float:
    found = re.search(r"\d+(\.\d+)?e-?\d+|\d+\.\d+", text or "")
    return float(found[0]) if found else default


def verify(folder: Path, *, attention: str = "auto") -> Iterator[Check]:
    """One Check for every array of outputs.npz; an array that nothing here computes fails."""
    if verify_compressors.is_case(folder):
        yield from verify_compressors.verify(folder)
        return
    case = open_case(folder)
    model = dataclasses.replace(case.bundle.model, attention=attention)
    case = dataclasses.replace(case, bundle=dataclasses.replace(case.bundle, model=model))
    # Recordings are float32; accelerators would multiply in TF32 or bfloat16.
    with jax.default_matmul_precision("highest"):
        params = load_params(case.bundle, case.published, dtype="float32", unrolled=False)
        computed = dict(_forward(case, params))
        if any(name.startswith("grad/") for name in case.outputs):
            computed |= _gradients(case, params)
        if "generated_ids" in case.outputs:
            computed |= _generated(case, llava_mini.unrolled(params))
    for name, expected in case.outputs.items():
        tolerance = case.forward_tolerance
        if name.startswith("grad/"):
            tolerance = case.gradient_tolerance
        if expected.dtype.kind in "ib" or expected.dtype == bool:
            tolerance = 0.0
        yield Check(name, expected.shape, _error(name, expected, computed, case), tolerance)
    for name in case.about.get("parameters_without_gradient", []):
        found = computed.get(f"grad/{name}")
        if found is not None:
            yield Check(f"no gradient: {name}", found.shape, float(np.abs(found).max()), 0.0)


def _error(name: str, expected: np.ndarray, computed: dict, case: Case) -> float:
    found = computed.get(name)
    if found is None or np.size(found) != expected.size:
        return float("nan")
    found = np.asarray(found).reshape(expected.shape)
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    if name in ("logits", "inputs_embeds") and "llm_attention_mask" in case.outputs:
        # At padding both may hold anything.
        difference = difference[case.outputs["llm_attention_mask"].astype(bool)]
    largest = float(difference.max(initial=0.0))
    if name.startswith("grad/"):
        largest /= max(float(np.abs(expected).max()), 1e-30)
    return largest


@dataclasses.dataclass(frozen=True)
class CaseBatch:
    """A case's inputs in this code's form, and as the release's calls of its encoder."""

    batch: TrainBatch
    calls: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # pixels [R, J, Y, X, C], ids, fuse


def _case_batch(case: Case) -> CaseBatch:
    ids_BT = case.inputs["input_ids"].astype(np.int32)
    labels_BT = case.inputs.get("labels")
    kept_BT = case.inputs.get("attention_mask", np.ones_like(ids_BT)).astype(bool)
    # The release's rule (docs/release.md, "Masks"): answers become id 0, then ids <= 0 are masked.
    fuse_BT = ids_BT > 0
    if labels_BT is not None:
        fuse_BT &= labels_BT == IGNORE
    rows = _rows_of_pixels(case)
    B, T = ids_BT.shape
    cfg, prompt = case.bundle.model, case.bundle.prompt
    tokens = cfg.tokens_per_image(rows[0].shape[1])
    slots = []
    for b in range(B):
        row = plan_row(ids_BT[b] < 0, [len(rows[b]) * tokens], T)
        # The release strips a row by its attention mask before it splices.
        real = (row >= T) | kept_BT[b][np.minimum(row, T - 1)]
        slots.append(row[real][: prompt.max_length])
    slots_BS = pad_slots(slots, max(map(len, slots)), prompt.padding_side)
    labels_BS = np.full_like(slots_BS, IGNORE)
    if labels_BT is not None:
        text_BS = (slots_BS >= 0) & (slots_BS < T)
        picked = np.take_along_axis(labels_BT, np.where(text_BS, slots_BS, 0), axis=1)
        labels_BS = np.where(text_BS, picked, IGNORE).astype(np.int32)
    most = max(map(len, rows))
    pixels = np.zeros((B, most, *rows[0].shape[1:]), np.float32)
    frames_BI = np.zeros((B, most), bool)
    for b, row in enumerate(rows):
        pixels[b, : len(row)] = row
        frames_BI[b, : len(row)] = True
    inputs = llava_mini.Inputs(
        ids_BT=ids_BT,
        fuse_BF=fused_places(fuse_BT, T),
        pixels_BIJYXC=pixels,
        frames_BI=frames_BI,
        slots_BS=slots_BS,
        padding_side=prompt.padding_side,
    )
    return CaseBatch(TrainBatch(inputs, labels_BS), _calls(case, rows, ids_BT, fuse_BT))


def _rows_of_pixels(case: Case) -> list[np.ndarray]:
    """Each row's images or frames, [I, J, Y, X, C]."""
    images = case.inputs.get("images")
    listed = [
        case.inputs[f"images.{i}"] for i in range(len(case.inputs)) if f"images.{i}" in case.inputs
    ]
    rows = listed if images is None else list(images)
    # A row is one image [3, Y, X], its parts [J, 3, Y, X], or frames of parts.
    rows = [row[(None,) * (5 - row.ndim)] for row in rows]
    return [row.transpose(0, 1, 3, 4, 2).astype(np.float32) for row in rows]


def _calls(case: Case, rows: list[np.ndarray], ids_BT: np.ndarray, fuse_BT: np.ndarray) -> list:
    if "images" not in case.inputs:  # a list: row by row, then frame by frame
        return [
            (row[i : i + 1], ids_BT[b : b + 1], fuse_BT[b : b + 1])
            for b, row in enumerate(rows)
            for i in range(len(row))
        ]
    return [(np.stack([row[i] for row in rows]), ids_BT, fuse_BT) for i in range(len(rows[0]))]


def _forward(case: Case, params: LlavaMini) -> Iterator[tuple[str, np.ndarray]]:
    plan = _case_batch(case)
    calls = [
        _call_arrays(
            params, case.bundle, *map(jnp.asarray, (*call, fused_places(call[2], call[2].shape[1])))
        )
        for call in plan.calls
    ]
    for name in calls[0]:
        each = [np.asarray(call[name]) for call in calls]
        yield from ((f"{name}.{k}", array) for k, array in enumerate(each))
        if len({array.shape for array in each}) == 1:
            yield name, np.stack(each)
    cfg = case.bundle.model
    batch = plan.batch

    @jax.jit
    def whole(params: LlavaMini, inputs: llava_mini.Inputs) -> tuple[jax.Array, jax.Array]:
        x_BSD = llava_mini.apply(params, inputs, cfg)
        return llava_mini.embed_inputs(params, inputs, cfg), llama.logits(params.llm, x_BSD)

    embeds_BSD, logits_BSV = whole(params, batch.inputs)
    yield "inputs_embeds", np.asarray(embeds_BSD)
    yield "llm_attention_mask", np.asarray(batch.inputs.slots_BS) >= 0
    yield "llm_labels", np.asarray(batch.labels_BS)
    yield "logits", np.asarray(logits_BSV)
    yield "loss", np.asarray(next_token_loss(logits_BSV[:, :-1], batch.labels_BS[:, 1:])[0])


@partial(jax.jit, static_argnames="bundle")
def _call_arrays(
    params: LlavaMini,
    bundle: Bundle,
    pixels_RJYXC: jax.Array,
    ids: jax.Array,
    fuse: jax.Array,
    places: jax.Array,
) -> dict[str, jax.Array | None]:
    """Every intermediate array of one call of the release's encoder.

    `fuse` says which text takes part in pre-fusion, `places` where that stands.
    """
    cfg = bundle.model
    R, J = pixels_RJYXC.shape[:2]
    flat = pixels_RJYXC.reshape(R * J, *pixels_RJYXC.shape[2:])
    dtype = jnp.dtype("float32")
    features = clip.apply(params.vision, flat, cfg.vision, dtype, attention=cfg.attention)
    arrays: dict[str, jax.Array | None] = {"clip_features": features}
    if params.prefusion is None:
        return arrays | {"projected_features": projector.apply(params.projector, features)}
    detail, _ = detail_and_whole(features, R, J)
    compressed = compressors.apply(params.compressor, Seen(detail), cfg.compressor)
    tokens = compressed.tokens_IQE
    parts = projector.apply(params.projector, features).reshape(R, J, *features.shape[1:2], -1)
    arrays |= {
        "compressor_out": tokens,
        "compressor_attn": compressed.attention_IQP,
        "projected_compressed": projector.apply(params.projector, tokens),
        "projected_global": parts[:, -1],
        "projected_hd": parts[:, :-1],
    }
    patches, compressed = llava_mini.encode_and_compress(params, pixels_RJYXC, cfg)
    image = jnp.concatenate([patches, compressed], axis=1)
    text = llava_mini.embed_text(params, ids, cfg)
    out, positions, mask = prefusion.apply_whole(params.prefusion, image, text, fuse, cfg.llm)
    # The same once more, split where the text begins: both ways are compared.
    visual, memory = llava_mini.prefuse_images(params, patches, compressed, cfg)
    fused = llava_mini.prefuse_text(params, memory, prefusion.take_fused(text, places), cfg)
    return arrays | {
        "prefusion_in": jnp.concatenate([image, text], axis=1),
        "prefusion_out": out,
        "prefusion_position_ids": positions,
        "prefusion_mask4d": mask[:, None],
        "compressed_tokens": visual,
        "fused_text": prefusion.put_fused(text, fused, places),
    }


def _gradients(case: Case, params: LlavaMini) -> dict[str, np.ndarray]:
    cfg, batch = case.bundle.model, _case_batch(case).batch

    def objective(params: LlavaMini) -> jax.Array:
        x_BSD = llava_mini.apply(params, batch.inputs, cfg)
        logits_BSV = llama.logits(params.llm, x_BSD[:, :-1])
        return next_token_loss(logits_BSV, batch.labels_BS[:, 1:])[0]

    grads = jax.jit(jax.grad(objective))(params)
    layout = names.LAYOUTS["release"]
    return {f"grad/{name}": array for name, array in published_tensors(grads, cfg, layout)}


def _generated(case: Case, params: LlavaMini) -> dict[str, np.ndarray]:
    about = case.about.get("generation", {})
    ids_BT = case.inputs["input_ids"].astype(np.int32)
    rows = _rows_of_pixels(case)
    examples = [
        Example(ids[keep], ids[keep] > 0, np.full(keep.sum(), IGNORE), row, (len(row),))
        for ids, keep, row in zip(
            ids_BT,
            case.inputs.get("attention_mask", np.ones_like(ids_BT)).astype(bool),
            rows,
            strict=True,
        )
    ]
    sizes = powers_of_two(8, case.bundle.prompt.max_length)
    eos = about.get("eos_variant", {}).get("eos_token_id", -1)

    buckets = Buckets(lengths=sizes, images=powers_of_two(1, 1024))
    model = Loaded(params, case.bundle, None, buckets)

    def run(count: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        found = stepwise.answers(model, examples, Sampling.greedy(len(examples), (stop,)), count)
        return found.tokens_BN, found.logits_BNV

    ids, logits = run(case.outputs["generated_ids"].shape[1], -1)
    found = {"generated_ids": ids, "generated_step_logits": logits}
    if "generated_ids_with_eos" in case.outputs:
        found["generated_ids_with_eos"] = run(len(ids[0]), eos)[0]
    return found
