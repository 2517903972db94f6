"""Whole files: writers of one file at the same time, and what a failure leaves."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from etils import epath

from llava_mini_jax.journal import write_whole


def test_writers_of_one_file_do_not_meet(tmp_path):
    texts = [letter * 20_000 for letter in "abcd"]

    def write(text):
        for _ in range(100):
            write_whole(tmp_path / "results.json", text)
            assert (tmp_path / "results.json").read_text() in texts

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write, texts))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "results.json", "before")

    def refuse(self, target):
        raise OSError("no space left")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "results.json", "after")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
