"""The soak and the fuzz of load/, short, against one `llava-mini serve` with a tiny model."""

from collections.abc import Iterator

import pytest

pytest.importorskip("uvicorn")

from tests import tiny_model
from tests.serving.load.fuzz import fuzz
from tests.serving.load.process import Served, served
from tests.serving.load.soak import soak

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(str(tiny_model.folder("paper")), "--slots", "4") as server:
        yield server


def test_a_soak_leaves_nothing_behind(server: Served) -> None:
    # Of so few requests memory tells little: the allocator has not seen all sizes yet.
    soak(server, requests=200, warm_up=200, growth=5.0)


def test_malformed_bodies_are_refused_and_tell_nothing(server: Served) -> None:
    fuzz(server, 300)
