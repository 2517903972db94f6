"""Checks the compared compressors against outputs of their authors' code, array by array.

    case/  case.json  inputs.npz  weights.safetensors  outputs.npz
              |           |               |                |
              '---- a method's runner ----'----compare-----'--> one Check per array

A case has a method's inputs (images, tower features or hidden states), weights in its authors'
names, and gradients of sum(cotangent * tokens). Selected places, masks and counts are compared
exactly; a gradient's tolerance grows with its largest number, from 1 on.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax import config as configs
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import clip, compressors, llava_mini
from llava_mini_jax.models.compressors import (
    CompressorConfig,
    hd_grid,
    llama_vid,
    m3,
    mqt,
    positions,
    prumerge,
    prumerge_plus,
    token_packer,
    visionzip,
)
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.reproduce import verify_inside
from llava_mini_jax.reproduce.check import Check, read_case
from llava_mini_jax.reproduce.compressor_cases import (
    Case,
    gradients,
    load,
    look,
    model,
    only,
    pictures,
    tower,
)
from llava_mini_jax.tensorfiles.files import open_tensors


def is_case(folder: Path) -> bool:
    """Whether a folder holds a case of this form: its case.json names a method."""
    try:
        return "method" in json.loads((folder / "case.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # the reader of the other form says what is missing


def verify(folder: Path) -> Iterator[Check]:
    """One Check for every array of outputs.npz; an array that nothing here computes fails."""
    case = Case(folder, *read_case(folder))
    method, tolerance = case.about["method"], float(case.about["tolerance"])
    if method not in RUNNERS:
        raise InputError(
            f'{folder} is a case of the method "{method}", which is not compared here; give one of '
            f"{', '.join(RUNNERS)}"
        )
    # Recordings are float32; accelerators would multiply in TF32 or bfloat16.
    with jax.default_matmul_precision("highest"):
        found = RUNNERS[method](case)
    for name, expected in case.outputs.items():
        allowed = tolerance if expected.dtype.kind == "f" else 0.0
        if name.startswith("grad/"):
            allowed *= max(1.0, float(np.abs(expected).max(initial=0)))
        yield Check(name, expected.shape, _error(found.get(name), expected), allowed)
    for name in sorted(found):
        # What has no recorded gradient is frozen.
        if name.startswith("grad/") and name not in case.outputs:
            error = float(np.abs(found[name]).max())
            yield Check(f"no gradient: {name[5:]}", found[name].shape, error, 0.0)


def _error(found: Any, expected: np.ndarray) -> float:
    if found is None or np.shape(found) != expected.shape:
        return float("nan")
    difference = np.abs(np.asarray(found, np.float64) - expected.astype(np.float64))
    return float(difference.max(initial=0.0))


# --------------------------------------------------------------------------- a runner a method


def _m3(case: Case) -> dict[str, Any]:
    seen = Seen(jnp.asarray(case.inputs["projected"]))
    return {
        f"tokens.{count}": compressors.apply(None, seen, m3.M3Config(count=count)).tokens_IQE
        for count in case.config["scales"]
    }


def _mqt(case: Case) -> dict[str, Any]:
    said, prefix = case.config, "query_abstractor."
    own = mqt.MqtConfig(
        width=said["width"],
        out_width=said["llm_width"],
        heads=said["heads"],
        queries=said["num_queries"],
        count=said["kept"],
        norm_eps=said["layer_norm_eps"],
    )
    vision = dataclasses.replace(configs.CLIP_L_336, width=said["width"])
    cfg = model(own, vision, said["llm_width"])
    params = load(case, only(LlavaMini, compressor=compressors.spec(own)), cfg, prefix)
    seen = Seen(jnp.asarray(case.inputs["patches"]))

    def tokens(params: LlavaMini) -> compressors.Compressed:
        return compressors.apply(params.compressor, seen, own)

    made = jax.jit(tokens)(params)
    side, grid = said["patch_grid"][0], said["query_grid"]
    return {
        "tokens": made.tokens_IQE,
        "attention": made.attention_IQP,
        "pos_resized": positions.resize_positions(params.compressor.position, grid, side),
    } | gradients(
        case,
        params,
        cfg,
        lambda params: (tokens(params).tokens_IQE * case.inputs["cotangent"]).sum(),
        prefix,
    )


def _token_packer(case: Case) -> dict[str, Any]:
    if "patch_num_h_w" in case.inputs:
        return _hd_grids(case)
    said = case.config
    own = token_packer.TokenPackerConfig(
        width=said["width"],
        out_width=said["llm_width"],
        heads=said["heads"],
        levels=tuple(said.get("multi_levels", (12, 16, 22, 23))),
        scale=said["scale_factor"],
        norm_eps=said["layer_norm_eps"],
    )
    with_tower = "clip" in said
    vision = dataclasses.replace(configs.CLIP_L_336, width=said["width"])
    cfg = model(own, tower(said["clip"]) if with_tower else vision, said["llm_width"])
    spec = llava_mini.spec(cfg)
    spec = only(LlavaMini, compressor=spec.compressor, vision=spec.vision if with_tower else None)
    params = load(case, spec, cfg)
    if with_tower:
        seen = look(params, case, cfg)
    else:
        levels = np.split(case.inputs["multi"], len(own.levels), axis=-1)
        single = jnp.asarray(case.inputs["single"])
        seen = Seen(single, levels=tuple(map(jnp.asarray, levels)))

    def tokens(params: LlavaMini) -> compressors.Compressed:
        return compressors.apply(params.compressor, seen, own)

    made = jax.jit(tokens)(params)
    return {
        "tokens": made.tokens_IQE,
        "attention": made.attention_IQP,
        "query_pooled": token_packer.pooled(seen.patches_IPE, said["grid"], own.scale),
        "single": seen.patches_IPE,
        "multi": jnp.concatenate(seen.levels, axis=-1),
    } | gradients(
        case,
        params,
        cfg,
        lambda params: (tokens(params).tokens_IQE * case.inputs["cotangent"]).sum(),
    )


def _hd_grids(case: Case) -> dict[str, Any]:
    found = [
        hd_grid.hd_grid(int(h), int(w), limit=int(limit), block=case.config["block"])
        for limit, h, w in case.inputs["patch_num_h_w"]
    ]
    return {
        "grid": np.array([each.blocks for each in found]),
        "resized": np.array([each.size for each in found]),
    }


def _prumerge(case: Case) -> dict[str, Any]:
    said = case.config
    plus = said["function"].endswith("_plus")
    method: Any = prumerge_plus if plus else prumerge
    own = method.Config(
        layer=said["clip_layer_for_qk"],
        neighbours=said["cluster_k"],
        ratio=0.0 if said["if_adaptive"] else said["reduction_ratio"],
        variant="release",
    )
    seen, hidden_ISE = _seen_by_last_layer(case, own)
    attention_IP, _ = prumerge.scores(seen)
    chosen = method.choose(attention_IP, own)
    made = jax.jit(lambda seen: method.apply(None, seen, own))(seen)
    # A case's images keep the same number: what is behind it is not there.
    kept = int(chosen.kept_I[0])
    listed_IL = np.asarray(chosen.listed_IL)
    return {
        "tokens": made.tokens_IQE[:, : kept + 1],
        "kept_index": listed_IL[:, :kept],
        "complement_index": listed_IL[:, kept:],
        "cls_attn": attention_IP,
        "hidden_first9": hidden_ISE[:, :9],
    }


def _seen_by_last_layer(case: Case, own: CompressorConfig) -> tuple[Seen, jax.Array]:
    """(what PruMerge reads, hidden states with the class token): of images or of these states."""
    said = case.config
    if "clip" in said:
        cfg = model(own, tower(said["clip"]), 32)
        params = load(case, only(LlavaMini, vision=clip.spec(cfg.vision)), cfg)
        reads = dataclasses.replace(cfg.declared.reads, class_token=True)
        seen = clip.look(params.vision, pictures(case), cfg.vision, cfg.dtype, reads)
        return seen, jnp.concatenate([seen.class_IE[:, None], seen.patches_IPE], axis=1)
    hidden_ISE = jnp.asarray(case.inputs["hidden"])
    vision = dataclasses.replace(
        configs.CLIP_L_336, width=said["width"], heads=1, norm_eps=said["layer_norm_eps"]
    )
    cfg = model(own, vision, 32)
    last = clip.spec(vision).unread_layers
    assert last is not None
    last = only(clip.ClipLayer, attn_norm=last.attn_norm, q_proj=last.q_proj, k_proj=last.k_proj)
    spec = only(LlavaMini, vision=only(clip.Clip, unread_layers=last))
    params = load(case, spec, cfg)
    layer = clip.layer_of(params.vision, said["clip_layer_for_qk"], vision)
    query_INH, keys_ISNH = clip.heads_of(layer, hidden_ISE, vision)
    return Seen(hidden_ISE[:, 1:], query_INH=query_INH, keys_ISNH=keys_ISNH), hidden_ISE


def _visionzip(case: Case) -> dict[str, Any]:
    said = case.config
    vision = tower(said["clip"])
    own = visionzip.VisionZipConfig(
        layer=vision.used_layers - 1, dominant=said["dominant"], contextual=said["contextual"]
    )
    cfg = model(own, vision, 32)
    params = load(case, only(LlavaMini, vision=clip.spec(vision)), cfg)
    seen = look(params, case, cfg)
    chosen = visionzip.choose(seen, own)
    # As the authors' function returns them: the class token, then patches by falling attention.
    highest = np.argsort(np.asarray(chosen.rank_IP), axis=1)[:, : own.dominant - 1] + 1
    return {
        "tokens": jax.jit(lambda seen: visionzip.apply(None, seen, own))(seen).tokens_IQE,
        "dominant_index": np.pad(highest, ((0, 0), (1, 0))),
        "cls_attention_sum": chosen.score_IP,
        "metric": chosen.metric_ISH,
    }


def _llama_vid(case: Case) -> dict[str, Any]:
    said = case.config
    kind, _, grid = said["compress_type"].partition(":")
    if kind not in ("mean", "grid"):
        raise InputError(f'{case.folder}: compress_type is "{kind}", expected mean or grid:N')
    own = _llama_vid_config(case, content=int(grid or 1))
    vision = dataclasses.replace(configs.CLIP_L_336, width=own.width)
    cfg = model(own, vision, own.out_width)
    params = load(case, only(LlavaMini, compressor=compressors.spec(own)), cfg)
    frames = said["image_counts"] or [1] * len(case.inputs["features"])
    first, found, pieces = 0, {}, []
    for number, count in enumerate(frames):
        features = case.inputs["features"][first : first + count]
        ids, mask = (case.inputs[f"prompt_{name}.{number}"] for name in ("ids", "mask"))
        # Each question with all frames; frames of one after the other.
        features = np.tile(features, (len(ids), 1, 1))
        asked = np.repeat(np.where(mask > 0, ids, -1), count, axis=0).astype(np.int32)
        seen = Seen(
            jnp.asarray(features[:, 1:]),
            class_IE=jnp.asarray(features[:, 0]),
            question_IT=jnp.asarray(asked),
        )
        found[f"text_query.{number}"] = llama_vid.text_queries(params.compressor, seen, own)
        made = compressors.apply(params.compressor, seen, own).tokens_IQE
        found[f"tokens.{number}"] = made.reshape(len(ids), -1, own.out_width)
        pieces.append((seen, case.inputs[f"cotangent.{number}"]))
        first += count

    def objective(params: LlavaMini) -> jax.Array:
        sums = [
            (compressors.apply(params.compressor, seen, own).tokens_IQE.ravel() * c.ravel()).sum()
            for seen, c in pieces
        ]
        return sum(sums[1:], sums[0])

    return found | gradients(case, params, cfg, objective)


def _llama_vid_config(case: Case, content: int) -> llama_vid.LlamaVidConfig:
    said = case.config
    shapes = {n: t.shape for n, t in open_tensors(case.folder / "weights.safetensors").items()}
    embeddings = "vlm_att_encoder.bert.embeddings."
    return llama_vid.LlamaVidConfig(
        width=said["tower_width"],
        out_width=said["llm_width"],
        content=content,
        class_token=said["features_have_cls"],
        vision_norm_eps=said["vision_ln_eps"],
        qformer_width=said["qformer_width"],
        qformer_heads=said["qformer_heads"],
        qformer_layers=said["qformer_layers"],
        qformer_mlp_width=said["qformer_intermediate"],
        qformer_cross_every=said["cross_attention_freq"],
        qformer_cross_width=said["qformer_input_width"],
        qformer_queries=said["num_query"],
        qformer_vocabulary=shapes[f"{embeddings}word_embeddings.weight"][0],
        qformer_positions=shapes[f"{embeddings}position_embeddings.weight"][0],
        qformer_norm_eps=said["layer_norm_eps"],
    )


RUNNERS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "m3": _m3,
    "mqt": _mqt,
    "tokenpacker": _token_packer,
    "prumerge": _prumerge,
    "prumerge_plus": _prumerge,
    "visionzip": _visionzip,
    "llamavid": _llama_vid,
    **verify_inside.RUNNERS,
}
