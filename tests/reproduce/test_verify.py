"""Recorded outputs of the release against this code, and that the comparison itself can fail."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_mini_jax.errors import InputError
from llava_mini_jax.models import clip, compressors, llama, prefusion, projector
from llava_mini_jax.ops import attention
from llava_mini_jax.reproduce.verify import verify
from tests import tiny

fast_compilation = tiny.fast_compilation

COMMITTED = sorted(
    path for path in (Path(__file__).parents[1] / "golden" / "model").iterdir() if path.is_dir()
)
HERE = {path.name: path for path in COMMITTED}
ALL = [
    "batch_padded",
    "generate_greedy",
    "hd_c2",
    "image_c1",
    "image_c2",
    "llava15_baseline",
    "parts2_quirk",
    "stage1_loss_grads",
    "stage2_loss_grads",
    "video_f5",
]


# Parts to compile, with their static arguments: operation after operation takes twice the time.
PARTS = {
    (clip, "look"): ("cfg", "dtype", "reads", "attention"),
    (compressors, "apply"): ("cfg",),
    (projector, "apply"): (),
    (prefusion, "prefuse_image"): ("outputs", "cfg", "remat", "attention"),
    (prefusion, "prefuse_text"): ("cfg", "remat", "attention"),
    (prefusion, "apply_whole"): ("cfg",),
    (llama, "apply"): ("cfg", "remat", "attention"),
}


@pytest.fixture(autouse=True, scope="module")
def compiled():
    patch = pytest.MonkeyPatch()
    for (module, name), static in PARTS.items():
        patch.setattr(module, name, jax.jit(getattr(module, name), static_argnames=static))
    yield
    patch.undo()


def failed(folder: Path) -> list[str]:
    return [check.line() for check in verify(folder) if not check.passed]


QUICK = ["generate_greedy", "hd_c2", "stage2_loss_grads"]


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in HERE if c not in QUICK)]
)
def test_every_array_of_the_committed_cases(case: str) -> None:
    checks = list(verify(HERE[case]))
    with np.load(HERE[case] / "outputs.npz") as outputs:
        assert set(outputs.files) <= {check.array for check in checks}
    assert [check.line() for check in checks if not check.passed] == []
    # The recorded float32 noise is 1.4e-5: the tolerance of the cases leaves room for a bug.
    assert max(check.error for check in checks) < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", HERE)
def test_every_array_through_the_kernel_of_tpus(case: str, monkeypatch) -> None:
    """Forward, backward, prefill and decoding; interpreted, whatever the number of queries."""
    monkeypatch.setitem(attention.FEWEST_QUERIES, "splash", 1)
    assert [c.line() for c in verify(HERE[case], attention="splash") if not c.passed] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_every_array_of_all_cases(shared_golden: Path, case: str) -> None:
    assert failed(shared_golden / "model" / case) == []


@pytest.mark.slow
def test_no_case_is_forgotten(shared_golden: Path) -> None:
    assert sorted(path.name for path in (shared_golden / "model").iterdir()) == ALL


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of a case, to be damaged."""
    return Path(shutil.copytree(HERE["hd_c2"], tmp_path / "case"))


def change_outputs(case: Path, change) -> None:
    with np.load(case / "outputs.npz") as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez(case / "outputs.npz", **arrays)


def test_a_changed_weight_fails_everything_behind_it(copy: Path) -> None:
    weights = load_file(copy / "model" / "model.safetensors")
    name = "model.prefusion_layers.0.self_attn.v_proj.weight"
    weights[name] = weights[name] * 1.01
    save_file(weights, copy / "model" / "model.safetensors")
    verdicts = {check.array: check.passed for check in verify(copy)}
    assert not any(verdicts[name] for name in ("prefusion_out", "fused_text", "logits"))
    assert all(verdicts[name] for name in ("clip_features", "compressor_out", "prefusion_in"))


def test_changed_expectations_fail(copy: Path) -> None:
    def change(arrays: dict) -> None:
        arrays["logits"][0, 3, 7] += 1e-3
        arrays["prefusion_position_ids"][0, 5] += 1
        arrays["prefusion_mask4d"][0, 0, 4, 4] ^= True
        arrays["compressor_attn"] = arrays["compressor_attn"][:, :-1]
        arrays["fused_text"][0, 2, 0] = np.nan
        arrays["no_such_array"] = np.zeros(3, np.float32)

    change_outputs(copy, change)
    found = [check.array for check in verify(copy) if not check.passed]
    assert sorted(found) == [
        "compressor_attn",
        "fused_text",
        "logits",
        "no_such_array",
        "prefusion_mask4d",
        "prefusion_position_ids",
    ]


def test_a_gradient_where_there_should_be_none_fails(tmp_path: Path) -> None:
    case = Path(shutil.copytree(HERE["stage2_loss_grads"], tmp_path / "case"))
    about = json.loads((case / "case.json").read_text())
    assert about["parameters_without_gradient"] == ["model.embed_tokens.weight"]
    about["parameters_without_gradient"].append("model.norm.weight")
    (case / "case.json").write_text(json.dumps(about))

    def change(arrays: dict) -> None:
        for name in [n for n in arrays if n.startswith("grad/") and "norm" not in n]:
            del arrays[name]
        arrays["grad/model.norm.weight"][3] *= -1

    change_outputs(case, change)
    found = [check.array for check in verify(case) if not check.passed]
    assert found == ["grad/model.norm.weight", "no gradient: model.norm.weight"]


@pytest.mark.parametrize("name", ["case.json", "inputs.npz", "outputs.npz", "model/config.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InputError, match=rf"case is not a golden case: {name} is missing"):
        list(verify(copy))


def test_a_damaged_file_is_named(copy: Path) -> None:
    (copy / "inputs.npz").write_bytes(b"not an archive")
    with pytest.raises(InputError, match=r"inputs\.npz cannot be read"):
        list(verify(copy))


def test_an_archive_with_pickles_is_refused(copy: Path) -> None:
    np.savez(copy / "outputs.npz", logits=np.array([{"a": 1}], object))
    with pytest.raises(InputError, match=r"outputs\.npz cannot be read"):
        list(verify(copy))
