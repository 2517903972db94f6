"""SEED-Bench: every golden figure in both layouts; the paper's figure is the total."""

import json
import random

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.image import seed_bench
from tests.evaluation.image import golden_sets as golden
from tests.evaluation.image.test_broken_data import break_file

ASKED, LABELS = "llava-seed-bench.jsonl", "SEED-Bench.json"


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_golden_figures(layout, tmp_path):
    expected = golden.expected("seed_bench")
    questions, scores = golden.scored("seed_bench", golden.folder("seed_bench", layout, tmp_path))
    llava, first = scores.rules["llava"], scores.rules["first_character"]
    assert scores.headline == "letter" and len(questions) == len(expected["llava"]["per_item"])
    assert llava.value == pytest.approx(expected["llava"]["total_percent"], **golden.CLOSE)
    assert llava.items == expected["llava"]["per_item"]
    for kind in ("image", "video"):
        percent = expected["llava"][f"{kind}_percent"]
        assert llava.details["parts"][kind] == pytest.approx(percent, **golden.CLOSE)
        fraction = expected["lmms_eval_fraction"][f"seed_{kind}"]
        assert first.details["parts"][kind] == pytest.approx(100 * fraction, **golden.CLOSE)
    fraction = expected["lmms_eval_fraction"]["seed_all"]
    assert first.value == pytest.approx(100 * fraction, **golden.CLOSE)
    printed = dict(line.split(": ") for line in expected["llava"]["stdout"])
    ours = {name: f"{value:.2f}%" for name, value in llava.details["parts"].items()}
    ours |= {f"{kind} accuracy": ours.pop(kind) for kind in ("image", "video")}
    assert ours | {"Total accuracy": f"{llava.value:.2f}%"} == printed


def test_both_layouts_ask_the_same(tmp_path):
    llava, parquet = (
        {
            q.key: (q.question_id, q.text, q.prompt, q.gold)
            for q in seed_bench.BENCHMARK.questions(golden.folder("seed_bench", layout, tmp_path))
        }
        for layout in golden.LAYOUTS
    )
    assert llava == parquet
    assert llava.keys() == golden.expected("seed_bench")["llava"]["per_item"].keys()
    rows = golden.answer_lines("seed_bench")
    assert {r["question_id"]: r["prompt"] for r in rows} == {a: c for a, _, c, _ in llava.values()}


def test_pictures_of_both_layouts(tmp_path):
    place = golden.folder("seed_bench", "llava", tmp_path)
    found = {q.key: q.image for q in seed_bench.BENCHMARK.questions(place)}
    named = {str(row["question_id"]): row["image"] for row in golden.read_lines(place / ASKED)}
    assert found == {key: place / name for key, name in named.items()}
    inner = place / "SEED-Bench"  # where the release wants labels and images
    inner.mkdir()
    (place / LABELS).rename(inner / LABELS)
    found = {q.key: q.image for q in seed_bench.BENCHMARK.questions(place)}
    assert found == {key: inner / name for key, name in named.items()}
    place = golden.folder("seed_bench", "parquet", tmp_path / "other")
    path = next(place.rglob("*.parquet"))

    def frames(table):
        rows = table.to_pylist()
        for row in rows:
            row["image"] = [{"bytes": str(i).encode(), "path": ""} for i in range(8)]
        return table.from_pylist(rows, schema=table.schema)

    golden.rewrite_parquet(path, frames)
    assert {q.image for q in seed_bench.BENCHMARK.questions(place)} == {b"4"}  # the middle one


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_submission_is_llavas(layout, tmp_path):
    place = golden.folder("seed_bench", layout, tmp_path)
    found, questions, given = golden.joined("seed_bench", place)
    [path] = found.submission(place, questions, given.answers, tmp_path / "out")
    wanted = (golden.GOLDEN / "seed_bench" / "expected_upload.jsonl").read_text()
    assert path.read_text() == wanted
    last = questions[-1].key
    some = {key: answer for key, answer in given.answers.items() if key != last}
    with pytest.raises(InputError, match=f"1 of {len(questions)} questions have no answer: {last}"):
        found.submission(place, questions, some, tmp_path / "out")


def test_a_missing_answer_and_a_type_without_a_right_one(tmp_path):
    place = golden.folder("seed_bench", "llava", tmp_path)
    types = {q.key: q.gold["type"] for q in seed_bench.BENCHMARK.questions(place)}
    items = golden.expected("seed_bench")["llava"]["per_item"]
    gone, odd = next((key, types[key]) for key, item in items.items() if item)
    unread = {key for key, kind in types.items() if kind == odd}
    lines = [
        {**line, "text": "?"} if str(line["question_id"]) in unread else line
        for line in golden.answer_lines("seed_bench")
        if str(line["question_id"]) != gone
    ]
    _, scores = golden.scored("seed_bench", place, lines)
    rule = scores.rules["llava"]
    left = {key: item * (key not in unread) for key, item in items.items()}
    assert rule.items == left and rule.details["missing"] == 1
    assert rule.details["parts"][odd] == 0
    assert rule.value == pytest.approx(100 * sum(left.values()) / len(left), **golden.CLOSE)
    assert unread - {gone} <= set(scores.unparsed) and gone not in scores.parsed


def relabelled(tmp_path, change):
    place = golden.folder("seed_bench", "llava", tmp_path)
    labels = json.loads((place / LABELS).read_text())
    change(labels["questions"])
    (place / LABELS).write_text(json.dumps(labels))
    return place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(0), "1 questions are in only one of .*: {first}"),
        (lambda rows: rows[0].update(question_id="7"), "2 questions are .*: 7, {first}"),
        (lambda rows: rows[0].pop("choice_d"), 'question 0: "choice_d" is nothing'),
        (lambda rows: rows[0].update(answer="E"), "question {first} has .* answer 'E'"),
        (lambda rows: rows[0].update(question_type_id=13), "question {first} has the type 13"),
        (lambda rows: rows[0].update(data_type="audio"), "data_type 'audio'"),
    ],
)
def test_broken_labels_are_refused(change, message, tmp_path):
    path = golden.GOLDEN / "seed_bench" / LABELS
    first = json.loads(path.read_text())["questions"][0]["question_id"]
    with pytest.raises(InputError, match=message.format(first=first)):
        seed_bench.BENCHMARK.questions(relabelled(tmp_path, change))


def test_broken_questions_and_pictures_are_refused(tmp_path):
    place = golden.folder("seed_bench", "llava", tmp_path)
    text = (place / ASKED).read_text()
    (place / ASKED).write_text(text + text.splitlines()[0] + "\n")
    first = json.loads(text.splitlines()[0])["question_id"]
    with pytest.raises(InputError, match=f"question {first} appears twice"):
        seed_bench.BENCHMARK.questions(place)
    golden.rewrite_lines(place / ASKED, lambda row: {k: v for k, v in row.items() if k != "image"})
    with pytest.raises(InputError, match=r'line 1: "image" is nothing'):
        seed_bench.BENCHMARK.questions(place)
    place = golden.folder("seed_bench", "parquet", tmp_path / "other")

    def without(table):
        rows = table.to_pylist()
        rows[2]["image"] = []
        return table.from_pylist(rows, schema=table.schema)

    third = seed_bench.BENCHMARK.questions(place)[2].key
    golden.rewrite_parquet(next(place.rglob("*.parquet")), without)
    with pytest.raises(InputError, match=f"seed_bench: {third} has no image"):
        seed_bench.BENCHMARK.questions(place)


def test_files_broken_at_random(tmp_path):
    place, rng, refused = golden.folder("seed_bench", "llava", tmp_path), random.Random(0), 0
    n = len(seed_bench.BENCHMARK.questions(place))
    for _ in range(60):
        path = place / rng.choice((ASKED, LABELS))
        whole = path.read_bytes()
        break_file(path, rng)
        try:
            _, scores = golden.scored("seed_bench", place)
            assert len(scores.rules["llava"].items) == n
        except InputError:
            refused += 1
        path.write_bytes(whole)
    assert refused > 20
