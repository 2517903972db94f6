"""MME: every golden figure in both layouts; the official tool's tables; pairs of questions."""

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
    assert llava == parquet and len(llava) == 76


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
    with pytest.raises(InputError, match=r"1 of 76 questions have no answer"):
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
    place = golden.folder("mme", "llava", tmp_path)
    lines = golden.answer_lines("mme")
    kept = [line for line in lines if line["question_id"] != "count/0001.png"]
    _, scores = golden.scored("mme", place, kept)
    rule = scores.rules["official"]
    count = rule.details["subtasks"]["count"]
    assert (count["acc"], count["acc_plus"], count["other_num"], count["n"]) == (50, 50, 2, 4)
    assert rule.details["missing"] == 2


def test_broken_data_is_refused(tmp_path):
    place = golden.folder("mme", "llava", tmp_path)
    asked, tree = place / "llava_mme.jsonl", place / "MME_Benchmark_release_version"
    whole = asked.read_text()

    def refused(message):
        with pytest.raises(InputError, match=message):
            mme.BENCHMARK.questions(place)
        asked.write_text(whole)

    asked.write_text("".join(whole.splitlines(keepends=True)[1:]))
    refused("1 pictures have not two questions: celebrity/0001.txt")
    asked.write_text(whole + whole.splitlines()[0] + "\n")
    refused("1 questions stand twice: celebrity/0001.png: Is there thing 0")
    asked.write_text(whole.replace("thing 0 of celebrity", "nothing of celebrity"))
    refused("celebrity has no answer to 'Is there nothing of celebrity")
    asked.write_text(whole.replace("celebrity/images/0001.png", "fame/images/0001.png"))
    refused("'fame/images/0001.png' is not")
    text = tree / "OCR" / "0001.txt"
    text.write_text(text.read_text().replace("\tYes", "\tMaybe"))
    refused("0001.txt: the answer is 'Maybe'")
    text.unlink()
    refused("0001.txt cannot be read")


def test_pictures_are_where_the_tree_has_them(tmp_path):
    place = golden.folder("mme", "llava", tmp_path)
    questions = mme.BENCHMARK.questions(place)
    tree = place / "MME_Benchmark_release_version"
    assert questions[0].image == tree / "celebrity" / "images" / "0001.png"
