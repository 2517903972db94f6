"""The lmms-eval adapter: requests answered as Model.generate does, alone and through lmms-eval.

Without lmms-eval, its base class is a stub, and the test that runs the tool itself is skipped.
"""

import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tomllib
import types
import warnings
from pathlib import Path

import jax
import pyarrow.parquet
import pytest
from PIL import Image

import llava_mini_jax
from llava_mini_jax import integrations
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.answer import Settings
from tests import golden_data, tiny, tiny_model
from tests.conftest import ROOT
from tests.training.runs import SETTINGS

fast_compilation = tiny.fast_compilation

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
GREEDY = {"max_new_tokens": 4, "temperature": 0, "top_p": 0, "num_beams": 1, "until": ["\n\n"]}


class StubBase:
    """What the adapter uses of lmms_eval.api.model.lmms."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)


class StubManifest:
    def __init__(self, *, model_id, simple_class_path):
        self.model_id, self.simple_class_path = model_id, simple_class_path


@pytest.fixture(scope="module")
def adapter():
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            stubs = {
                "api.model": {"lmms": StubBase},
                "models.registry_v2": {"ModelManifest": StubManifest},
            }
            for name in ("", ".api", ".models"):
                patch.setitem(sys.modules, f"lmms_eval{name}", types.ModuleType("stub"))
            for name, content in stubs.items():
                module = types.ModuleType(name)
                vars(module).update(content)
                patch.setitem(sys.modules, f"lmms_eval.{name}", module)
        yield importlib.import_module("llava_mini_jax.integrations.lmms_eval")
    sys.modules.pop("llava_mini_jax.integrations.lmms_eval", None)


@pytest.fixture(scope="module")
def folder():
    return tiny_model.folder("paper")


@pytest.fixture(scope="module")
def model(folder):
    return llava_mini_jax.load(folder, dtype="float32")


@pytest.fixture
def tool(adapter, folder):
    return adapter.LmmsEvalModel(str(folder), dtype="float32", batch_size="3")


class Instance:
    """lmms-eval's, as far as a model sees it."""

    def __init__(self, *args):
        self.args = args


def ask(tool, documents, settings=GREEDY):
    """Answers to (text, visuals, ...) documents of one task; `settings` may be one for each."""
    tool.task_dict = {"task": {"test": documents}}
    listed = settings if isinstance(settings, list) else [settings] * len(documents)
    return tool.generate_until(
        [
            Instance(document[0], kwargs, lambda document: document[1], number, "task", "test")
            for number, (document, kwargs) in enumerate(zip(documents, listed, strict=True))
        ]
    )


def picture(seed):
    return Image.fromarray(tiny_model.picture(seed))


def test_answers_are_those_of_generate_in_the_order_of_the_requests(tool, model, tmp_path):
    clip = str(tiny_model.write_video(tmp_path / "clip.mp4", seconds=2))
    file = str(tiny_model.write_picture(tmp_path / "page.png", 9))
    documents = [(f"{'which ' * (7 * n % 5)}number {n}?", [picture(n)]) for n in range(7)]
    documents += [("What moves?", [clip]), ("How many?", []), ("Sum?", None), ("Row?", [file])]
    documents.insert(2, ("Which <image> is larger, or <image>?", [picture(20), picture(21)]))
    found = ask(tool, documents)
    alone = [
        model.generate(
            text,
            images=None if shown in ([], None, [clip]) else shown,
            videos=[clip] if shown == [clip] else None,
            max_new_tokens=4,
        )
        for text, shown in documents
    ]
    assert found == alone
    assert len(set(found)) > 6  # the model tells the questions apart


def test_requests_of_several_settings_are_not_mixed(tool, model):
    documents = [(f"number {n}?", [picture(n)]) for n in range(4)]
    settings = [{"max_new_tokens": 2 + n % 2} for n in range(4)]
    found = ask(tool, documents, settings)
    assert found == [
        model.generate(text, images=shown, max_new_tokens=2 + n % 2)
        for n, (text, shown) in enumerate(documents)
    ]
    assert settings[0] == {"max_new_tokens": 2}  # lmms-eval shares them among requests


def settings_of(adapter, kwargs, use_until=False):
    request = adapter.LmmsRequest("?", kwargs, lambda document: [], 0, "task", "test")
    return adapter.settings_of(request, use_until)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, Settings(max_new_tokens=1024)),
        (GREEDY, Settings(max_new_tokens=4)),
        ({"temperature": 0.7, "top_p": 0.9}, dict(temperature=0.7, top_p=0.9)),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0}, {}),
        ({"do_sample": True, "top_k": 5}, dict(temperature=1.0, top_k=5)),
        ({"temperature": 0, "do_sample": True, "top_p": None, "num_beams": None}, {}),
        ({"image_aspect_ratio": "original", "until": "ASSISTANT:"}, {}),
    ],
)
def test_settings_of_a_task(adapter, kwargs, expected):
    if isinstance(expected, dict):
        expected = Settings(max_new_tokens=1024, **expected)
    before = dict(kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settings_of(adapter, kwargs) == expected
    assert kwargs == before


def test_until_is_honoured_where_one_asks_for_it(adapter, folder, model):
    assert settings_of(adapter, {"until": ["\n\n", ""]}, use_until=True).stop == ("\n\n",)
    assert settings_of(adapter, {"until": "ASSISTANT:"}, use_until=True).stop == ("ASSISTANT:",)
    whole = model.generate("number?", images=[picture(0)], max_new_tokens=6)
    end = whole[len(whole) // 2 :]
    tool = adapter.LmmsEvalModel(str(folder), dtype="float32", use_until=True)
    document = ("number?", [picture(0)])
    (cut,) = ask(tool, [document], {"max_new_tokens": 6, "until": end})
    assert cut == whole[: whole.index(end)].strip() != whole


def test_what_a_task_wants_in_vain(adapter):
    with pytest.raises(InputError, match="task has num_beams 5; only 1 is known"):
        settings_of(adapter, {"num_beams": 5})
    with pytest.warns(UserWarning, match="task: repetition_penalty of its settings is ignored"):
        settings_of(adapter, {"repetition_penalty": 2, "max_new_tokens": 4})


def test_a_request_that_cannot_be_read_is_told_and_the_others_are_answered(tool, model, tmp_path):
    documents = [
        ("number?", [str(tmp_path / "none.mp4")]),
        ("number?", [picture(1)]),
        ("number?", [{"array": [0.0]}]),
        ("word " * 500, []),
        ("number?", [str(tmp_path)]),
    ]
    for number in range(10):  # a video that breaks in the middle
        tiny_model.write_picture(tmp_path / f"{number}.png", number)
    (tmp_path / "8.png").write_bytes(b"")
    with pytest.warns(UserWarning) as told:
        found = ask(tool, documents)
    alone = model.generate("number?", images=[picture(1)], max_new_tokens=4)
    assert found == ["", alone, "", "", ""]
    said = "\n".join(str(warning.message) for warning in told)
    assert "task, document 0: not asked: " in said and "none.mp4" in said
    assert "document 2 shows a dict; this model reads Pillow images" in said
    assert "task, document 3: not asked: " in said
    assert "task, document 4: not asked: " in said and "8.png" in said
    assert "4 of 5 requests have no answer" in said


def test_frames_of_videos_are_chosen_by_the_arguments(adapter, folder, model, tmp_path):
    clip = str(tiny_model.write_video(tmp_path / "clip.mp4", seconds=6))
    tool = adapter.LmmsEvalModel(str(folder), dtype="float32", fps=2, max_frames=3)
    sampling = FrameSampling(fps=2, max_frames=3)
    (found,) = ask(tool, [("What moves?", [clip])])
    assert found == model.generate(
        "What moves?", videos=[clip], max_new_tokens=4, sampling=sampling
    )


def test_weights_are_let_go_and_come_back(tool):
    documents = [("number?", [picture(1)])]
    before = ask(tool, documents)
    tool.clean()
    assert not any(isinstance(value, llava_mini_jax.Model) for value in vars(tool).values())
    assert ask(tool, documents) == before


def test_the_rest_of_the_contract(tool, adapter, folder):
    assert (tool.is_simple, tool.rank, tool.world_size, tool.batch_size) == (True, 0, 1, 3)
    for other in (tool.loglikelihood, tool.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            other([])
    with pytest.raises(InputError, match="--model_args has attn; known are pretrained"):
        adapter.LmmsEvalModel(str(folder), attn="flash")
    with pytest.raises(InputError, match="--batch_size is auto; give a number"):
        adapter.LmmsEvalModel(str(folder), batch_size="auto")
    if not INSTALLED:
        assert "torch" not in sys.modules


def test_the_entry_point_leads_to_the_adapter(adapter):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = project["entry-points"]["lmms_eval.models"]["llava_mini_jax"]
    assert entry == f"{integrations.__name__}:{integrations.lmms_eval_models.__name__}"
    manifest = integrations.lmms_eval_models()
    assert manifest.model_id == "llava_mini_jax"
    assert manifest.simple_class_path == f"{adapter.__name__}.{adapter.LmmsEvalModel.__name__}"


# lmms-eval's own tasks, their data from files: what differs from the task's own YAML.
TASKS = {
    "pope_adv": ("pope", "hf_parquet/Full/adversarial-00000-of-00001.parquet", "adversarial"),
    "textvqa_val": ("textvqa", "hf_parquet/data/validation-00000-of-00001.parquet", "validation"),
}


def write_task(name, include):
    """A task `local_NAME` that is lmms-eval's NAME over golden files."""
    import lmms_eval

    benchmark, file, split = TASKS[name]
    home = Path(lmms_eval.__file__).parent / "tasks" / benchmark
    own = include / benchmark
    own.mkdir(parents=True)
    (own / "utils.py").write_text((home / "utils.py").read_text())
    text = (home / f"{name}.yaml").read_text()
    for shared in home.glob("_default_template_*"):
        text = text.replace(f"include: {shared.name}", "") + "\n" + shared.read_text()
    dropped = ("dataset_", "token:", "task:", "- metric: submission")
    kept, skipping = [], False
    for line in text.splitlines():
        if line.lstrip().startswith(dropped):
            skipping = "submission" in line  # and the two lines that belong to it
            continue
        skipping = skipping and line.startswith("    ")
        if not skipping:
            kept.append(line)
    data = golden_data.folder("eval") / benchmark / file
    kept += [
        f"task: local_{name}",
        "dataset_path: parquet",
        f"dataset_kwargs: {{data_files: {{{split}: {data}}}}}",
    ]
    (own / f"local_{name}.yaml").write_text("\n".join(kept) + "\n")
    return data


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs lmms-eval")
def test_lmms_eval_itself_asks_the_golden_prompts(folder, model, tmp_path):
    data = {name: write_task(name, tmp_path / "tasks") for name in TASKS}
    environment = os.environ | {name.upper(): str(jax.config.values[name]) for name in SETTINGS}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "NO_COLOR": "1"}
    done = subprocess.run(
        [
            Path(sys.executable).with_name("lmms-eval"), "--model", "llava_mini_jax",
            "--model_args", f"pretrained={folder},dtype=float32",
            "--tasks", ",".join(f"local_{name}" for name in TASKS),
            "--include_path", tmp_path / "tasks", "--batch_size", "4",
            "--gen_kwargs", "max_new_tokens=5", "--log_samples", "--output_path", tmp_path / "out",
        ],
        env=environment, cwd=tmp_path, text=True, timeout=540,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    for name, (benchmark, _, _) in TASKS.items():
        (path,) = (tmp_path / "out").rglob(f"*samples_local_{name}.jsonl")
        samples = sorted(map(json.loads, path.open()), key=lambda sample: sample["doc_id"])
        golden = golden_data.folder("eval") / benchmark / "expected_lmms_eval_run.json"
        prompts = json.loads(golden.read_text())["tasks"][name]["prompts"]
        assert [sample["input"] for sample in samples] == prompts
        rows = pyarrow.parquet.read_table(data[name]).to_pylist()
        pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
        alone = [
            model.generate(prompt, images=picture, max_new_tokens=5)
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        assert [sample["filtered_resps"] for sample in samples] == alone
        assert len(set(alone)) > 3
