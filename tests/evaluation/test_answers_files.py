"""The answers files of a folder: scoring and going on read them in one order."""

from llava_mini_jax.evaluation.run import answers


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    names = [f"answers-{number}-of-12.jsonl" for number in range(1, 13)]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in answers.files(tmp_path)] == names
