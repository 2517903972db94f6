"""GQA: every golden figure in both layouts; the predictions file; files that do not fit."""

import json
import re

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.image import gqa
from tests.evaluation.image import golden_sets as golden


def printed(expected):
    """The official script's lines: heading -> name -> (figure, number of questions)."""
    tables, heading = {}, ""
    for line in expected["gqa_official"]["stdout"]:
        if line.startswith("Accuracy / "):
            heading = line.removeprefix("Accuracy / ").removesuffix(":")
        elif row := re.match(r"  (\S+): ([0-9.]+)% \(([0-9]+) questions\)", line):
            tables.setdefault(heading, {})[row[1]] = (row[2], int(row[3]))
    return tables


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_golden_figures(layout, tmp_path):
    expected = golden.expected("gqa")
    _, scores = golden.scored("gqa", golden.folder("gqa", layout, tmp_path))
    assert scores.headline == "official"
    for rule, figures, items in (
        ("official", expected["gqa_official"], "per_item_exact_match"),
        ("lmms_eval", expected["lmms_eval_exact_match"], "per_item"),
    ):
        ours = scores.rules[rule]
        assert ours.value == pytest.approx(figures["accuracy_percent"], **golden.CLOSE)
        assert ours.items == figures[items]
    official = scores.rules["official"]
    details = official.details
    for name, text in expected["gqa_official"]["metrics_as_printed"].items():
        figure = {**details, "accuracy": official.value}[name.lower()]
        assert f"{figure:.2f}" == re.match("[0-9.]+", text)[0]
    tables = printed(expected)
    assert tables.keys() == {"structural type", "semantic type", "steps number", "words number"}
    for heading, rows in tables.items():
        if heading == "steps number" and layout == "parquet":
            assert heading not in details  # the files lack the questions' programs
            continue
        ours = {k: (f"{v['accuracy']:.2f}", v["n"]) for k, v in details[heading].items()}
        assert ours == rows


def test_both_layouts_ask_the_same_balanced_questions(tmp_path):
    llava, parquet = (
        {
            q.key: (q.question_id, q.text, q.prompt, q.gold["answer"])
            for q in gqa.BENCHMARK.questions(golden.folder("gqa", layout, tmp_path / layout))
            if q.gold["isBalanced"]
        }
        for layout in golden.LAYOUTS
    )
    assert llava == parquet and len(llava) == golden.expected("gqa")["n_balanced"]


def test_predictions_file(tmp_path):
    place = golden.folder("gqa", "llava", tmp_path)
    found, questions, given = golden.joined("gqa", place)
    (path,) = found.submission(place, questions, given.answers, tmp_path / "out")
    name = "testdev_balanced_predictions.json"
    assert path.name == name
    golden_rows = json.loads((golden.GOLDEN / "gqa" / f"expected_{name}").read_text())
    assert json.loads(path.read_text()) == golden_rows
    gone = questions[3].key
    del given.answers[gone]
    message = f"1 of {len(questions)} questions have no answer: {gone}"
    with pytest.raises(InputError, match=message):
        found.submission(place, questions, given.answers, tmp_path / "out")


def test_only_periods_at_the_end_and_capitals_are_taken_off():
    assert gqa.converted("T-Shirt..") == "t-shirt"
    assert gqa.converted("U.S. ") == "u.s. "
    assert gqa.converted(".5.") == ".5"


def test_the_questions_file_may_be_where_gqa_has_it(tmp_path):
    place = golden.folder("gqa", "llava", tmp_path)
    before = gqa.BENCHMARK.questions(place)
    (place / "data").mkdir()
    file = "testdev_balanced_questions.json"
    (place / file).rename(place / "data" / file)
    assert gqa.BENCHMARK.questions(place) == before
    (place / "data" / file).unlink()
    with pytest.raises(
        InputError, match=f"there is no .*data/{file}; get it from questions1.2.zip"
    ):
        gqa.BENCHMARK.questions(place)


def test_distribution_is_zero_for_right_answers_only(tmp_path):
    place = golden.folder("gqa", "llava", tmp_path)
    questions = gqa.BENCHMARK.questions(place)
    assert gqa._distribution(questions, {q.key: q.gold["answer"] for q in questions}) == 0
    # One group, two answers expected twice each, one of them given four times: chi is 2 + 2.
    few, said = questions[:4], {}
    for number, question in enumerate(few):
        question.gold.update(groups={"global": "color"}, answer=("red", "blue")[number % 2])
        said[question.key] = "red"
    assert gqa._distribution(few, said) == pytest.approx(4 / 100)


def test_a_missing_answer_is_wrong_and_counted(tmp_path):
    items = golden.expected("gqa")["gqa_official"]["per_item_exact_match"]
    right = [key for key, item in items.items() if item]
    lines = [line for line in golden.answer_lines("gqa") if line["question_id"] != right[0]]
    _, scores = golden.scored("gqa", golden.folder("gqa", "llava", tmp_path), lines)
    rule = scores.rules["official"]
    assert rule.value == pytest.approx(100 * (len(right) - 1) / len(items))
    assert rule.items[right[0]] == 0
    assert rule.details["missing"] == 1 == scores.rules["lmms_eval"].details["missing"]


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    place = golden.folder("gqa", "llava", tmp_path)
    asked = place / "llava_gqa_testdev_balanced.jsonl"
    whole = asked.read_text()
    # A question that is not balanced may be left out.
    first = next(q.key for q in gqa.BENCHMARK.questions(place) if q.gold["isBalanced"])

    def refused(change, message):
        golden.rewrite_lines(asked, lambda row: change(row) if row["question_id"] == first else row)
        with pytest.raises(InputError, match=message):
            gqa.BENCHMARK.questions(place)
        asked.write_text(whole)

    refused(lambda row: None, f"1 questions are in one of .* only: {first}")
    other = {"question_id": "77"}
    refused(lambda row: row | other, f"2 questions are in one of .* only: 77, {first}")
    asked.write_text(whole + whole.splitlines()[1])
    second = json.loads(whole.splitlines()[1])["question_id"]
    with pytest.raises(InputError, match=f"1 questions appear twice: {second}"):
        gqa.BENCHMARK.questions(place)
    asked.write_text(whole)
    golds = place / "testdev_balanced_questions.json"
    golds.write_text(golds.read_text().replace('"structural"', '"structure"'))
    with pytest.raises(InputError, match=r'types of question \S+: "structural" is nothing'):
        gqa.BENCHMARK.questions(place)


def test_a_parquet_question_without_its_picture_is_refused(tmp_path):
    place = golden.folder("gqa", "parquet", tmp_path)
    path = next(place.rglob("testdev_balanced_images/*.parquet"))
    first = gqa.BENCHMARK.questions(place)[0]
    lost = [q.key for q in gqa.BENCHMARK.questions(place) if q.image == first.image]

    def without(table):
        rows = [row for row in table.to_pylist() if row["image"]["bytes"] != first.image]
        return table.from_pylist(rows, schema=table.schema)

    golden.rewrite_parquet(path, without)
    message = f"{len(lost)} questions have no image.*: {first.key}"
    with pytest.raises(InputError, match=message):
        gqa.BENCHMARK.questions(place)
