"""The audit finds exactly the broken samples, on any number of workers, and leaves no mess."""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_mini_jax import cli
from llava_mini_jax.config import CLIP_L_336, image_config, prompt_config
from llava_mini_jax.data.batches.pipeline import Encoder
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets import audit
from llava_mini_jax.data.sets.sources import Dataset, Samples, SourcesConfig
from llava_mini_jax.errors import InputError
from tests import tiny_model


def turns(question="<image>\nwhat is it?", answer="3"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


GOOD = {
    "photo": {"image": "good.jpg", "conversations": turns()},
    "animation": {"image": "animation.jpg", "conversations": turns()},  # a GIF: its first frame
    "cmyk": {"image": "cmyk.jpg", "conversations": turns()},
    "mark at the end": {"image": "good.jpg", "conversations": turns("what is it?\n<image>")},
    "two marks in a turn": {"image": "good.jpg", "conversations": turns("<image> and <image>")},
    "film": {"video": "good.mp4", "conversations": turns()},
    "words": {"conversations": turns("hello")},
    "opened by the assistant": {"conversations": [turns()[1], *turns("hello")]},
}
BROKEN = {
    "truncated": ({"image": "truncated.jpg", "conversations": turns()}, "truncated.jpg"),
    "empty": ({"image": "empty.jpg", "conversations": turns()}, "0 bytes"),
    "no image": ({"image": "page.jpg", "conversations": turns()}, "not an image"),
    "missing": ({"image": "missing.jpg", "conversations": turns()}, "there is no such file"),
    "no mark": ({"image": "good.jpg", "conversations": turns("hello")}, "0 times for 1 images"),
    "empty answer": ({"conversations": turns("hello", " \n")}, "turn 2 is an empty answer"),
    "no answer": ({"conversations": turns("hello")[:1]}, "no answer to learn"),
    "no turns": ({"conversations": []}, "its conversations are []"),
    "two turns with marks": (
        {"image": "good.jpg", "conversations": turns() + turns()},
        "2 times for 1 images",
    ),
    "mark without image": ({"conversations": turns()}, "1 times for 0 images"),
    "bad film": ({"video": "bad.mp4", "conversations": turns()}, "Cannot read the video"),
    "cut film": ({"video": "cut.mp4", "conversations": turns()}, "cut.mp4"),
    "missing film": ({"video": "none.mp4", "conversations": turns()}, "there is no video"),
    "wrong role": ({"conversations": [{"from": "robot", "value": "a"}]}, "turn 1 is"),
    "out of turn": ({"conversations": [turns()[0]] * 2}, "by the user where"),
}
BAD_LINE = "broken-4"  # the name of the file and the row: a line that is not valid JSON has no id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of good and broken samples, images and all."""
    folder = tmp_path_factory.mktemp("data")
    media = folder / "media"
    media.mkdir()
    picture = Image.effect_noise((64, 48), 50)
    picture.convert("RGB").save(media / "good.jpg")
    picture.convert("CMYK").save(media / "cmyk.jpg")
    content = io.BytesIO()
    picture.save(content, "GIF", save_all=True, append_images=[picture.rotate(180)])
    (media / "animation.jpg").write_bytes(content.getvalue())
    whole = (media / "good.jpg").read_bytes()
    (media / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (media / "empty.jpg").touch()
    (media / "page.jpg").write_text("<html>404</html>")
    tiny_model.write_video(media / "good.mp4", seconds=3)
    film = (media / "good.mp4").read_bytes()
    (media / "bad.mp4").write_bytes(b"\0" * 5000)
    (media / "cut.mp4").write_bytes(film[: len(film) // 2])
    good = [{"id": name, **row} for name, row in GOOD.items()]
    (folder / "good.json").write_text(json.dumps(good))
    lines = [json.dumps({"id": name, **row}) for name, (row, _) in BROKEN.items()]
    lines.insert(4, '{"id": "bad line", "conversations": [')
    lines += [json.dumps(row) for row in good[:2]]
    (folder / "broken.jsonl").write_text("\n".join(lines))
    listed = [{"json_path": name} for name in ("good.json", "broken.jsonl")]
    (folder / "mix.yaml").write_text(json.dumps({"datasets": listed}))
    return folder


def config_of(folder: Path, *names: str) -> SourcesConfig:
    images = str(folder / "media")
    datasets = tuple(Dataset(path=str(folder / name), images=images) for name in names)
    return SourcesConfig(datasets=datasets, video=FrameSampling(fps=1.0, max_frames=8))


def verify(*arguments: object) -> int:
    return cli.main(["data", "verify", *map(str, arguments)])


@pytest.mark.parametrize("workers", [1, 4])
def test_exactly_the_broken_samples_are_rejected(folder, workers):
    seen = []
    manifest = audit.audit(
        config_of(folder, "good.json", "broken.jsonl"),
        workers=workers,
        progress=lambda done, total: seen.append((done, total)),
    )
    expected = list(BROKEN)
    expected.insert(4, BAD_LINE)
    assert [sample["id"] for sample in manifest["rejected"]] == expected
    reasons = {sample["id"]: sample["reason"] for sample in manifest["rejected"]}
    for name, (_, part) in BROKEN.items():
        assert part in reasons[name] and "\n" not in reasons[name], name
        assert not reasons[name].startswith(("OSError", "TypeError", "ValueError")), name
    assert "broken.jsonl, line 5: not valid JSON" in reasons[BAD_LINE]
    total = len(GOOD) + len(expected) + 2
    assert seen == [(i + 1, total) for i in range(total)] and manifest["samples"] == total
    assert [(d["name"], d["samples"], d["rejected"]) for d in manifest["datasets"]] == [
        ("good", len(GOOD), 0),
        ("broken", len(expected) + 2, len(expected)),
    ]
    assert manifest["datasets"][0]["modalities"] == {"image": 5, "video": 1, "text": 2}
    assert {s["dataset"] for s in manifest["rejected"]} == {"broken"}
    assert manifest["rejected"][0]["place"] == f"{folder / 'broken.jsonl'}, line 1"
    content = (folder / "good.json").read_bytes()
    assert manifest["datasets"][0]["files"] == [
        {
            "path": str(folder / "good.json"),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    ]


def test_training_takes_what_the_audit_takes_and_nothing_else(folder):
    images = image_config("paper", dataclasses.replace(CLIP_L_336, image_size=32))
    encode = Encoder(build_tokenizer(), prompt_config("paper", "brief", 512), images)
    samples = Samples(config_of(folder, "good.json", "broken.jsonl"))
    for index in range(len(samples)):
        verdict = audit.check_sample(samples, index)
        try:
            encode(samples[index])
            trained = True
        except InputError:
            trained = False
        assert trained == (verdict.reason == ""), verdict


def test_a_sample_is_read_once_whatever_its_weight(folder):
    config = config_of(folder, "good.json")
    heavy = dataclasses.replace(config.datasets[0], weight=3.0, sampling="first:2")
    manifest = audit.audit(dataclasses.replace(config, datasets=(heavy,)), workers=2)
    (described,) = manifest["datasets"]
    assert (described["rows"], described["samples"], manifest["samples"]) == (len(GOOD), 2, 2)


def test_a_fault_that_nobody_thought_of_is_reported_too(folder, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(audit, "load_image", fail)
    manifest = audit.audit(config_of(folder, "good.json"), workers=2)
    assert len(manifest["rejected"]) == 5
    assert manifest["rejected"][0]["reason"] == "OSError: [Errno 5] Input/output error"


# --- The command ----------------------------------------------------------------------------------


def test_command_on_good_samples(folder, tmp_path, capsys):
    report = tmp_path / "manifest.json"
    options = ["--images", folder / "media", "--report", report]
    assert verify(folder / "good.json", *options) == 0
    assert capsys.readouterr() == ("good: 5 image, 1 video, 2 text, 0 rejected\n", "")
    assert json.loads(report.read_text())["rejected"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_command_on_a_list_with_broken_samples(folder, tmp_path, capsys):
    reports = [tmp_path / f"{workers}.json" for workers in (1, 4)]
    for report, workers in zip(reports, (1, 4), strict=True):
        options = ["--images", folder / "media", "--workers", workers, "--report", report]
        assert verify(folder / "mix.yaml", *options) == 1
    assert reports[0].read_bytes() == reports[1].read_bytes()
    out, err = capsys.readouterr()
    assert err == "" and f"broken: 2 image, 0 video, 0 text, {len(BROKEN) + 1} rejected\n" in out
    assert "\n  'truncated': Cannot read the image" in out


def test_command_reads_training_configs(folder, tmp_path, capsys):
    code = f"""
import dataclasses
from configs import digits
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.sources import Dataset, SourcesConfig
from llava_mini_jax.training.stages import stages_of

def config():
    datasets = (Dataset(path={str(folder / "good.json")!r}, images={str(folder / "media")!r}),)
    data = SourcesConfig(datasets=datasets, video=FrameSampling(fps=1.0, max_frames=8))
    return dataclasses.replace(stages_of(digits.config())[0], data=data)
"""
    path = tmp_path / "config.py"
    path.write_text(code)
    assert verify(path) == 0
    assert capsys.readouterr().out == "good: 5 image, 1 video, 2 text, 0 rejected\n"
    assert verify(path, "--fps", 2) == 2 and "--fps changes nothing" in capsys.readouterr().err
    assert verify("configs/digits.py") == 2 and "no stage" in capsys.readouterr().err


def test_command_verifies_held_out_data_too(folder, tmp_path, capsys):
    code = f"""
import dataclasses
from configs import digits
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.sets.sources import Dataset, SourcesConfig
from llava_mini_jax.training.stages import HeldOut

def config():
    datasets = (Dataset(path={str(folder / "good.json")!r}, images={str(folder / "media")!r}),)
    data = SourcesConfig(datasets=datasets, video=FrameSampling(fps=1.0, max_frames=8))
    heldout = HeldOut(data=data, batches=1, every=1)
    return dataclasses.replace(digits.config().stage1, heldout=heldout)
"""
    (tmp_path / "config.py").write_text(code)
    assert verify(tmp_path / "config.py") == 0
    assert capsys.readouterr().out == "good: 5 image, 1 video, 2 text, 0 rejected\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "there is no such file"),
        (["nowhere.yaml"], "there is no such file"),
        (["nowhere.py"], "does not exist"),
        (["{good}", "--images", "nowhere"], "folder of images nowhere"),
        (["{good}", "--report", "nowhere/report.json"], "cannot be written"),
        (["{good}", "--report", "."], "cannot be written"),
        (["{good}", "--report", "{good}"], "would overwrite the data file"),
        (["{good}", "--workers", "0"], "number of workers is 0"),
        (["{good}", "--fps", "0"], "fps 0.0"),
        ([], "arguments are required"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, arguments, message):
    filled = [word.format(good=folder / "good.json") for word in arguments]
    assert verify(*filled) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert json.loads((folder / "good.json").read_text())


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    report = tmp_path / "manifest.json"
    audit.write_manifest({"samples": 1}, report)
    before = report.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            audit.write_manifest({"samples": 2}, report)
    assert report.read_bytes() == before
    assert list(tmp_path.iterdir()) == [report]


def test_ctrl_c_leaves_nothing_behind(folder, tmp_path):
    """A real process, stopped in the middle of 20,000 images."""
    row = json.dumps({"id": "a", **GOOD["photo"]}) + "\n"
    (tmp_path / "many.jsonl").write_text(row * 20_000)
    out = tmp_path / "out"
    out.mkdir()
    code = """
import os, signal, sys
from llava_mini_jax import cli
from llava_mini_jax.data.sets import audit
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
check, reads = audit.check_sample, []
def check_and_stop(samples, index):
    reads.append(index)
    if index == 50:
        os.kill(os.getpid(), signal.SIGINT)
    return check(samples, index)
audit.check_sample = check_and_stop
status = cli.main(sys.argv[1:])
print(len(reads) < 10_000)
sys.exit(status)
"""
    options = ["--images", folder / "media", "--report", out / "manifest.json", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "verify", tmp_path / "many.jsonl", *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "True\n", "")
    assert list(out.iterdir()) == []
