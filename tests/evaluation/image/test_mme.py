"""MME: every golden figure in both layouts; the official tool's tables; pairs of questions."""

import re

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.image import mme
from tests.evaluation.image import golden_sets as golden


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_golden_figures(layout, tmp_path):
    expected = golden.expected("mme")
    tool = expected["mme_eval_tool"]
    questions, scores = golden.scored("mme", golden.folder("mme", layout, tmp_path))
    assert scores.headline == "official"
    for rule, name in (("official", "perception"), ("official_cognition", "cognition")):
        assert scores.rules[rule].value == pytest.approx(tool[name], **golden.CLOSE)
        lmms = expected["lmms_eval"][f"mme_{name}_score"]
        ours = scores.rules[rule.replace("official", "lmms_eval")].value
        assert ours == pytest.approx(lmms, **golden.CLOSE)
    subtasks = {
        **scores.rules["official"].details["subtasks"],
        **scores.rules["official_cognition"].details["subtasks"],
    }
    assert subtasks.keys() == tool["subtasks"].keys()
    for subtask, figures in tool["subtasks"].items():
        assert subtasks[subtask] == pytest.approx(figures, **golden.CLOSE)
    parts = scores.rules["official"].details["parts"]
    assert sum(parts.values()) == pytest.approx(tool["perception"])
    right = {**scores.rules["official"].items, **scores.rules["official_cognition"].items}
    by_place = {(q.gold["subtask"], q.gold["file"], q.gold["asked"]): q.key for q in questions}
    seen = 0
    for subtask, items in expected["per_item"].items():
        for item in items:
            key = by_place[subtask, item["file"], item["question"]]
            assert scores.parsed[key] == item["parsed"]
            assert right[key] == float(item["parsed"] == item["gt"])
            seen += 1
    assert seen == len(questions) == len(right)


def test_both_layouts_ask_the_same(tmp_path):
    llava, parquet = (
        {
            q.key: (q.text, q.prompt, q.gold)
            for q in mme.BENCHMARK.questions(golden.folder("mme", layout, tmp_path / layout))
        }
        for layout in golden.LAYOUTS
    )
    assert llava == parquet
    assert len(llava) == sum(map(len, golden.expected("mme")["per_item"].values()))


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_tables_for_the_official_tool(layout, tmp_path):
    place = golden.folder("mme", layout, tmp_path)
    found, questions, given = golden.joined("mme", place)
    written = found.submission(place, questions, given.answers, tmp_path / "out")
    golden_tables = golden.GOLDEN / "mme" / "expected_eval_tool_answers"
    assert {path.name for path in written} == {path.name for path in golden_tables.iterdir()}
    for path in written:
        assert path.read_text() == (golden_tables / path.name).read_text()


def test_tables_keep_their_shape_and_pairs(tmp_path):
    place = golden.folder("mme", "llava", tmp_path)
    lines = [{**line, "text": "Yes\tit\nis"} for line in golden.answer_lines("mme")]
    found, questions, given = golden.joined("mme", place, lines)
    apart = questions[::2] + questions[1::2]  # as processes that interleave would leave them
    for path in found.submission(place, apart, given.answers, tmp_path / "out"):
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        assert {len(row) for row in rows} == {4} and rows[0][3] == "Yes it is"
        assert [row[0] for row in rows[::2]] == [row[0] for row in rows[1::2]]
    del given.answers[questions[0].key]
    with pytest.raises(InputError, match=f"1 of {len(questions)} questions have no answer"):
        found.submission(place, questions, given.answers, tmp_path / "out")


def test_order_does_not_matter(tmp_path):
    place = golden.folder("mme", "llava", tmp_path)
    _, scores = golden.scored("mme", place, golden.answer_lines("mme")[::-1])
    perception = golden.expected("mme")["mme_eval_tool"]["perception"]
    assert scores.rules["official"].value == pytest.approx(perception, **golden.CLOSE)


@pytest.mark.parametrize(
    ("text", "official", "tolerant"),
    [
        ("Yes, there is", "yes", "yes"),
        ("Not sure", "no", "no"),
        ("know", "no", "no"),
        ("Snow", "no", "no"),
        ("eyes", "yes", "yes"),
        ("   yes", "other", "yes"),
        ("  Yes", "other", "yes"),
        ("Y", "other", "yes"),
        ("n.", "other", "no"),
        ("N.o", "other", "no"),
        ("I think yes", "other", "other"),
        ("", "other", "other"),
    ],
)
def test_readings(text, official, tolerant):
    assert mme.read_official(text) == official
    assert mme.read_tolerant(text) == tolerant


def test_a_missing_answer_is_wrong_and_counted(tmp_path):
    place, subtask = golden.folder("mme", "llava", tmp_path), "count"
    items = golden.expected("mme")["per_item"][subtask]
    file = items[0]["file"]
    gone = {
        q.question_id
        for q in mme.BENCHMARK.questions(place)
        if (q.gold["subtask"], q.gold["file"]) == (subtask, file)
    }
    lines = [line for line in golden.answer_lines("mme") if line["question_id"] not in gone]
    _, scores = golden.scored("mme", place, lines)
    rule = scores.rules["official"]
    found = rule.details["subtasks"][subtask]
    right = {}  # of the images that are left
    for item in items:
        if item["file"] != file:
            right.setdefault(item["file"], []).append(item["parsed"] == item["gt"])
    other = sum(item["parsed"] == "other" for item in items if item["file"] != file)
    n = len(items)
    assert (found["other_num"], found["n"], rule.details["missing"]) == (other + 2, n, 2)
    assert found["acc"] == pytest.approx(100 * sum(map(sum, right.values())) / n)
    assert found["acc_plus"] == pytest.approx(100 * sum(map(all, right.values())) / (n / 2))


def test_broken_data_is_refused(tmp_path):
    place = golden.folder("mme", "llava", tmp_path)
    asked, tree = place / "llava_mme.jsonl", place / "MME_Benchmark_release_version"
    whole, rows = asked.read_text(), golden.read_lines(asked)
    first = mme.BENCHMARK.questions(place)[0]
    subtask, file = first.gold["subtask"], first.gold["file"]

    def refused(message):
        with pytest.raises(InputError, match=message):
            mme.BENCHMARK.questions(place)
        asked.write_text(whole)

    def rewritten(**changes):
        """The lines of the first image with these changes."""
        picture = rows[0]["image"]
        golden.rewrite_lines(asked, lambda row: row | changes if row["image"] == picture else row)

    asked.write_text("".join(whole.splitlines(keepends=True)[1:]))
    refused(f"1 images have not two questions: {subtask}/{file}")
    asked.write_text(whole + whole.splitlines()[0] + "\n")
    refused(f"1 questions appear twice: {re.escape(first.key)}")
    rewritten(text="Is there nothing?")
    refused(f"{subtask} has no answer to 'Is there nothing")
    rewritten(image="fame/images/0001.png")
    refused("'fame/images/0001.png' is not")
    (text,) = (tree / subtask).rglob(file)
    text.write_text(text.read_text().replace("\tYes", "\tMaybe"))
    refused(f"{file}: the answer is 'Maybe'")
    text.unlink()
    refused(f"{file} cannot be read")


def test_pictures_are_where_the_tree_has_them(tmp_path):
    place = golden.folder("mme", "llava", tmp_path)
    tree = place / "MME_Benchmark_release_version"
    pictures = [tree / row["image"] for row in golden.read_lines(place / "llava_mme.jsonl")]
    assert [question.image for question in mme.BENCHMARK.questions(place)] == pictures
