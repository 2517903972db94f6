"""Servers that the tests of this folder ask.

`client` asks a server of each worker: the rule of fake.py, and a tiny model's engine, which takes a
while to compile. What only the rule gives (its texts, its defects, its pace) asks `ruled`.
"""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import llava_mini_jax
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.worker import Worker
from llava_mini_jax.serving.limits import Limits
from llava_mini_jax.serving.media import MediaReader
from tests import tiny_model
from tests.serving import fake
from tests.serving.running import Client, running, wait_until


@pytest.fixture(scope="module", params=["rule", pytest.param("engine", marks=pytest.mark.slow)])
def worker(request: pytest.FixtureRequest) -> Any:
    if request.param == "rule":
        return fake.FakeWorker(pace=0.001)
    return Worker(llava_mini_jax.load(tiny_model.folder("paper")), [LaneSize(4, 256)])


@pytest.fixture(scope="module")
def client(worker: Any) -> Iterator[Client]:
    reader = MediaReader(worker.model.bundle, Limits())
    with running(fake.service(worker, reader)) as client:
        wait_until(lambda: worker.state != "starting", 600)
        yield client


@pytest.fixture(scope="module")
def ruled() -> Iterator[Client]:
    with running(fake.service(fake.FakeWorker(pace=0.001))) as client:
        yield client
