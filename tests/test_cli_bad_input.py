"""Whatever cannot be used: one line on stderr that says what and why, exit status 2."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_mini_jax import cli
from tests import tiny_model
from tests.tensorfiles.bad_files import Call, Name, program, write_zip


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A model folder that may be changed."""
    return Path(shutil.copytree(tiny_model.folder("paper"), tmp_path / "model"))


def bomb(path: Path) -> Path:
    """A PNG that says it has 30,000 x 30,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
    return path


def truncated(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def changed_config(model: Path, *keys: str, value: object) -> Path:
    path = model / "config.json"
    config = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(config))
    return model


def lying_header(model: Path) -> Path:
    path = model / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["lm_head.weight"]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return model


def malicious(model: Path) -> Path:
    (model / "model.safetensors").unlink()
    command = Call(Name("os", "system"), (f"touch {model / 'canary'}",))
    write_zip(model / "pytorch_model.bin", program({"w": command}))
    return model


def corrupt_video(model: Path) -> Path:
    path = tiny_model.write_video(model / "v.mp4", 2)
    return truncated(path, path.stat().st_size // 2)


def naflex(model: Path) -> Path:
    """A folder of another kind of tower."""
    folder = model / "siglip2"
    folder.mkdir()
    vision = {"hidden_act": "gelu_pytorch_tanh", "image_size": 32}
    config = {"model_type": "siglip2", "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return folder


# What is wrong -> (the command's words, from a model folder that may be changed; what is said)
BAD: dict[str, tuple[Callable[[Path], list], str]] = {
    "missing folder": (lambda m: ["ask", m / "none", "a"], "does not exist"),
    "file as folder": (lambda m: ["ask", m / "config.json", "a"], "is a file"),
    "hub name offline": (lambda m: ["ask", "nobody/nothing", "a"], "is not a local folder"),
    "hub name, convert": (
        lambda m: ["convert", "nobody/nothing", m / "o"],
        "is not a local folder",
    ),
    "hub name, inspect": (lambda m: ["inspect", "nobody/nothing"], "is not a local folder"),
    "missing image": (lambda m: ["ask", m, "a", "--image", m / "x.png"], "there is no such file"),
    "corrupt image": (
        lambda m: [
            "ask",
            m,
            "a",
            "--image",
            truncated(tiny_model.write_picture(m / "a.png", 1), 90),
        ],
        "Cannot read the image",
    ),
    "text as image": (lambda m: ["ask", m, "a", "--image", m / "config.json"], "not an image"),
    "bomb": (lambda m: ["ask", m, "a", "--image", bomb(m / "bomb.png")], "make it smaller"),
    "missing video": (lambda m: ["ask", m, "a", "--video", m / "x.mp4"], "there is no such file"),
    "corrupt video": (lambda m: ["ask", m, "a", "--video", corrupt_video(m)], "v.mp4"),
    "truncated weights": (
        lambda m: ["ask", truncated(m / "model.safetensors", 20_000).parent, "a"],
        "model.safetensors",
    ),
    "lying header": (lambda m: ["ask", lying_header(m), "a"], "is not a complete safetensors file"),
    "malicious pickle": (lambda m: ["ask", malicious(m), "a"], "os.system"),
    "malicious, inspect": (lambda m: ["inspect", malicious(m)], "os.system"),
    "more marks": (
        lambda m: [
            "ask",
            m,
            "<image> <image>",
            "--image",
            tiny_model.write_picture(m / "a.png", 1),
        ],
        "2 times for 1 images",
    ),
    "fewer marks": (
        lambda m: ["ask", m, "<image>", *["--image", tiny_model.write_picture(m / "a.png", 1)] * 2],
        "1 times for 2 images",
    ),
    "too long": (lambda m: ["ask", m, "digits " * 300], "of text, 0 for images"),
    "unknown format": (lambda m: ["convert", m, m / "o", "--format", "onnx"], '"onnx" is unknown'),
    "format without place": (
        lambda m: ["convert", m, m / "o", "--format", "llava-hf"],
        "no place for compressor",
    ),
    "target not empty": (lambda m: ["convert", m, m], "is not empty"),
    "target is a file": (lambda m: ["convert", m, m / "config.json"], "is not empty"),
    "unknown field": (
        lambda m: ["ask", changed_config(m, "llava_mini_jax", "prompt", "tempo", value=1), "a"],
        '"tempo"',
    ),
    "unknown part": (
        lambda m: ["inspect", changed_config(m, "llava_mini_jax", "colours", value={})],
        '"colours"',
    ),
    "wrong type": (
        lambda m: [
            "ask",
            changed_config(m, "llava_mini_jax", "prompt", "max_length", value="9"),
            "a",
        ],
        "expected int",
    ),
    "unknown template": (
        lambda m: [
            "ask",
            changed_config(m, "llava_mini_jax", "prompt", "template", value="x"),
            "a",
        ],
        'template "x"',
    ),
    "unknown projector": (
        lambda m: ["inspect", changed_config(m, "mm_projector_type", value="mlp9x_relu")],
        "mlp9x_relu",
    ),
    "unknown compressor": (
        lambda m: [
            "inspect",
            changed_config(m, "llava_mini_jax", "model", "compressor", "kind", value="zip"),
        ],
        '"zip"',
    ),
    "no json": (lambda m: ["ask", truncated(m / "config.json", 50).parent, "a"], "not valid json"),
    "no tokenizer": (
        lambda m: ["ask", [(m / n).unlink() for n in ("tokenizer.json",)] and m, "a"],
        "tokenizer",
    ),
    "no question": (lambda m: ["ask", m], "no question is given"),
    "no tokens": (lambda m: ["ask", m, "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "no number": (lambda m: ["ask", m, "a", "--top-k", "many"], "--top-k"),
    "no format of folders": (
        lambda m: ["convert", m, m / "o", "--dtype", "int8"],
        "use one of float32, bfloat16, float16; weights become int8 as they are loaded",
    ),
    "unknown dtype": (lambda m: ["ask", m, "a", "--dtype", "int3"], '"int3"'),
    "unknown option": (lambda m: ["ask", m, "a", "--imgae", "a.png"], "--imgae"),
    "unknown command": (lambda m: ["aks", m, "a"], "aks"),
    "no command": (lambda m: [], "no command is given"),
    "one folder": (lambda m: ["convert", m], "expected SRC and DST"),
    "clip alone": (lambda m: ["convert", "--clip", m, m / "o"], "belong together"),
    "option without parts": (lambda m: ["convert", m, m / "o", "--grid", "2"], "--grid changes"),
    "unknown mesh": (lambda m: ["inspect", m, "--mesh", "pipe=2"], '"pipe=2"'),
    "unknown shape": (lambda m: ["inspect", "--abstract", "gpt-2"], '"gpt-2" is unknown'),
    "folder and shape": (lambda m: ["inspect", m, "--abstract", "vicuna-7b"], "one of the two"),
    "unknown dialect": (
        lambda m: ["inspect", "--abstract", "vicuna-7b", "--dialect", "welsh"],
        '"welsh" is unknown',
    ),
    "no case": (lambda m: ["verify", m], "is not a golden case"),
    "no Unicode": (lambda m: ["ask", m, "which \udcff digit"], "'\\udcff' at character 7"),
    "no Unicode, dry run": (lambda m: ["ask", m, "\udcff", "--dry-run"], "'\\udcff' at character"),
    "large top-k": (
        lambda m: ["ask", m, "a", "--temperature", "1", "--top-k", "99999999999"],
        "top_k is 99999999999",
    ),
    "no such user": (lambda m: ["ask", "~nosuchuser/m", "a"], "~nosuchuser/m does not exist"),
    "fps": (
        lambda m: ["ask", m, "a", "--video", m, "--fps", "inf"],
        "fps inf; give a number above 0",
    ),
    "template": (lambda m: ["ask", m, "a", "--conv-mode", "welsh"], 'template "welsh"'),
    "length": (lambda m: ["ask", m, "a", "--max-length", "0"], "max_length is 0; give 2 to 256"),
    "length, dry run": (
        lambda m: ["ask", m, "a", "--max-length", "999", "--dry-run"],
        "max_length is 999; give 2 to 256",
    ),
    "mark, dry run": (lambda m: ["ask", m, "<image>", "--dry-run"], "1 times for 0 images"),
    "another tower": (
        lambda m: ["convert", "--vision", naflex(m), "--llm", m, m / "o"],
        'vision tower of model_type "siglip2" (NaFlex: ',
    ),
    "class token": (
        lambda m: ["inspect", changed_config(m, "mm_vision_select_feature", value="cls_patch")],
        'vision feature "cls_patch"; expected "patch"',
    ),
    "marks around images": (
        lambda m: ["ask", changed_config(m, "mm_use_im_start_end", value=True), "a"],
        '"mm_use_im_start_end" is true',
    ),
    "layers below 0": (
        lambda m: ["inspect", "--abstract", "vicuna-7b", "--prefusion-layers", "-1"],
        "-1 pre-fusion layers; give 0",
    ),
    "no grid": (
        lambda m: ["inspect", "--abstract", "vicuna-7b", "--grid", "0"],
        "grid is 0; give 1 or more",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(
    name: str,
    copied: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words, said = BAD[name]
    status = cli.main([str(word) for word in words(copied)])
    out, err = capsys.readouterr()
    assert status == 2
    assert err.startswith("llava-mini: ") and err.count("\n") == 1 and "Traceback" not in err
    assert said in err and " at 0x" not in err
    assert out == "" or name == "no case"
    assert not (copied / "canary").exists() and not (copied / "o").exists()


def test_tensors_that_do_not_fit_are_all_listed(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = load_file(copied / "model.safetensors")
    del arrays["model.norm.weight"]
    arrays["model.extra.weight"] = np.zeros(3, np.float32)
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]
    save_file(arrays, copied / "model.safetensors")
    for command in (["ask", copied, "a"], ["inspect", copied], ["convert", copied, copied / "o"]):
        status = cli.main([str(word) for word in command])
        err = capsys.readouterr().err
        assert status == 2 and "Traceback" not in err and not (copied / "o").exists()
        for said in ("missing for llm/final_norm", "unexpected in", "wrong shape: lm_head.weight"):
            assert said in err
