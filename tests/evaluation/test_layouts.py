"""Readers of benchmark files: what is broken is named with its place."""

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import layouts
from llava_mini_jax.evaluation.benchmark import Output, Question


def question(key, **more):
    text = f"Is {key}?\nShort."
    return Question(key=key, question_id=key, text=text, prompt=text, **more)


def answer(text, prompt=""):
    return Output(text=text, prompt=prompt, cut=None, line={})


def table(path, **columns):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_json_lines(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": 1, "text": "a"}\n\n{"id": 2, "text": "b"}\n')
    assert [r["id"] for r in layouts.read_json_lines(path, {"id": int, "text": str})] == [1, 2]
    with pytest.raises(InputError, match=r'line 1: "label" is nothing; expected str.*id, text'):
        layouts.read_json_lines(path, {"label": str})
    with pytest.raises(InputError, match=r'line 1: "text" is \'a\'; expected int'):
        layouts.read_json_lines(path, {"text": int})
    for broken in ("{", "[1]", '{"id": 1'):
        path.write_text('{"id": 1}\n' + broken)
        with pytest.raises(InputError, match=r"line 2"):
            layouts.read_json_lines(path, {"id": int})
    with pytest.raises(InputError, match=r"none.jsonl cannot be read"):
        layouts.read_json_lines(tmp_path / "none.jsonl", {})


def test_parquet_files_of_the_first_pattern_that_has_any(tmp_path):
    for name in ("b/data/test-00001.parquet", "b/data/test-00000.parquet", "data/val-0.parquet"):
        table(tmp_path / name, x=[1])
    found = layouts.parquet_files(tmp_path, "Full/*.parquet", "data/test-*.parquet", "data/*")
    assert [path.name for path in found] == ["test-00000.parquet", "test-00001.parquet"]
    assert layouts.parquet_instead(tmp_path, "q.jsonl", "data/val-*") != []
    (tmp_path / "q.jsonl").touch()
    assert layouts.parquet_instead(tmp_path, "q.jsonl", "data/val-*") == []


def test_parquet_rows_and_pictures(tmp_path):
    pictures = [{"bytes": b"one", "path": None}, {"bytes": b"one", "path": "x.png"}, None]
    path = table(tmp_path / "x.parquet", id=["a", "b", "c"], image=pictures)
    rows = layouts.read_parquet([path, path], {"id": str}, ("image", "hint"))
    assert [row["id"] for row in rows] == [*"abcabc"]
    assert [row["image"] for row in rows[:3]] == [b"one", b"one", None]
    assert rows[0]["image"] is rows[4]["image"]  # held once
    assert rows[0]["hint"] is None
    with pytest.raises(InputError, match=r"row 3.*image.* is None; expected bytes"):
        layouts.read_parquet([path], {"id": str, "image": bytes})
    with pytest.raises(InputError, match=r"has no column question, label; it has id, image"):
        layouts.read_parquet([path], {"question": str, "id": str, "label": str})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"Cannot read .*x.parquet"):
        layouts.read_parquet([path], {"id": str})


def test_keys_are_unique():
    assert len(layouts.check_keys("pope", [question("1"), question("2")])) == 2
    with pytest.raises(InputError, match=r"1 questions appear twice: 1"):
        layouts.check_keys("pope", [question("1"), question("2"), question("1")])
    with pytest.raises(InputError, match=r"no question"):
        layouts.check_keys("pope", [])


def test_pictures_are_files(tmp_path):
    (tmp_path / "1.jpg").touch()
    there = [question("1", image=tmp_path / "1.jpg"), question("2", image=b"x"), question("3")]
    layouts.check_pictures("pope", there)
    gone = [question("4", image=tmp_path / "4.jpg"), question("5", video=tmp_path / "5.mp4")]
    layouts.check_pictures("pope", there + gone)  # the runner tells which
    with pytest.raises(InputError, match=r"none of 2 images.*4 \(.*4.jpg\), 5 \(.*5.mp4\)"):
        layouts.check_pictures("pope", gone)


def test_prompts_are_of_the_same_question():
    asked = [question("1"), question("2"), question("3")]
    same = {"1": answer("yes", "<image>\nIS 1?\nShort."), "2": answer("yes")}
    layouts.check_prompts("pope", asked, same)
    with pytest.raises(InputError, match=r"1 of 3 answers.*same id: 3"):
        layouts.check_prompts("pope", asked, same | {"3": answer("no", "Is 4?\nShort.")})
    same["3"] = answer("no", "Ist 3?")
    layouts.check_prompts("pope", asked, same, lambda text: text.replace("Ist", "Is"))


def test_all_questions_are_answered():
    layouts.check_all_answered("vqav2", [question("1")], {"1": answer("")})
    with pytest.raises(InputError, match=r"1 of 2 questions have no answer: 2"):
        layouts.check_all_answered("vqav2", [question("1"), question("2")], {"1": answer("x")})


def test_long_lists_are_cut():
    assert layouts.listed(["a", "b"]) == "a, b"
    assert layouts.listed([str(n) for n in range(10)], most=2) == "0, 1, ... (8 more)"
