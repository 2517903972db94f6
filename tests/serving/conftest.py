"""Servers that the tests of this folder ask. What needs no rule of the fake's answers holds for
any worker: `worker` is the one place that says which."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from tests.serving import fake
from tests.serving.running import Client, running


@pytest.fixture(scope="module")
def worker() -> Any:
    return fake.FakeWorker(pace=0.001)


@pytest.fixture(scope="module")
def client(worker: Any) -> Iterator[Client]:
    with running(fake.service(worker)) as client:
        yield client
