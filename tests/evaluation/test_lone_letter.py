"""The letter that stands alone: what it is read from, what is no letter, and who disagrees."""

import json
import time

import pytest

import eval as eval_program
from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.rules.lone_letter import lone_letter
from llava_mini_jax.evaluation.run import answers
from tests.evaluation.image import golden_sets as golden

READ = {
    "A": (
        " A\n",
        "Answer: A",
        "The answer is A",
        "A man: A",
        "I think it is (A)",
        "The person washes dishes: (A)",
        "A because he runs",
        "a",
        "a.",
        "Correct answer: A. Sample A",
    ),
    "B": (
        "[B]",
        "B)",
        "The answer is (B).",
        "The answer is B because A is wrong",
        "\\boxed{B}",
        "<think>Answer: A</think>The answer is B",
        "A man: B",
        "Because of the cat, B) opens the door",
        "B: c performs lifting number 32",
        "Not (A), but (B)",
        "(A) is wrong. (B) is correct.",
        "B because he runs",
        "So it is B",
        "正确答案是B吗",
        "the answer is (b)",
        "Based on the video, the answer should be B",
        'The answer is "B".',
        "The answer is 'B'",
        "The answer is **B: cat**",
        "Among the options, B seems the most appropriate.",
        "Choice: B",
        "My answer: B!",
    ),
    "C": (
        "C",
        "c",
        "(C)",
        "(c).",
        "**C**",
        "C.",
        "C:",
        "Answer: C",
        "Answer: C.",
        "answer: c",
        "**Answer:** C",
        "**Answer: C**",
        "Answer:\n\nC",
        "Answer: (C) washes dishes",
        "Answer: C. A man walks",
        "Final answer: \\boxed{C}",
        "<answer>C</answer>",
        "<think>Maybe A. Or B.</think>\n\nC",
        "maybe A, maybe (B)</think>\nAnswer: C",
        "[THINK]A[/THINK]C",
        "C. eats (B) food.",
        "Because C moves the box, C",
        "Best option:(C)",
        "C\nExplanation: the man",
        "The video shows a man.\n\nC",
        "Option C",
        "Option C is correct",
        "C is the correct answer.",
        "I'd go with C.",
        "答案：C",
        "答案是C",
        "选C",
        "（Ｃ）",
        "C、cat",
        "C.red",
        "C</s>",
        "C<|eot_id|>",
        "The answer to the question is C",
        "Answer: I think it is C",
        "the answer is c",
        "The answer is C, not B",
        "C - washing",
        "`C`",
        "$C$",
        "<C>",
        "It's C.",
        "- C",
        "> **C.** washing",
        "**C. washing dishes**",
        "### C",
        "Answers: C",
        "C, because he runs",
        "Assistant: C",
        "Answer - C",
        "Answer = C",
        "[[C]]",
        '{"answer": "C"}',
        "{'answer': 'C'}",
        "Answer (C)",
        "Answer C",
        "The answer is C - washing",
        "The answer is C) washing",
        "C !",
        " C ) ",
        "It is C",
        "Therefore, C",
    ),
    "D": (
        '"D"',
        "The correct answer is: **D**",
        "The correct option is D.",
        "<think></think>D",
        "Definitely option D!",
        "I choose D because of (A)",
        "选项D",
        "The best choice is option (D): cat",
        "ANSWER: D",
        "D",
    ),
    "E": (
        "Because C moves the box, E",
        "E: c performs reading number 1",
        "The answer is E",
    ),
}
NONE = (
    "<think>Answer: A and so on",
    "A man is walking",
    "Answer: A man is walking",
    "The answer is a dog",
    "I think it is (A) or (B)",
    "C did B",
    "c did B",
    "c performs painting number 23",
    "C washes dishes",
    "Answer: C washes dishes",
    "N/A",
    "5",
    "closes the laptop",
    "The answer is not B",
    "Both A and C",
    "A and B",
    "A, B",
    "A or B",
    "A/B",
    "A. cat\nB. dog\nC. bird",
    "A. cat B. dog",
    "(A) cat (B) dog",
    "Vitamin C",
    "Plan B.",
    "37℃",
    "Answer: F",
    "Answer: A, B",
    "The answer is A or B",
    "I think C",
    "U.S.A.",
    "A.I. robots",
    "D.C. is a city",
    "It can't be A",
    "A: B",
    "A dog.",
    "I",
    "I don't know",
    "Answer: I don't know",
    "Yes",
    "Answer: B\nAnswer: C",
    "The answer is neither A nor B",
    "None of A, B, C",
    "Sample A is warmer",
    "Sample A",
    "B, C",
    "A B",
    "A\nB",
    "AB",
    "The man is in group C.",
)


@pytest.mark.parametrize("letter", READ)
def test_the_letter_that_stands_alone(letter):
    found = {text: lone_letter(text, "ABCDE") for text in READ[letter]}
    assert found == dict.fromkeys(READ[letter], letter)


def test_no_letter_or_several():
    found = {text: lone_letter(text, "ABCD") for text in NONE}
    assert found == dict.fromkeys(NONE, "")


def test_long_answers_are_read_at_once():
    began = time.monotonic()
    for part in ("answer: ", " * ", "**A", "(A ", "answer to ", "\n \n", "<think"):
        lone_letter(part * (4096 // len(part)), "ABCD")
    assert time.monotonic() - began < 30  # seconds: a pattern that never ends, not a slow machine


def right_answers(name, form):
    """Each question's right letter in the form, as an answers file's lines."""
    found = benchmark.find(name)
    questions = found.questions(golden.GOLDEN / name)

    def letter(gold):
        return gold["letter"] if "letter" in gold else "ABCDE"[gold["answer"]]

    return questions, [
        answers.line_of(q, form.format(letter(q.gold)), answer_id=q.key, model_id="m", cut=False)
        for q in questions
    ]


@pytest.mark.parametrize(
    "name", ["mmbench", "seed_bench", "scienceqa", "mvbench", "mlvu", "egoschema"]
)
@pytest.mark.parametrize(
    "form",
    [
        *("{}", "{}.", "({})", "**{}**", "Answer: {}", "The answer is ({})."),
        "<think>It may be A or D.</think>{}",
    ],
)
def test_right_answers_score_everything(name, form):
    questions, lines = right_answers(name, form)
    found = benchmark.find(name)
    scores = found.score(golden.GOLDEN, questions, answers.join(found, questions, lines).answers)
    assert (scores.headline, scores.rules["letter"].value) == ("letter", 100)
    assert not scores.unparsed


def test_disagreements_are_printed_and_kept(tmp_path, capsys):
    _, lines = right_answers("egoschema", "Answer: {}")
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--answers", str(path), "--benchmarks", "egoschema", "--data", str(golden.GOLDEN)]
    eval_program.main([*words, "--out", str(tmp_path / "out")])
    [found] = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["value"], found["headline"], found["not_parsed"]) == (100, "letter", [])
    release = found["rules"]["first_letter"]["value"]
    others = [line["question_id"] for line in lines if line["text"] != "Answer: A"]
    n = len(lines)
    assert release == pytest.approx(100 * (n - len(others)) / n)
    assert sorted(found["disagreements"]["first_letter"]) == sorted(others)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"rules disagree on {len(others)} of {n} answers" in printed
