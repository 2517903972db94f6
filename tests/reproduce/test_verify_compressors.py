"""Recorded outputs of other methods' authors against this code; and mistakes are seen."""

import importlib
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.reproduce.verify import verify
from llava_mini_jax.reproduce.verify_compressors import RUNNERS
from tests import tiny

fast_compilation = tiny.fast_compilation

HERE = {
    path.name: path
    for path in sorted((Path(__file__).parents[1] / "golden" / "compressors").iterdir())
}
# Recorded noise is 1e-5 for what goes through 24 layers and in gradients: room for no mistake.
LARGEST_ERROR = 5e-5


def failed(folder: Path) -> list[str]:
    return [check.array for check in verify(folder) if not check.passed]


# Which take tens of seconds to compile: of their methods others are quick.
SLOW = ("llamavid", "voco_greedy", "fastv_k2_half_drop", "prumerge_plus_tower24")


def marked(case: str) -> object:
    return pytest.param(case, marks=pytest.mark.slow) if case.startswith(SLOW) else case


@pytest.mark.parametrize("case", [marked(case) for case in HERE])
def test_every_array_of_the_committed_cases(case: str) -> None:
    checks = list(verify(HERE[case]))
    with np.load(HERE[case] / "outputs.npz") as outputs:
        assert set(outputs.files) <= {check.array for check in checks}
    assert [check.line() for check in checks if not check.passed] == []
    assert max(check.error for check in checks) < LARGEST_ERROR


def shared_cases(folder: Path) -> list[str]:
    methods = {
        path.name: json.loads((path / "case.json").read_text())["method"]
        for path in folder.iterdir()
        if path.is_dir()
    }
    return sorted(name for name, method in methods.items() if method in RUNNERS)


@pytest.mark.slow
def test_every_array_of_all_cases(shared_golden: Path) -> None:
    folder = shared_golden / "compressors"
    cases = shared_cases(folder)
    assert set(HERE) <= set(cases)
    assert {case: failed(folder / case) for case in cases} == {case: [] for case in cases}


# (module, what it says, a mistake, the case that shows it)
MISTAKES = {
    "levels are one layer off": (
        "clip",
        "for level in reads.levels)",
        "for level in reads.levels) if not reads.levels else (x_ISE[:, 1:],) * len(reads.levels)",
        "tokenpacker_tower24_scale2",
    ),
    "keys without their norm": (
        "clip",
        "layer_norm(x_ISE.astype(jnp.float32), layer.attn_norm, cfg.norm_eps)",
        "x_ISE.astype(jnp.float32)",
        "visionzip_9_4_batch",
    ),
    "PruMerge scales as a head": (
        "compressors.prumerge",
        "scale=(N * H) ** -0.5",
        "scale=H**-0.5",
        "prumerge_plus_tower24",
    ),
    "PruMerge divides by the weights": (
        "compressors.prumerge",
        "weights_IKL = itself_KL + near_IKL * given_IL[:, None]",
        "weights_IKL = itself_KL + near_IKL * given_IL[:, None] / near_IKL.sum(2, keepdims=True)",
        "prumerge_batch_pooled",
    ),
    "PruMerge's patches are their own neighbours": (
        "compressors.prumerge",
        "jnp.where(itself_KL, -jnp.inf, likeness_IKL)",
        "likeness_IKL",
        "prumerge_plus_train_eighth",
    ),
    "PruMerge's extra token has all patches": (
        "compressors.prumerge",
        "jnp.where(slot_L >= kept_I1, given_IL, 0)",
        "given_IL",
        "prumerge_batch_pooled",
    ),
    "PruMerge's ratio is an image's own": (
        "compressors.prumerge",
        'cfg.variant == "clean"',
        "True",
        "prumerge_batch_pooled",
    ),
    "PruMerge+ begins with the first patch": (
        "compressors.prumerge_plus",
        "range(step // 2, _stop",
        "range(0, _stop",
        "prumerge_plus_train_eighth",
    ),
    "PruMerge+ keeps each patch once": (
        "compressors.prumerge_plus",
        'if cfg.ratio and cfg.variant == "release":',
        "if False:",
        "prumerge_plus_train_eighth",
    ),
    "MQT's keys have content": (
        "compressors.mqt",
        "keys_PE = keys_PE.astype(params.position.dtype).astype(jnp.float32)",
        "keys_PE = keys_PE + params.query.mean(axis=0)",
        "mqt_keep3_of16",
    ),
    "MQT's positions are stored rows first": (
        "compressors.mqt",
        "resize_positions(position_QE,",
        "resize_positions(position_QE[::-1],",
        "mqt_keep3_of16",
    ),
    "MQT's table learns": (
        "compressors.mqt",
        "jax.lax.stop_gradient(params.position.astype(jnp.float32))",
        "params.position.astype(jnp.float32)",
        "mqt_keep3_of16",
    ),
    "TokenPacker adds the query to its output": (
        "compressors.token_packer",
        "_mix(mixed_IQE, params.into_llm)",
        "_mix(mixed_IQE + query_IQE, params.into_llm)",
        "tokenpacker_scale2",
    ),
    "TokenPacker's windows are rows": (
        "compressors.token_packer",
        "windows(x, side, cfg.scale) for x in",
        "x.reshape(len(x), -1, cfg.scale**2, *x.shape[2:]) for x in",
        "tokenpacker_scale2",
    ),
    "VisionZip drops the class token": (
        "compressors.visionzip",
        "[seen.class_IE[:, None], seen.patches_IPE]",
        "[seen.class_IE[:, None] * 0, seen.patches_IPE]",
        "visionzip_9_4_batch",
    ),
    "VisionZip sums what comes to a target": (
        "compressors.visionzip",
        "jnp.maximum(comes_IMC.sum(axis=1), 1)[..., None]",
        "1",
        "visionzip_9_4_batch",
    ),
    "VisionZip's targets come to themselves": (
        "compressors.visionzip",
        "comes_IMC = comes_IMC * ~jnp.isin(jnp.arange(M), at_C)[:, None]",
        "pass",
        "visionzip_9_4_batch",
    ),
    "LLaMA-VID pools the class token, too": (
        "compressors.llama_vid",
        "projector.apply(params.projector, content_IQE)",
        "projector.apply(params.projector, content_IQE * 16 / 17 + seen.class_IE[:, None] / 17)",
        "llamavid_mean_multiturn",
    ),
    "LLaMA-VID reads padding": (
        "compressors.qformer",
        "jnp.where(text_IT < 0, _MASKED, 0.0)",
        "jnp.zeros(text_IT.shape)",
        "llamavid_mean_multiturn",
    ),
    "LLaMA-VID's queries share the text's MLP": (
        "compressors.qformer",
        "_feed(layer.query_mlp, query_IQW, cfg)",
        "_feed(layer.text_mlp, query_IQW, cfg)",
        "llamavid_mean_multiturn",
    ),
    "LLaMA-VID's text reads the image": (
        "compressors.qformer",
        "text_ITW = _feed(",
        "text_ITW = 0.5 * _feed(",
        "llamavid_grid2_video",
    ),
    "VoCo's text sees the prompt's beginning": (
        "compressors.voco",
        'if cfg.variant == "clean":',
        "if True:",
        "voco_2tokens_padded",
    ),
    "VoCo's text sees from the last VoCo token on": (
        "compressors.voco",
        "here_S < first_B[:, None], end_B[:, None], S)",
        "here_S < end_B[:, None], end_B[:, None], S)",
        "voco_2tokens_padded",
    ),
    "VoCo forgets the newline": (
        "compressors.voco",
        "(*cfg.between, *[own] * cfg.count)",
        "(*[own] * len(cfg.between), *[own] * cfg.count)",
        "voco_greedy",
    ),
    "FastV asks a layer later": (
        "compressors.fastv",
        "some_layers(layers, cfg.layer - 1, cfg.layer)",
        "some_layers(layers, cfg.layer, cfg.layer + 1)",
        "fastv_k2_half_mask",
    ),
    "FastV asks the first token": (
        "compressors.fastv",
        "jnp.where(placed.valid_BS, positions_BS, 0).max(axis=1)",
        "jnp.where(placed.valid_BS, positions_BS, 0).min(axis=1) + 3",
        "fastv_k2_half_mask",
    ),
    "FastV drops a layer late": (
        "compressors.fastv",
        "rest = some_layers(layers, cfg.layer, None)",
        "rest = some_layers(layers, cfg.layer + 1, None)",
        "fastv_k2_half_mask",
    ),
    "FastV counts positions anew": (
        "compressors.fastv",
        "_run(rest, short_BRD, valid_BR, how, positions_BS=places_BR)",
        "_run(rest, short_BRD, valid_BR, how)",
        "fastv_k2_half_drop",
    ),
    "TokenPacker-HD enlarges more": (
        "compressors.hd_grid",
        "height * 1.4, width * 1.4",
        "height, width",
        "tokenpacker_hd_grid",
    ),
}


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(name, marks=pytest.mark.slow if case.startswith(SLOW) else ())
        for name, (*_, case) in MISTAKES.items()
    ],
)
def test_a_mistake_is_seen(mistake: str) -> None:
    name, right, wrong, case = MISTAKES[mistake]
    module = importlib.import_module(f"llava_mini_jax.models.{name}")
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"{name} says it {source.count(right)} times: {right}"
    before = dict(vars(module))
    try:
        exec(compile(source.replace(right, wrong), module.__file__ or name, "exec"), vars(module))
        assert failed(HERE[case])
    finally:
        vars(module).clear()
        vars(module).update(before)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HERE["m3_8x8_batch"], tmp_path / "case"))


def about(case: Path, **changes) -> None:
    said = json.loads((case / "case.json").read_text())
    (case / "case.json").write_text(json.dumps(said | changes))


def test_a_method_that_is_not_compared(copy: Path) -> None:
    about(copy, method="nothing")
    with pytest.raises(
        InputError, match=r'method "nothing", which is not compared here; give one of'
    ):
        list(verify(copy))


def test_an_array_that_nothing_computes_and_another_shape_fail(copy: Path) -> None:
    with np.load(copy / "outputs.npz") as file:
        arrays = dict(file)
    arrays["no_such_array"], arrays["tokens.4"] = np.zeros(3), arrays["tokens.4"][:, :1]
    np.savez(copy / "outputs.npz", **arrays)
    assert sorted(failed(copy)) == ["no_such_array", "tokens.4"]


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "inputs.npz").unlink()
    with pytest.raises(InputError, match=r"is not a golden case: inputs\.npz is missing"):
        list(verify(copy))
