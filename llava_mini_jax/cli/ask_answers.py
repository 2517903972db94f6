"""The answers of `llava-mini ask`: for people as they arrive, or numbered; for programs as JSON.

Session, question --spoken--> pieces to stdout
         |-------- sampled --> (seed, answer) of each sample --numbered--> a line each
                                                             --document--> JSON
"""

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llava_mini_jax import compilation, signals
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import note, waiting, watching

if TYPE_CHECKING:
    from llava_mini_jax.inference.answer import Answer
    from llava_mini_jax.inference.session import Session

FEW = 8  # images and frames that are not worth a bar


def talk(chat: "Session", question: str | None, interactive: bool) -> int:
    """Answers this question, and those that follow it where `interactive`.

    Returns the exit status: 2 where one of the questions could not be asked.
    """
    status = 0
    for asked in _questions(question, interactive):
        try:
            _spoken(chat, asked)
        except InputError as error:
            if not interactive:
                raise
            print(f"llava-mini: {error}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt:  # ends this answer; a second one, at the prompt, ends it all
            if not interactive:
                raise
            signals.dealt_with()
            print(flush=True)
    return status


def numbered(chat: "Session", question: str, samples: int) -> None:
    """Prints each sample behind its number once it is whole."""
    for number, (_, answer) in enumerate(sampled(chat, question, samples), 1):
        print(f"{number}: {answer.text}", flush=True)
        _tell_if_full(chat, answer)


def document(chat: "Session", question: str, samples: int, model: str) -> dict[str, Any]:
    """Answers with token counts and why they end, for --json; seeds only where there is chance."""
    drawn = chat.settings.temperature > 0
    answers = []
    with _seeing(chat):
        for seed, answer in sampled(chat, question, samples):
            _tell_if_full(chat, answer)
            answers.append(dataclasses.asdict(answer) | {"seed": seed if drawn else None})
    usage = chat.usage
    assert usage is not None
    return {
        "model": model,
        "question": question,
        "frames": usage.frames,  # images too
        "prompt_tokens": usage.prompt,
        "image_tokens": usage.image,  # of these
        "answers": answers,
    }


def sampled(chat: "Session", question: str, samples: int) -> "Iterator[tuple[int, Answer]]":
    """(seed, answer) of so many samples: those of Model.generate for a list of this prompt.

    The session keeps what it has seen and read, so that each sample costs its own tokens.
    """
    for seed in chat.settings.seeds(samples):
        chat.settings = dataclasses.replace(chat.settings, seed=seed)
        yield seed, chat.answer_alone(question)


def _questions(first: str | None, interactive: bool) -> Iterator[str]:
    if first is not None:
        yield first
    if not interactive:
        return
    by_hand = sys.stdin.isatty() and sys.stdout.isatty()
    if by_hand:
        import readline

        del readline  # importing it is what gives `input` its editing
    if isinstance(sys.stdin, io.TextIOWrapper):  # as arguments are read; request.py tells of them
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> ") if by_hand else sys.stdin.readline()
        except EOFError:
            return
        if not line.strip():
            return
        yield line.strip()


def _spoken(chat: "Session", question: str) -> None:
    """Prints the answer as it arrives; the conversation goes on from it."""
    began = time.perf_counter()
    pieces = chat.ask(question)
    with _seeing(chat):
        piece = next(pieces, "")
    first = time.perf_counter() - began
    print(piece, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)
    seconds = time.perf_counter() - began
    answer = chat.answer
    assert answer is not None
    _tell_if_full(chat, answer)
    reason = ", cut there (--max-new-tokens)" if answer.finish == "length" else ""
    note(f"[{answer.tokens} tokens in {seconds:.1f} s, the first after {first:.1f} s{reason}]")
    if news := compilation.news():
        note(f"[{news}]")


@contextlib.contextmanager
def _seeing(chat: "Session") -> Iterator[None]:
    """A bar over the frames of a film while they are looked at."""
    if chat.frames <= FEW:
        with waiting("reading"):
            yield
        return
    with watching("frames", stays=False) as chat.watch:
        yield


def _tell_if_full(chat: "Session", answer: "Answer") -> None:
    if answer.finish == "context":
        print(f"llava-mini: {chat.model.full_context('this question')}", file=sys.stderr)
