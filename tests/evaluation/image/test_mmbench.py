"""MMBench: every golden figure in both layouts, prompts as pandas makes them, the upload."""

import json
import re
import zipfile
from xml.etree import ElementTree

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import benchmark, layouts
from llava_mini_jax.evaluation.image import mmbench
from llava_mini_jax.evaluation.run import answers
from tests.evaluation.image import golden_sets as golden

TABLE = "mmbench_dev_20230712.tsv"
ABILITIES = {
    "attribute_reasoning": "AR",
    "coarse_perception": "CP",
    "finegrained_perception (cross-instance)": "FP-C",
    "finegrained_perception (instance-level)": "FP-S",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
}


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_golden_figures(layout, tmp_path):
    expected = golden.expected("mmbench")
    ours, lmms = expected["vlmevalkit_exact_matching"], expected["lmms_eval_static"]
    questions, scores = golden.scored("mmbench", golden.folder("mmbench", layout, tmp_path))
    rules = scores.rules
    assert scores.headline == "letter" and len(questions) == expected["n_rows"]
    circular = rules["circular"]
    assert circular.value == pytest.approx(100 * ours["circular_overall"], **golden.CLOSE)
    assert circular.items == ours["circular_hit_per_question"]
    groups = {k: 100 * v for k, v in ours["circular_groups"].items()}
    found = circular.details["parts"] | circular.details["categories"]
    assert found == pytest.approx(groups, **golden.CLOSE)
    extracted = scores.readings["circular"]
    assert {k: v or None for k, v in extracted.items()} == ours["extracted_option_per_row"]
    assert set(scores.unparsed) == {k for k, v in scores.parsed.items() if not v}
    vanilla = rules["vanilla"]
    assert vanilla.value == pytest.approx(100 * ours["vanilla_first_pass"], **golden.CLOSE)
    assert len(vanilla.items) == expected["n_questions"]
    assert rules["lmms_eval"].value == pytest.approx(100 * lmms["overall"], **golden.CLOSE)
    by_ability = {ABILITIES[k]: 100 * v for k, v in lmms["l2_category"].items()}
    assert rules["lmms_eval"].details["parts"] == pytest.approx(by_ability, **golden.CLOSE)
    by_category = {k: 100 * v for k, v in lmms["category"].items()}
    assert rules["lmms_eval"].details["categories"] == pytest.approx(by_category, **golden.CLOSE)


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_prompts_and_lines_are_llavas(layout, tmp_path):
    found, questions, _ = golden.joined("mmbench", golden.folder("mmbench", layout, tmp_path))
    prompts = golden.expected("mmbench")["prompts"]
    assert {q.key: q.prompt for q in questions} == prompts
    assert all(q.text == q.prompt + layouts.LETTER for q in questions)
    for question, line in zip(questions, golden.answer_lines("mmbench"), strict=True):
        ours = answers.line_of(question, line["text"], answer_id="a", model_id="m", cut=False)
        same = ("question_id", "round_id", "prompt", "text", "options", "option_char")
        assert {k: ours[k] for k in same} == {k: line[k] for k in same}
    assert all(q.image.startswith(b"\x89PNG") for q in questions)
    assert found.max_new_tokens == 1024


def test_both_layouts_hold_the_same(tmp_path):
    llava, parquet = (
        {q.key: (q.question_id, q.text, q.record, q.gold) for q in questions}
        for questions in (
            golden.joined("mmbench", golden.folder("mmbench", layout, tmp_path / layout))[1]
            for layout in golden.LAYOUTS
        )
    )
    assert llava == parquet


def cells(path):
    """Rows of a sheet, as a reader of the format sees them: a dict from columns to values."""
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        tree = ElementTree.fromstring(file.read("xl/worksheets/sheet1.xml"))
    rows = []
    for row in tree.iter(f"{space}row"):
        rows.append({})
        for cell in row.iter(f"{space}c"):
            text = "".join(t.text or "" for t in cell.iter(f"{space}t"))
            number = cell.findtext(f"{space}v")
            if value := text if number is None else int(number):
                rows[-1][re.sub("[0-9]", "", cell.get("r"))] = value
    return rows


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_the_sheet_is_llavas(layout, tmp_path):
    place = golden.folder("mmbench", layout, tmp_path)
    found, questions, given = golden.joined("mmbench", place)
    [path] = found.submission(place, questions, given.answers, tmp_path / "out")
    ours = cells(path)
    assert ours == cells(golden.GOLDEN / "mmbench" / "expected_upload.xlsx")
    table = json.loads((golden.GOLDEN / "mmbench" / "expected_upload_table.json").read_text())
    assert list(ours[0].values()) == table["columns"]
    wanted = [{"ABCDEFGHI"[i]: v for i, v in enumerate(row) if v != ""} for row in table["rows"]]
    assert ours[1:] == wanted
    first = path.read_bytes()
    found.submission(place, questions, given.answers, tmp_path / "out")
    assert path.read_bytes() == first
    some = dict(list(given.answers.items())[:-1])
    message = f"1 of {len(questions)} questions have no answer: {questions[-1].key}"
    with pytest.raises(InputError, match=message):
        found.submission(place, questions, some, tmp_path / "out")


def test_any_text_stands_in_the_sheet(tmp_path):
    lines = golden.answer_lines("mmbench")
    texts = ["=1+1", '<b> & "c"', " two\nlines ", "bell\x07 gone", "猫 \N{GRINNING FACE}"]
    lines = [{**a, "text": t} for a, t in zip(lines, texts, strict=False)] + lines[len(texts) :]
    place = golden.folder("mmbench", "llava", tmp_path)
    found, questions, given = golden.joined("mmbench", place, lines)
    [path] = found.submission(place, questions, given.answers, tmp_path / "out")
    said = [row["G"] for row in cells(path)[1:6]]
    assert said == [*texts[:3], "bell gone", texts[4]]


def test_chinese_instruction(tmp_path):
    place = golden.folder("mmbench", "llava", tmp_path)
    (place / TABLE).rename(place / "mmbench_dev_cn_20231003.tsv")
    found = benchmark.find("mmbench_cn")
    questions = found.questions(place)
    assert questions[0].text == questions[0].prompt + "\n请直接回答选项字母。"
    with pytest.raises(InputError, match=r"mmbench: there is no .*mmbench_dev_20230712.tsv; get"):
        benchmark.find("mmbench").questions(place)


def test_a_missing_answer_makes_its_question_wrong(tmp_path):
    place, expected = golden.folder("mmbench", "llava", tmp_path), golden.expected("mmbench")
    hits = expected["vlmevalkit_exact_matching"]["circular_hit_per_question"]
    right = next(key for key, hit in hits.items() if hit)
    second = 1_000_000 + int(right)  # its second pass
    lines = [a for a in golden.answer_lines("mmbench") if a["question_id"] != second]
    _, scores = golden.scored("mmbench", place, lines)
    circular = scores.rules["circular"]
    assert circular.items == {**hits, right: 0} and circular.details["missing"] == 1
    assert scores.rules["vanilla"].items[right] == 1


def rewritten(tmp_path, change):
    """The golden table with `change` applied to its lines' cells."""
    place = golden.folder("mmbench", "llava", tmp_path)
    lines = (place / TABLE).read_text(encoding="utf-8").split("\n")
    rows = [line.split("\t") for line in lines if line]
    change(rows)
    text = "".join("\t".join(row) + "\n" for row in rows)
    (place / TABLE).write_text(text, encoding="utf-8")
    return place


def test_pictures_named_by_another_rows_index(tmp_path):
    def change(rows):
        for row in rows[1:]:
            if int(row[0]) > 1_000_000:
                row[9] = str(int(row[0]) % 1_000_000)

    place = rewritten(tmp_path, change)
    pictures = {q.key: q.image for q in mmbench.BENCHMARKS[0].questions(place)}
    for key, picture in pictures.items():
        assert picture == pictures[str(int(key) % 1_000_000)] and picture.startswith(b"\x89PNG")


def test_options_end_at_what_llava_takes_for_none(tmp_path):
    def change(rows):
        rows[3][2:7] = ["", "7", "train", "apple", ""]
        for row, option in zip(rows[4:9], ("none", "NAN", "n/a", "na", "Nothing"), strict=True):
            row[2:7] = ["nONE", "cat", option, "dog", "train"]

    place = rewritten(tmp_path, change)
    questions = mmbench.BENCHMARKS[0].questions(place)
    counts = [len(q.record["options"]) for q in questions[3:8]]
    assert counts == [1, 1, 1, 4, 4]
    assert all("one\n" not in q.prompt for q in questions[3:7])  # nor is that a hint
    # The scorer reads the cells with pandas, to which only "n/a" is empty.
    said = [mmbench.read_vlmevalkit(q.gold, "B") for q in questions[3:8]]
    assert said == ["B", "B", "", "B", "B"]
    assert mmbench.read_lmms(questions[2].gold, "banana") == "D"  # an empty cell is "nan" to it
    assert mmbench.read_lmms({"options": {"A": "cat ", "B": None}}, "a cat ") == ""


def test_long_pictures_are_read(tmp_path):
    def change(rows):
        rows[1][9] = "AAAA" * 100_000

    questions = mmbench.BENCHMARKS[0].questions(rewritten(tmp_path, change))
    assert questions[0].image == bytes(300_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].__setitem__(9, "picture"), 'row 1: "image" is nothing'),
        (
            lambda rows: rows[1].__setitem__(9, "AB"),
            r"row 1 \({first}\): the image is not base64",
        ),
        (lambda rows: rows[1].__setitem__(9, "AA\x01AA="), r"row 1 \({first}\): .* is not base64"),
        (lambda rows: rows[1].__setitem__(9, ""), r"row 1 \({first}\): there is no image"),
        (lambda rows: rows[1].__setitem__(0, "x"), "row 1: the index is 'x'"),
        (lambda rows: rows[1].__setitem__(7, ""), "answer of row {first} is ''; expected A to D"),
        (lambda rows: rows.append(rows[1]), "mmbench: 1 questions appear twice: {first}"),
        (lambda rows: rows.pop(1), "rows are passes of a missing question: 1{first:0>6}"),
        (lambda rows: rows.__delitem__(slice(1, None)), "hold no question"),
        (lambda rows: rows[3].__delitem__(slice(5, None)), 'row 3: "answer" is None'),
    ],
)
def test_broken_tables_are_refused(change, message, tmp_path):
    first = (golden.GOLDEN / "mmbench" / TABLE).read_text(encoding="utf-8").split("\n")[1]
    place = rewritten(tmp_path, change)
    with pytest.raises(InputError, match=message.format(first=first.split("\t")[0])):
        mmbench.BENCHMARKS[0].questions(place)


def test_broken_parquet_is_refused(tmp_path):
    place = golden.folder("mmbench", "parquet", tmp_path)
    path = place / "snapshot" / "en" / "dev-00000-of-00001.parquet"
    golden.rewrite_parquet(path, lambda table: table.drop_columns(["category"]))
    with pytest.raises(InputError, match=r"no column category"):
        mmbench.BENCHMARKS[0].questions(place)
