"""The switch of attention reaches every program; a kernel that is not there is refused at once."""

import dataclasses
import json
import shutil
from functools import partial

import pytest

import llava_mini_jax
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.opening import open_folder
from llava_mini_jax.inference.session import Session
from llava_mini_jax.ops import attention
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What every call of attention that is traced was told to use."""
    found, kernel = [], attention._kernel

    def watched(q_BTNH, implementation, **more):
        found.append(implementation)
        return kernel(q_BTNH, implementation, **more)

    monkeypatch.setattr(attention, "_kernel", watched)
    return found


def test_generation_and_sessions(asked) -> None:
    model = llava_mini_jax.load(tiny_model.folder("release"), attention="xla")
    model.generate("how many 7s are there?", tiny_model.picture(1), max_new_tokens=2)
    calls = len(asked)
    session = Session(model)
    session.show_image(tiny_model.picture(1))
    session.answer_alone("how many 7s are there?")
    assert len(asked) > calls > 0 and set(asked) == {"xla"}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_training(asked, remat: str) -> None:
    cfg = dataclasses.replace(tiny.release_model(), attention="xla", remat=remat)
    batch = tiny.training_batch(cfg)
    tiny.loss_and_grads(tiny.on_device(tiny.weights(cfg)), batch, cfg)
    assert asked and set(asked) == {"xla"}


def test_a_kernel_that_is_not_there_is_refused_before_weights_are_read() -> None:
    with pytest.raises(InputError, match='"cudnn" needs a GPU, and this program is for CPU'):
        llava_mini_jax.load(tiny_model.folder("release"), attention="cudnn")
    with pytest.raises(InputError, match='"flash" is unknown; use one of auto, xla, cudnn, splash'):
        llava_mini_jax.load(tiny_model.folder("release"), attention="flash")


def test_a_kernel_without_a_window_is_refused_before_weights_are_read(tmp_path) -> None:
    """Splash runs on a CPU too, interpreted; a model without a window is opened with it."""
    folder = shutil.copytree(tiny_model.folder("release"), tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    for window in (None, 5):
        own = {"model_type": "llava_mini_mistral", "architectures": [], "sliding_window": window}
        (folder / "config.json").write_text(json.dumps(values | own))
        opened = partial(
            open_folder, folder, dtype=None, vision_tower=None, template=None, max_length=None
        )
        assert opened().bundle.model.llm.window == window
        if window is None:
            opened(attention="splash")
            continue
        with pytest.raises(InputError, match='"splash": it has no sliding window'):
            opened(attention="splash")
