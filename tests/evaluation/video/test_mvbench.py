"""MVBench: every golden figure and prompt; videos under any of the release's suffixes."""

import json
import random
import shutil

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.run import answers
from llava_mini_jax.evaluation.video import mvbench
from tests.evaluation.image.golden_sets import CLOSE, GOLDEN, expected
from tests.evaluation.image.test_broken_data import break_file

TITLES = {task.name: task.title for task in mvbench.TASKS}


def folder(name, tmp_path):
    return shutil.copytree(GOLDEN / name, tmp_path / name)


def lines(name, text="pred"):
    """The golden predictions as an answers file, told apart by their number alone."""
    rows = [json.loads(line) for line in (GOLDEN / name / "predictions.jsonl").open()]
    return [{"question_id": n, "text": row[text]} for n, row in enumerate(rows)]


def scored(name, place, given):
    found = benchmark.find(name)
    questions = found.questions(place)
    joined = answers.join(found, questions, given)
    return questions, found.score(place, questions, joined.answers)


def right_by_all(wanted, *rules):
    """Where a golden prediction is right by all of these rules: its place, what is recorded."""
    items = enumerate(wanted["per_item"])
    return next((n, item) for n, item in items if all(item[rule] for rule in rules))


def unread(item):
    """No letter is in the text, so the release takes A; or the video could not be read: "N/A"."""
    return item["llava_mini_first_letter"] not in item["pred"] or item["pred"] == "N/A"


def test_golden_figures(tmp_path):
    wanted = expected("mvbench")
    questions, scores = scored("mvbench", folder("mvbench", tmp_path), lines("mvbench"))
    rules = scores.rules
    assert [q.text for q in questions] == [item["prompt"] for item in wanted["per_item"]]
    for question, item in zip(questions, wanted["per_item"], strict=True):
        assert question.key.split("/")[0] == item["task"]
        assert f"({question.gold['letter']}) {question.gold['answer']}" == item["gt"]
        for rule, name in (
            ("release_option", "llava_mini_option_rule"),
            ("release_first_letter", "llava_mini_first_letter_acc"),
            ("notebook", "official_notebook"),
            ("lmms_eval", "lmms_eval"),
        ):
            assert rules[rule].items[question.key] == item[name], (rule, item)
        if scores.readings["first_letter"][question.key]:
            assert scores.readings["first_letter"][question.key] == item["llava_mini_first_letter"]

    def parts(rule, figures):
        named = {TITLES.get(name, name): value for name, value in figures.items()}
        for title in TITLES.values():
            part = rules[rule].details["parts"][title]
            assert part == pytest.approx(named[title], **CLOSE), (rule, title)

    release = wanted["llava_mini"]
    option = release["per_task_option_rule_percent"]
    first = release["per_task_first_letter_percent"]
    parts("release_option", option)
    assert rules["release_option"].value == pytest.approx(option["Avg"], **CLOSE)
    parts("release_first_letter", first)
    assert rules["release_first_letter"].value == pytest.approx(first["macro_avg"], **CLOSE)
    micro = rules["release_first_letter"].details["over_all_questions"]
    assert micro == pytest.approx(first["micro_avg"], **CLOSE)
    parts("notebook", wanted["official_notebook"]["per_task_percent"])
    notebook = wanted["official_notebook"]["Avg_micro"]
    assert rules["notebook"].value == pytest.approx(notebook, **CLOSE)
    parts("lmms_eval", wanted["lmms_eval"]["per_task_percent"])
    assert rules["lmms_eval"].value == pytest.approx(wanted["lmms_eval"]["group_mean"], **CLOSE)
    empty = sum(item["pred"] == "" for item in wanted["per_item"])
    assert rules["lmms_eval"].details["left_out"] == empty


def test_the_first_letter_takes_none_for_wrong(tmp_path):
    wanted = expected("mvbench")["per_item"]
    questions, scores = scored("mvbench", folder("mvbench", tmp_path), lines("mvbench"))
    headline = scores.rules["first_letter"]
    assert scores.headline == "letter"
    right = {title: [] for title in TITLES.values()}
    for question, item in zip(questions, wanted, strict=True):
        right[TITLES[item["task"]]].append(item["llava_mini_first_letter_acc"] and not unread(item))
        assert headline.items[question.key] == right[TITLES[item["task"]]][-1], item
        assert (not scores.readings["first_letter"][question.key]) == unread(item)
    assert headline.details["unread_videos"] == sum(item["pred"] == "N/A" for item in wanted)
    parts = headline.details["parts"]
    means = {title: 100 * sum(own) / len(own) for title, own in right.items()}
    assert {title: parts[title] for title in means} == pytest.approx(means, **CLOSE)
    assert list(parts)[:2] == ["Action", "Object"] and len(parts) == 29
    members = ("Object Existence", "Object Interaction", "Object Shuffle")
    assert parts["Object"] == pytest.approx(sum(parts[m] for m in members) / 3, **CLOSE)
    assert headline.value == pytest.approx(sum(parts[t] for t in TITLES.values()) / 20, **CLOSE)


def test_groups_are_the_papers():
    members = [title for group in mvbench.GROUPS.values() for title in group]
    # Appendix H's accuracies of these tasks, whose means table 3 prints.
    tasks = [44.5, 44.5, 76, 37, 58.5, 50, 50, 29.5, 31, 32.5, 85.5, 35, 40, 48, 41, 29.5, 52]
    accuracy = dict(zip(members, [*tasks, 31, 38, 36], strict=True))
    means = [sum(map(accuracy.get, own)) / len(own) for own in mvbench.GROUPS.values()]
    table_3 = [52.1, 43.2, 31.8, 85.5, 37.5, 44.5, 29.5, 52.0, 35.0]
    assert means == pytest.approx(table_3, abs=0.051)  # printed with one decimal
    assert sorted(members) == sorted(TITLES.values())
    average = sum(accuracy.values()) / 20
    assert average == pytest.approx(mvbench.BENCHMARK.paper["LLaVA-Mini 7B"], abs=0.05)


def test_a_missing_answer_is_wrong_and_counted(tmp_path):
    wanted, given = expected("mvbench"), lines("mvbench")
    rules = ("llava_mini_option_rule", "llava_mini_first_letter_acc", "lmms_eval")
    n, gone = right_by_all(wanted, *rules)
    given.pop(n)
    questions, scores = scored("mvbench", folder("mvbench", tmp_path), given)
    for name, rule in scores.rules.items():
        assert rule.items[questions[n].key] == 0 and len(rule.items) == len(questions), name
    assert scores.rules["first_letter"].details["missing"] == 1
    own = [i for i in wanted["per_item"] if i["task"] == gone["task"]]
    right = sum(i["llava_mini_option_rule"] for i in own) - 1
    percent = scores.rules["release_option"].details["parts"][TITLES[gone["task"]]]
    assert percent == pytest.approx(100 * right / len(own), **CLOSE)
    empty = sum(item["pred"] == "" for item in wanted["per_item"])
    assert scores.rules["lmms_eval"].details["left_out"] == empty


def test_videos_are_found_with_other_suffixes_and_as_folders(tmp_path):
    place = folder("mvbench", tmp_path)
    for task, count in (("action_sequence", 2), ("episodic_reasoning", 1), ("object_shuffle", 1)):
        path = place / "json" / f"{task}.json"
        rows = json.loads(path.read_text())[:1] * count
        path.write_text(json.dumps([{**r, "video": f"{n}.mp4"} for n, r in enumerate(rows)]))
    for name in (
        "star/Charades_v1_480/0.mkv",
        "star/Charades_v1_480/1.mp4",
        "star/Charades_v1_480/1.avi",
        "tvqa/frames_fps3_hq/0.mp4/00001.jpg",
    ):
        (place / "video" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "video" / name).touch()
    questions = {q.key: q for q in mvbench.BENCHMARK.questions(place)}
    found = {key: str(q.video.relative_to(place / "video")) for key, q in questions.items()}
    assert found["action_sequence/0"] == "star/Charades_v1_480/0.mkv"
    assert found["action_sequence/1"] == "star/Charades_v1_480/1.mp4"
    assert questions["episodic_reasoning/0"].video.is_dir()
    assert found["object_shuffle/0"] == "perception/videos/0.mp4"  # as it is named
    assert mvbench.BENCHMARK.max_frames == 1000


def test_prompts_end_with_no_blanks_of_the_last_option(tmp_path):
    place = folder("mvbench", tmp_path)
    path = place / "json" / "action_sequence.json"
    rows = json.loads(path.read_text())
    rows[0].update(question=" Who? ", candidates=["a ", "b. \n"], answer="a ")
    path.write_text(json.dumps(rows))
    text = mvbench.BENCHMARK.questions(place)[0].text
    assert text == "Question:  Who? \nOptions:\n(A) a \n(B) b.\nAnswer with one letter."


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("(B)", True),
        ("b. it", True),
        ("(b):", True),
        ("x(b)x", True),
        ("", True),
        (".", True),
        (" C", True),  # an empty word
        ("b,", False),
        ("B\nit", False),
        ("C", False),
        ("It B", False),
    ],
)
def test_notebook(text, right):
    assert mvbench.notebook({"letter": "B"}, text) == right


def test_of_equal_candidates_the_last_is_right(tmp_path):
    place = folder("mvbench", tmp_path)
    path = place / "json" / "action_sequence.json"
    rows = json.loads(path.read_text())
    rows[0].update(candidates=["a", "b", "a"], answer="a")
    path.write_text(json.dumps(rows))
    for text, last, first in (("C", 1, 0), ("A", 0, 1)):
        _, scores = scored("mvbench", place, [{"question_id": 0, "text": text}])
        assert scores.rules["release_option"].items["action_sequence/0"] == last
        assert scores.rules["lmms_eval"].items["action_sequence/0"] == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].update(answer="other"), r"question 0: the answer 'other' is none"),
        (lambda rows: rows[0].pop("candidates"), r'question 0: "candidates" is nothing'),
        (lambda rows: rows[0].update(video=None), r'question 0: "video" is None'),
        (lambda rows: rows.clear(), r"state_change.json holds no list of questions"),
    ],
)
def test_broken_tasks_are_refused(change, message, tmp_path):
    place = folder("mvbench", tmp_path)
    path = place / "json" / "state_change.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=message):
        mvbench.BENCHMARK.questions(place)
    path.unlink()
    with pytest.raises(InputError, match=r"state_change.json; get it from OpenGVLab/MVBench"):
        mvbench.BENCHMARK.questions(place)


def test_answers_to_other_questions_are_refused(tmp_path):
    given = [{**line, "prompt": "Question: Who?\nOptions:"} for line in lines("mvbench")]
    n = len(given)
    with pytest.raises(InputError, match=f"{n} of {n} answers were given to other questions"):
        scored("mvbench", folder("mvbench", tmp_path), given)


@pytest.mark.parametrize("name", ["mvbench", "mlvu"])
def test_files_broken_at_random(name, tmp_path):
    place, rng, refused = folder(name, tmp_path), random.Random(name), 0
    files = sorted((place / "json").iterdir())
    for _ in range(60):
        path = rng.choice(files)
        whole = path.read_bytes()
        break_file(path, rng)
        try:
            questions, scores = scored(name, place, lines(name))
            assert len(scores.rules["first_letter"].items) == len(questions)
        except InputError:
            refused += 1
        path.write_bytes(whole)
    assert refused > 20
