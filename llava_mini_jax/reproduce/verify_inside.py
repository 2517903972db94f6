"""Golden cases of the methods inside the language model: VoCo-LLaMA's mask, FastV's selection.

a case's weights, ids and features, or embeddings --> sequence, Placed --run--> logits, masks, ...

Positions that hold nothing are not compared: there a case's own numbers stand in for ours.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llava_mini_jax import backbones
from llava_mini_jax import config as configs
from llava_mini_jax.data.text.conversation import IGNORE
from llava_mini_jax.models import compressors, llama, llava_mini, projector
from llava_mini_jax.models.compressors import CompressorConfig, Placed, fastv, voco
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.models.splice import pad_slots, plan_row, splice
from llava_mini_jax.ops.masks import Mask
from llava_mini_jax.ops.norm import rms_norm
from llava_mini_jax.ops.rope import RopeConfig
from llava_mini_jax.reproduce.compressor_cases import Case, only
from llava_mini_jax.tensorfiles.files import open_tensors
from llava_mini_jax.weights import names
from llava_mini_jax.weights.export_hf import published_tensors
from llava_mini_jax.weights.import_hf import Published, load_tree

LAYOUT = names.LAYOUTS["release"]


def voco_case(case: Case) -> dict[str, Any]:
    cfg = _voco_model(case)
    params = _load(case, cfg, projector=True)
    if "generated_ids" in case.outputs:
        return _greedy(params, case, cfg)
    row = _Rows.of(case, cfg)
    real_BS = row.placed.valid_BS
    x_BSD, mask_BSS, hidden_BSD = _run_voco(params, row, case, cfg)
    labels_BS = _labels(case, row)

    def loss(params: LlavaMini) -> jax.Array:
        logits_BSV = llama.logits(params.llm, _run_voco(params, row, case, cfg)[2])[:, :-1]
        told = labels_BS[:, 1:]
        each = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, jnp.maximum(told, 0))
        return jnp.where(told >= 0, each, 0).sum() / (told >= 0).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)

    def real(ours: Any, name: str) -> np.ndarray:
        theirs, ours = case.outputs[name], np.asarray(ours)
        shape = (*real_BS.shape, *[1] * (ours.ndim - 2))
        return np.where(np.asarray(real_BS).reshape(shape), ours, theirs)

    return {
        "mask": real(mask_BSS, "mask"),
        "inputs_embeds": real(x_BSD, "inputs_embeds"),
        "logits": real(llama.logits(params.llm, hidden_BSD), "logits"),
        "loss": np.asarray(value)[None],
        "real": np.asarray(real_BS),
    } | {f"grad/{name}": a for name, a in published_tensors(gradients, cfg, LAYOUT)}


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Text, padded; where its tokens and the image's stand in the sequence; and what is there."""

    ids_BT: np.ndarray
    slots_BS: np.ndarray
    placed: Placed

    @classmethod
    def of(cls, case: Case, cfg: LlavaMiniConfig, more: tuple[int, ...] = ()) -> "_Rows":
        own: Any = cfg.compressor
        given = case.inputs["input_ids"]
        there = case.inputs.get("attention_mask", np.ones_like(given, bool))
        texts = []
        for ids, real in zip(given, there, strict=True):
            row = [int(i) for i in ids[real]]
            at = row.index(-200)
            # What stands between the image and the text is the method's own here.
            assert tuple(row[at + 1 : at + 1 + own.behind]) == (
                *own.between,
                *[own.token_id] * own.count,
            )
            texts.append([*row[: at + 1], *row[at + 1 + own.behind :], *more])
        T, tokens = max(map(len, texts)), cfg.tokens_per_image(1)
        slots = [plan_row([i < 0 for i in row], [tokens], T) for row in texts]
        slots_BS = pad_slots(slots, max(map(len, slots)), "left")
        ids_BT = np.array([[*row, *[0] * (T - len(row))] for row in texts], np.int32)
        visual_BS = jnp.asarray(slots_BS) - T
        placed = Placed(
            valid_BS=jnp.asarray(slots_BS >= 0),
            visual_BS=visual_BS >= 0,
            place_BS=visual_BS % tokens,
            patches=cfg.patches_per_image(1),
        )
        return cls(ids_BT, slots_BS, placed)


def _run_voco(
    params: LlavaMini, row: _Rows, case: Case, cfg: LlavaMiniConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(embeddings [B, S, D], mask [B, S, S], hidden states behind the norm [B, S, D])."""
    own: Any = cfg.compressor
    patches_BPD = projector.apply(params.projector, jnp.asarray(case.inputs["features"]))
    tokens_BQD = compressors.apply(None, Seen(patches_BPD), own).tokens_IQE
    text_BTD = llama.embed(params.llm, jnp.asarray(row.ids_BT), cfg.dtype)
    x_BSD = splice(text_BTD, tokens_BQD, jnp.asarray(row.slots_BS))
    until_BS = voco.seen_until(row.placed, own)
    S = x_BSD.shape[1]
    mask = Mask(first=0, valid_BS=row.placed.valid_BS, until_BS=until_BS).dense(S, S)
    assert mask is not None
    how = compressors.How(cfg.llm, "none", "auto")
    hidden_BSD = compressors.run(None, params.llm, x_BSD, row.placed, own, how)
    whole_BSD = voco.with_tokens(None, params.llm, x_BSD, row.placed, own)
    return whole_BSD, mask, rms_norm(hidden_BSD, params.llm.final_norm, cfg.llm.norm_eps)


def _labels(case: Case, row: _Rows) -> jax.Array:
    """Of each position [B, S], IGNORE where there is none."""
    given, there = case.inputs["labels"], case.inputs["attention_mask"]
    out = np.full(row.slots_BS.shape, IGNORE)
    for place, (labels, real) in enumerate(zip(given, there, strict=True)):
        supervised = [int(label) for label in labels[real] if label != IGNORE]
        out[place, -len(supervised) :] = (
            supervised  # the answer is last, and padding is on the left
        )
    return jnp.asarray(out)


def _greedy(params: LlavaMini, case: Case, cfg: LlavaMiniConfig) -> dict[str, Any]:
    """Every token by a pass over all before it; what is in front of VoCo tokens stays hidden."""
    said: list[int] = []
    logits, mask = [], None
    for _ in range(case.outputs["generated_ids"].shape[1]):
        row = _Rows.of(case, cfg, tuple(said))
        _, mask, hidden_BSD = _run_voco(params, row, case, cfg)
        logits.append(np.asarray(llama.logits(params.llm, hidden_BSD[:, -1:])))
        said.append(int(logits[-1].argmax()))
    return {
        "generated_ids": np.array([said]),
        "step_logits": np.concatenate(logits, axis=1),
        "mask": mask,
    }


def fastv_case(case: Case) -> dict[str, Any]:
    said, before = case.config, case.config["before_image"]
    own = fastv.FastVConfig(layer=said["K"], keep=said["kept"], variant=said["variant"])
    cfg = _model(case, own, width=8, grid=round(said["image_tokens"] ** 0.5))
    params = _load(case, cfg, projector=False)
    x_BSD = jnp.asarray(case.inputs["inputs_embeds"])
    S, N = x_BSD.shape[1], said["image_tokens"]
    place_BS = jnp.arange(S)[None] - before
    placed = Placed(
        valid_BS=jnp.ones((1, S), bool),
        visual_BS=(place_BS >= 0) & (place_BS < N),
        place_BS=place_BS,
        patches=N,
    )
    how = compressors.How(cfg.llm, "none", "auto")
    scores_BS = fastv.scores(params.llm, x_BSD, placed, own, how)
    kept_BS = np.asarray(fastv.kept(scores_BS, placed, own))
    hidden_BSD = compressors.run(None, params.llm, x_BSD, placed, own, how)
    hidden_BSD = rms_norm(hidden_BSD, params.llm.final_norm, cfg.llm.norm_eps)
    if own.variant == "drop":
        hidden_BSD = hidden_BSD[:, kept_BS[0]]
    return {
        "image_attention": np.asarray(scores_BS)[0, before : before + N],
        "kept_index": np.flatnonzero(kept_BS[0, before : before + N]),
        "last_hidden": hidden_BSD,
        "logits": llama.logits(params.llm, hidden_BSD),
    }


def _voco_model(case: Case) -> LlavaMiniConfig:
    said = case.config
    own = voco.VoCoConfig(
        count=said["num_voco"],
        token_id=said["voco_id"],
        width=said["llm"]["hidden_size"],
        between=(13,),
        variant="release",
    )
    return _model(case, own, width=said["tower_width"], grid=round(said["patches"] ** 0.5))


def _model(case: Case, own: CompressorConfig, width: int, grid: int) -> LlavaMiniConfig:
    vision = backbones.CLIP_L_336
    vision = dataclasses.replace(vision, width=width, image_size=grid * vision.patch_size)
    return configs.build(
        _language_model(case.config["llm"]),
        vision,
        "paper",
        compressor=own,
        prefusion_layers=0,
        compute_dtype="float32",
    )


def _language_model(said: dict[str, Any]) -> LlamaConfig:
    return dataclasses.replace(
        backbones.VICUNA_7B,
        vocab_size=said["vocab_size"],
        width=said["hidden_size"],
        mlp_width=said["intermediate_size"],
        layers=said["layers"],
        heads=said["heads"],
        kv_heads=said["kv_heads"],
        head_width=said["hidden_size"] // said["heads"],
        norm_eps=said["rms_norm_eps"],
        rope=RopeConfig(theta=said["rope_theta"], scaling=None),
    )


def _load(case: Case, cfg: LlavaMiniConfig, *, projector: bool) -> LlavaMini:
    file = case.folder / "weights.safetensors"
    spec = llava_mini.spec(cfg)
    spec = only(LlavaMini, llm=spec.llm, projector=spec.projector if projector else None)
    folder = Published(str(file), open_tensors(file), LAYOUT)
    return load_tree(spec, cfg, [folder], dtype="float32", narrow=None)


RUNNERS: dict[str, Callable[[Case], dict[str, Any]]] = {"voco": voco_case, "fastv": fastv_case}
