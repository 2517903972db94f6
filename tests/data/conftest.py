"""The clip that the tests of videos share."""

from pathlib import Path

import pytest

from tests.data.clips import make_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def video(folder) -> Path:
    """Two seconds, ten frames a second."""
    return make_video(folder / "steady.mp4", range(20))
