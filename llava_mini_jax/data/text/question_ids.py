"""Questions in a second vocabulary, BERT's: for a compressor that reads what is asked of an image.

    a folder "bert-base-uncased" in a model's, or beside it --reader_for--> QuestionReader
    tokenizer + reader --give--> the tokenizer, which has it with it wherever prompts are written
    turns --of_marks--> ids of the question of each "<image>": [CLS] words [SEP]

While a prompt is open, all its images are looked at for the newest question; in training each for
the turn that it stands in (LLaMA-VID). The text is the turn's without "<image>" and line breaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini_jax.data.text.templates import IMAGE_MARK, Turn, image_marks
from llava_mini_jax.data.text.tokenizer import load_tokenizer, told
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.compressors import Declaration

FOLDER = "bert-base-uncased"
_BOS = "[DEC]"  # InstructBLIP's, one id behind BERT's own


@dataclass(frozen=True, eq=False)
class QuestionReader:
    tokenizer: Any
    most: int  # ids of a question; more are cut off on the left, as LLaMA-VID does

    def __call__(self, text: str) -> np.ndarray:
        """int32 ids of a question, a token in front and one behind it."""
        backend = self.tokenizer.backend_tokenizer
        with told("BERT's tokenizer", "cannot read a text"):
            around = backend.encode("", add_special_tokens=True).ids
            words = backend.encode(text, add_special_tokens=False).ids
        kept = words[max(0, len(words) - (self.most - len(around))) :]
        return np.array([*around[:1], *kept, *around[1:]], np.int32)


def find(folder: Path) -> Path:
    """BERT's folder of a model's; InputError where it is neither in it nor beside it."""
    for place in (folder / FOLDER, folder.parent / FOLDER):
        if place.is_dir():
            return place
    raise InputError(
        f"the model of {folder} reads questions by BERT's tokenizer, which is neither in it nor"
        f" next to it: put the folder {FOLDER} there (tokenizer.json, or vocab.txt and"
        " tokenizer_config.json)"
    )


def reader_for(folder: Path, declared: Declaration) -> QuestionReader:
    """The reader of a model's folder. Raises InputError where there is none, or it has more tokens
    than the compressor knows."""
    tokenizer = load_tokenizer(find(folder))
    if len(tokenizer) < declared.question_vocabulary:  # as published, and not the digits world's
        tokenizer.add_special_tokens({"bos_token": _BOS})
    return reader_of_words(tokenizer, declared)


def reader_of_words(tokenizer: Any, declared: Declaration) -> QuestionReader:
    """The reader that a tokenizer makes for a compressor."""
    if len(tokenizer) > declared.question_vocabulary:
        raise InputError(
            f"questions are read by a tokenizer of {len(tokenizer)} tokens, but the model's"
            f" compressor knows {declared.question_vocabulary}; use the one of these"
            " weights"
        )
    return QuestionReader(tokenizer, declared.question)


def give(tokenizer: Any, reader: QuestionReader | None) -> Any:
    """The tokenizer with its reader: both belong to one model, and go the same ways."""
    if reader is not None:
        tokenizer.question_reader = reader
    return tokenizer


def reader_of(tokenizer: Any) -> QuestionReader | None:
    return getattr(tokenizer, "question_reader", None)


def of_marks(turns: Sequence[Turn], tokenizer: Any) -> tuple[np.ndarray, ...]:
    """The ids that each "<image>" is looked at for, in their order; () where none are read.

    Raises InputError for a question without words.
    """
    reader, found = reader_of(tokenizer), []
    if reader is None:
        return ()
    asking = [number for number, turn in enumerate(turns) if turn.role == "user"]
    for number, turn in enumerate(turns):
        asked = asking[-1] if turns[-1].text is None and asking else number
        found += [(asked, text_of(turns[asked]))] * len(image_marks(turn))
    for number, text in found:
        if not text.strip():
            raise InputError(
                "the model's compressor reads the question about an image, and"
                f" turn {number + 1} has no text: add a question"
            )
    return tuple(reader(text) for _, text in found)


def text_of(turn: Turn) -> str:
    """What a turn asks: without its images' marks and line breaks."""
    text = turn.text or ""
    for mark in reversed(image_marks(turn)):
        text = text[:mark] + text[mark + len(IMAGE_MARK) :]
    return text.replace("\n", "")


def mark_every_question(turns: Sequence[Turn]) -> tuple[list[Turn], int]:
    """(the turns, an "<image>" in each question from the first one's on; how many there are).

    LLaMA-VID's rule for training. Its code puts the mark in front of a later question or behind it,
    by chance; here it stands in front.
    """
    marked, count = [], 0
    for turn in turns:
        own = len(image_marks(turn))
        if turn.role == "user" and count and not own:
            turn, own = Turn("user", f"{IMAGE_MARK}\n{turn.text or ''}"), 1
        marked.append(turn)
        count += own
    return marked, count
