"""What a judge is asked in: fields of other servers, our words, the official ones."""

import json

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.judge.wording import fill, read_wording, sha256
from tests.evaluation.image import golden_sets as golden
from tests.evaluation.judge_server import OURS


def test_fields_of_other_servers(tmp_path):
    place = golden.folder("mmvet", "llava", tmp_path)
    tool, questions, joined = golden.joined("mmvet", place)
    fields = {"max_tokens": None, "max_completion_tokens": 16}
    asks = tool.judge.plan(questions, joined.answers, fields=fields, model="other").asks
    body = asks[0].requests[0].body
    assert body["model"] == "other" and body["max_completion_tokens"] == 16
    assert "max_tokens" not in body


def test_wordings(tmp_path):
    path = tmp_path / "wording.json"
    official = {"ask": sha256("So: {answer}?")}

    def read(content):
        path.write_text(content)
        return read_wording(path, OURS, official, "the script")

    assert read('{"ask": "So: {answer}?", "more": 1}').label == "official"
    assert read('{"ask": {"prompt": "So: {answer}?"}}').label == "official"
    assert read('{"ask": "So: {answer} ?"}').label == "unknown wording"
    assert read(json.dumps(OURS)).label == "ours"
    for content, says in (
        ('{"ask": "So?"}', "no place {answer}"),
        ('{"asks": "So: {answer}?"}', "no text ask; .* from the script"),
        ("[1]", "no text ask"),
        ("{", "cannot be read"),
    ):
        with pytest.raises(InputError, match=says):
            read(content)


def test_wording_from_the_scripts_that_have_it(tmp_path):
    script = """
raise SystemExit("never run")
def annotate(question, pred):
    messages = [
        {"role": "system", "content": "You check. " "------" "##RULES: "
            "- Be fair.\\n"},
        {"role": "user", "content":
            "Look:\\n\\n" f"Question: {question}\\n" f"Said: {pred}\\n"
            "Reply like {'pred': 'yes'}."},
    ]
    again = f"{question}" + "\\nThe digit: "
"""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "judge_it.py").write_text(script)
    texts = {
        "system": "You check. ------##RULES: - Be fair.\n",
        "user": "Look:\n\nQuestion: {question}\nSaid: {pred}\nReply like {'pred': 'yes'}.",
        "again": "The digit: ",
    }
    official = {name: sha256(text) for name, text in texts.items()}
    for path in (tmp_path / "scripts", tmp_path / "scripts" / "judge_it.py"):
        found = read_wording(path, texts, official, "the script")
        assert found.label == "official" and found.texts == texts
    (tmp_path / "scripts" / "judge_it.py").write_text(script.replace("fair", "kind"))
    with pytest.raises(InputError, match="no text system; "):
        read_wording(tmp_path / "scripts", texts, official, "the script")


def test_filling():
    text = "{'pred': 'yes'} {answer} {question} {other}"
    filled = fill(text, answer="{question}", question="Q")
    assert filled == "{'pred': 'yes'} {question} Q {other}"
