"""Exact match of words, by parts: how the built-in world's benchmarks are scored."""

from collections.abc import Callable, Mapping, Sequence

from llava_mini_jax.evaluation.benchmark import Output, Question, Rule, Scores, percent


def score(
    questions: Sequence[Question], answers: Mapping[str, Output], part_of: Callable[[Question], str]
) -> Scores:
    """The share of answers with the words of `gold`, in %; the details have each part's, and of how
    many questions."""
    said = {q.key: answers[q.key].text.split() if q.key in answers else [] for q in questions}
    items = {q.key: float(said[q.key] == q.gold.split()) for q in questions}
    by_part: dict[str, list[float]] = {}
    for question in questions:
        by_part.setdefault(part_of(question), []).append(items[question.key])
    details = {
        "parts": {name: percent(right) for name, right in by_part.items()},
        "questions": {name: len(right) for name, right in by_part.items()},
    }
    return Scores(
        headline="exact",
        rules={"exact": Rule.mean_of(items, details)},
        parsed={key: " ".join(words) for key, words in said.items()},
        unparsed=[key for key, words in said.items() if not words],
    )
