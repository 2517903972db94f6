"""Answers files: in which order they are read, and which line of them answers a question."""

from llava_mini_jax.evaluation.benchmark import Question, find
from llava_mini_jax.evaluation.run import answers


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    names = [f"answers-{number}-of-12.jsonl" for number in range(1, 13)]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in answers.files(tmp_path)] == names


def test_the_first_of_two_answers_counts():
    asked = [Question(key="7", question_id=7, text="What?", prompt="What?")]
    lines = [{"question_id": 7, "text": text} for text in ("cat", "dog", "cat")]
    joined = answers.join(find("pope"), asked, lines)
    assert joined.answers["7"].text == "cat" and joined.repeated == ["7"]
