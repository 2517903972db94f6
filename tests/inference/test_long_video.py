"""Three hours of video through a small model: memory as planned, every frame seen in its turn.

The host's memory does not grow with the frames, the device's by their keys and values only. Each
frame has its number drawn into it as sixteen squares; what the tower gets is read for them.
"""

import gc
import os
from pathlib import Path

import av
import jax
import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax.cost.video_plan import plan
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.inference import seeing_programs
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.session import Session
from llava_mini_jax.inference.shelf import Budget
from tests import tiny_model

HOURS_3 = 10_800  # frames, one a second
CHUNK = 32
ANSWER = 4
FLAT = 200 * 2**20  # bytes that the host's memory may grow by
PAPER = 0.6e6  # bytes a frame, section 5.3
QUESTION = "how many 7s are there?"


@pytest.fixture(scope="module")
def model():
    return llava_mini_jax.load(tiny_model.folder("paper", positions=16_384))


@pytest.fixture(scope="module")
def three_hours(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("long") / "three_hours.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(HOURS_3):
            bits = np.array([number >> bit & 1 for bit in range(16)], np.uint8).reshape(4, 4)
            picture = np.kron(bits * 255, np.ones((16, 16), np.uint8))[..., None].repeat(3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def drawn(pixels_IJYXC: np.ndarray) -> list[int]:
    """The numbers in frames as the model gets them."""
    step = pixels_IJYXC.shape[2] // 4
    centres = np.asarray(pixels_IJYXC)[:, 0, step // 2 :: step, step // 2 :: step, 1]
    return ((centres > 127).reshape(-1, 16) * 2 ** np.arange(16)).sum(axis=1).tolist()


def resident() -> int:
    """Bytes of memory that this process takes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def on_device(session: Session) -> int:
    """Bytes of all arrays, without what is the host's: on CPU numpy shows JAX's own buffers."""
    gc.collect()
    held = session.memory()
    return sum(array.nbytes for array in jax.live_arrays()) - held["host"]


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 2**23], ids=["nothing kept", "8 MiB kept"])
def test_three_hours(model, three_hours, host, monkeypatch, capsys):
    budget, look = Budget(host=host), seeing_programs.encode_vision
    numbers: list[int] = []
    host_bytes: dict[int, int] = {}  # by frames seen before
    device_bytes: list[int] = []  # while frames are seen

    def watched(params, pixels_IJYXC, cfg):
        host_bytes[len(numbers)] = resident()
        if numbers and not len(numbers) % (40 * CHUNK):
            device_bytes.append(on_device(asking))
        numbers.extend(drawn(pixels_IJYXC))
        return look(params, pixels_IJYXC, cfg)

    monkeypatch.setattr(seeing_programs, "encode_vision", watched)
    found, ended = {}, {}
    for frames in (16 * CHUNK, HOURS_3):
        for seen in (numbers, host_bytes, device_bytes):
            seen.clear()
        asking = Session(model, Settings(max_new_tokens=ANSWER), budget=budget, chunk=CHUNK)
        before = on_device(asking)
        asking.show_video(three_hours, FrameSampling(fps=1, max_frames=frames))
        "".join(asking.ask(QUESTION))
        assert asking.answer is not None
        assert asking._ticket is not None
        text = asking._ticket.usage.prompt - frames
        found[frames] = plan(
            model.bundle, frames, text, dtype="float32", chunk=CHUNK, answer=ANSWER, budget=budget
        )
        ended[frames] = on_device(asking) - before
        assert asking.memory()["host"] == found[frames].host["frames kept"] <= host
    assert numbers == list(range(HOURS_3))

    later = [size for frames, size in host_bytes.items() if frames >= 500]
    grown = max(later) - later[0]
    assert len(later) > 300 and grown < FLAT
    few, many = found.values()
    assert len(device_bytes) == 8 and max(device_bytes) == min(device_bytes)
    assert ended[HOURS_3] - ended[16 * CHUNK] == many.always["KV cache"] - few.always["KV cache"]
    exact = many.per_frame * HOURS_3
    room = (many.text + many.answer + 512) * many.per_slot
    assert exact <= many.always["KV cache"] <= 1.15 * (exact + room)
    with capsys.disabled():
        print(
            f"\n{HOURS_3:,} frames: host memory {grown / 2**20:.1f} MiB above that at frame 500; "
            f"KV cache {many.always['KV cache'] / HOURS_3:,.0f} bytes a frame, keys and values"
            f" {many.per_frame:,.0f} (the paper's model: {PAPER:,.0f})"
        )
