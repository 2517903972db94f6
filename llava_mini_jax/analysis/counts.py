"""Whether choosing the number of vision tokens for each question pays (compressor "nested").

    questions --asked with every count--> right, first token's probability, positions [K, N]
                                              |-- half of them --> the rule that gains most
                                              '-- the others ----> its gain over fixed counts

Two kinds of rule. "confidence": ask with few tokens, and once more with many where the answer's
first token is less probable than a threshold. "words": a count for each beginning of a question,
from the question alone.

What a rule gains is measured against fixed counts of equal mean cost: the best mixture of two,
which drawing lots would give. Cost is the positions that the language model reads, those of a
first try included. A rule is chosen on other questions than those that it is judged by.

Dimensions: K counts, N questions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Benchmark, Question
from llava_mini_jax.inference import bounds, engine
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.ticket import Piece
from llava_mini_jax.inference.vision_tokens import counts_of

WORDS = 2  # of a question's beginning, by which "words" tells questions apart
STEPS = 20  # thresholds, or prices of a position, that are tried


@dataclasses.dataclass(frozen=True)
class Measured:
    """Every question asked with every count."""

    counts: tuple[int, ...]
    right_KN: np.ndarray  # bool
    sure_KN: np.ndarray  # float32: probability of the answer's first token
    cost_KN: np.ndarray  # int: positions of the prompt
    begins_N: np.ndarray  # str: the question's first words

    def some(self, numbers: np.ndarray) -> "Measured":
        right, sure, cost = (x[:, numbers] for x in (self.right_KN, self.sure_KN, self.cost_KN))
        return Measured(self.counts, right, sure, cost, self.begins_N[numbers])


class Outcome(NamedTuple):
    """What a rule comes to, question by question."""

    right_N: np.ndarray
    cost_N: np.ndarray


Rule = Callable[[Measured], Outcome]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A kind of rule on the questions that it was not chosen on."""

    kind: str
    rule: str  # in words
    accuracy: float
    positions: float  # mean cost
    fixed: float  # accuracy of fixed counts at that cost
    error: float  # standard error of the difference

    @property
    def helps(self) -> bool:
        """Whether it is better by more than chance would often have it."""
        return self.accuracy - self.fixed > 2 * self.error


def measure(
    model: Model, benchmark: Benchmark, questions: Sequence[Question], *, batch_size: int
) -> Measured:
    """InputError for a model of one count, and for questions without one right answer in words."""
    counts = counts_of(model.bundle)
    if len(counts) < 2:
        raise InputError(
            "the model has one number of vision tokens, so there is nothing to choose; use one with"
            " the compressor nested (configs/compressors/nested.py)"
        )
    if len(questions) < 4 or any(q.gold is None or q.video is not None for q in questions):
        raise InputError(
            f"{benchmark.name}: the rules need 4 or more questions about images, each with its"
            " one right answer; use another benchmark, such as digits, or a larger --limit"
        )
    asked = [_ask(model, benchmark, questions, count, batch_size=batch_size) for count in counts]
    right_KN, sure_KN, cost_KN = (np.array(rows) for rows in zip(*asked, strict=True))
    begins_N = np.array([" ".join(q.text.lower().split()[:WORDS]) for q in questions])
    return Measured(counts, right_KN, sure_KN, cost_KN, begins_N)


def _ask(
    model: Model,
    benchmark: Benchmark,
    questions: Sequence[Question],
    count: int,
    *,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(right, first token's probability, positions) of each question with `count` tokens."""
    examples = [
        model.request(q.text, model.read_pictures(q.image, None), q.key, vision_tokens=count)
        for q in questions
    ]
    own = Settings(max_new_tokens=benchmark.max_new_tokens, logprobs=0)
    right_N, sure_N = np.zeros(len(questions), bool), np.ones(len(questions), np.float32)
    begun: set[int] = set()

    def hear(number: int, piece: Piece) -> None:
        if piece.tokens and number not in begun:
            begun.add(number)
            sure_N[number] = np.exp(piece.tokens[0].logprob)
        if piece.answer is not None:
            right_N[number] = piece.answer.text.split() == (questions[number].gold or "").split()

    for _ in engine.answering(model, examples, [own] * len(examples), batch_size, hear):
        pass
    cost_N = np.array([bounds.prompt_positions(example, model.bundle) for example in examples])
    return right_N, sure_N, cost_N


# ------------------------------------------------------------------------------------------ fixed


def fixed(measured: Measured) -> list[tuple[float, float]]:
    """(mean cost, accuracy) of each count alone, the cheapest first."""
    cost_K, right_K = measured.cost_KN.mean(axis=1), measured.right_KN.mean(axis=1)
    return list(zip(cost_K.tolist(), right_K.tolist(), strict=True))


def mixture(measured: Measured, cost: float) -> np.ndarray:
    """Each question's share of being right [N], of the best two counts drawn so that the mean cost
    is `cost`; of the cheapest or the dearest count where it is beyond them."""
    points = fixed(measured)
    cost = float(np.clip(cost, points[0][0], points[-1][0]))
    best, best_N = -1.0, np.zeros(measured.right_KN.shape[1])
    for low, (low_cost, _) in enumerate(points):
        for high, (high_cost, _) in enumerate(points):
            if not low_cost <= cost <= high_cost:
                continue
            share = (cost - low_cost) / (high_cost - low_cost) if high_cost > low_cost else 0.0
            right_N = (1 - share) * measured.right_KN[low] + share * measured.right_KN[high]
            if right_N.mean() > best:
                best, best_N = float(right_N.mean()), right_N
    return best_N


# ------------------------------------------------------------------------------------------ rules


def confidence(few: int, many: int, threshold: float) -> Rule:
    """Numbers of two counts: with the second one where the first one's answer is not sure."""

    def rule(measured: Measured) -> Outcome:
        again_N = measured.sure_KN[few] < threshold
        right_N = np.where(again_N, measured.right_KN[many], measured.right_KN[few])
        return Outcome(right_N, measured.cost_KN[few] + again_N * measured.cost_KN[many])

    return rule


def words(measured: Measured, price: float) -> dict[str, int]:
    """For each beginning of a question the number of the count that is best there, where a position
    costs `price` of an answer."""
    chosen = {}
    for begin in np.unique(measured.begins_N):
        those_N = measured.begins_N == begin
        worth_K = (measured.right_KN - price * measured.cost_KN)[:, those_N].mean(axis=1)
        chosen[str(begin)] = int(worth_K.argmax())
    return chosen


def by_words(chosen: dict[str, int]) -> Rule:
    """Beginnings that nobody has met take the smallest count."""

    def rule(measured: Measured) -> Outcome:
        number_N = np.array([chosen.get(str(begin), 0) for begin in measured.begins_N])
        every_N = np.arange(len(number_N))
        return Outcome(measured.right_KN[number_N, every_N], measured.cost_KN[number_N, every_N])

    return rule


def rules(measured: Measured) -> dict[str, list[tuple[str, Rule]]]:
    """All that are tried, by kind: (in words, rule)."""
    counts, found = measured.counts, {"confidence": [], "words": []}
    for few in range(len(counts)):
        for many in range(few + 1, len(counts)):
            for share in np.linspace(0, 1, STEPS + 1)[1:-1]:
                threshold = float(np.quantile(measured.sure_KN[few], share))
                said = (
                    f"{counts[few]} tokens, and {counts[many]} where the first token's probability"
                    f" is below {threshold:.3f}"
                )
                found["confidence"].append((said, confidence(few, many, threshold)))
    span = max(1, int(np.ptp(measured.cost_KN)))
    for price in np.geomspace(1e-3, 1, STEPS) / span:
        chosen = words(measured, float(price))
        said = ", ".join(f'"{begin}" {counts[k]}' for begin, k in chosen.items())
        found["words"].append((said, by_words(chosen)))
    return found


def judge(measured: Measured) -> list[Verdict]:
    """The best rule of each kind on one half of the questions, on the other."""
    # By lot: benchmarks take turns with kinds of questions, so every second one is of few kinds.
    numbers = np.random.default_rng(0).permutation(measured.right_KN.shape[1])
    chosen_on, judged_on = measured.some(numbers[::2]), measured.some(numbers[1::2])
    found = []
    for kind, tried in rules(chosen_on).items():
        said, best = max(tried, key=lambda each: _gain(each[1], chosen_on).mean())
        right_N, cost_N = best(judged_on)
        gain_N, cost = _gain(best, judged_on), float(cost_N.mean())
        found.append(
            Verdict(
                kind=kind,
                rule=said,
                accuracy=float(right_N.mean()),
                positions=cost,
                fixed=float(mixture(judged_on, cost).mean()),
                error=float(gain_N.std(ddof=1) / len(gain_N) ** 0.5),
            )
        )
    return found


def _gain(rule: Rule, measured: Measured) -> np.ndarray:
    """How much more often than fixed counts of its mean cost a rule is right, by question."""
    right_N, cost_N = rule(measured)
    return right_N - mixture(measured, float(cost_N.mean()))


# ------------------------------------------------------------------------------------------- told


def lines(measured: Measured, verdicts: Sequence[Verdict]) -> list[str]:
    found = ["exact match, %, and positions of a prompt:"]
    for count, (cost, right) in zip(measured.counts, fixed(measured), strict=True):
        found.append(f"  {count:>4} vision tokens{100 * right:8.1f}{cost:10.1f}")
    found.append(
        "rules, fitted on one half, judged on the other; beside them fixed counts of that cost:"
    )
    for one in verdicts:
        verdict = "helps" if one.helps else "does not help"
        found.append(
            f"  {one.kind:<12}{100 * one.accuracy:8.1f}{one.positions:10.1f}   fixed"
            f" {100 * one.fixed:.1f} (+- {100 * one.error:.1f})   {verdict}: {one.rule}"
        )
    return found


def as_json(measured: Measured, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    curve = zip(measured.counts, fixed(measured), strict=True)
    return {
        "fixed": {n: {"positions": cost, "accuracy": right} for n, (cost, right) in curve},
        "rules": [dataclasses.asdict(one) | {"helps": one.helps} for one in verdicts],
    }
