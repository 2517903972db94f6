"""The built-in world: pages of real handwritten digits, and questions about them in words.

    (seed, index) --random numbers--> digits of the pages --glyphs, ink on paper--> image [H, W, 3]
                                          |                                   or frames [F, H, W, 3]
                                          '--question kinds--> conversations: human, gpt, human, ..

Glyphs come from glyphs.py, whose two splits are by different hands. Items are drawn when they are
asked for: any length costs nothing, and an item depends on its config and index only, whatever the
order and the number of workers.

In a "needle" video every page is full of one digit, in other hands and inks each time, but one
page, which is full of another: that one is asked for.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

import numpy as np

from llava_mini_jax import environment
from llava_mini_jax.data.digits.glyphs import glyph_bank, load_scans
from llava_mini_jax.data.digits.questions import ALONE, KINDS, WORDINGS, ask, digits_for, needle
from llava_mini_jax.data.sample import Sample
from llava_mini_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "heldout")

_SMALLEST_CELL = 10  # pixels; below that, people no longer read the digits
_LARGEST_GLYPH = 32  # pixels; bigger pages are drawn small and enlarged, so the glyphs stay few MB
_IN_ENGLISH = WORDINGS["english"].keys()
_FEWEST_WITH_NEEDLE = 3  # of two pages each would be the odd one


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """What the pages look like and what is asked.

    Raises InputError for values that make no readable page or no question.
    """

    rows: int = 3
    columns: int = 3
    page_size: int = 30  # height and width in pixels
    frames: int = 0  # pages of a video; 0 gives single pictures
    fewest_frames: int = 0  # videos have from so many pages to `frames`; 0: all have `frames`
    split: str = "train"  # or "heldout": scans that train never shows
    kinds: tuple[str, ...] = ("position", "row", "column", "count", "largest", "read")
    # or ("caption",), or for videos ("needle",)
    turns: int = 1  # questions in a conversation; one that asks for the whole page is alone
    samples: int = 1_000_000  # items before they repeat
    wording: str = "brief"  # or "english": sentences, for language models that know it
    augment: bool = False  # tilt, scale and fade the digits; for train only
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if min(self.rows, self.columns, self.turns, self.samples) < 1:
            problems.append("rows, columns, turns and samples must be 1 or more")
        elif self.page_size // max(self.rows, self.columns) < _SMALLEST_CELL:
            problems.append(
                f"page_size {self.page_size} leaves less than {_SMALLEST_CELL} pixels per digit "
                f"for {self.rows} x {self.columns} digits; use a larger page or fewer digits"
            )
        if self.frames < 0 or self.seed < 0:
            problems.append("frames and seed must be 0 or more")
        if self.split not in SPLITS:
            problems.append(f"split is {self.split!r}; the splits are {', '.join(SPLITS)}")
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            problems.append(f"kinds are {self.kinds!r}; choose from {', '.join(KINDS)}")
        if "caption" in self.kinds and (self.turns > 1 or self.frames):
            problems.append("captions are for single images and one turn")
        if self.wording not in WORDINGS:
            problems.append(f"wording is {self.wording!r}; choose from {', '.join(WORDINGS)}")
        elif self.wording == "english" and (self.frames or not set(self.kinds) <= _IN_ENGLISH):
            problems.append(
                f"english has no words for videos, nor for kinds but {', '.join(_IN_ENGLISH)}"
            )
        if not 0 <= self.fewest_frames <= self.frames:
            problems.append(
                f"fewest_frames is {self.fewest_frames}; give 0 to frames, {self.frames}"
            )
        if "needle" in self.kinds and self.shortest < _FEWEST_WITH_NEEDLE:
            problems.append(
                f"a needle needs videos of {_FEWEST_WITH_NEEDLE} pages or more, not {self.shortest}"
            )
        if self.augment and self.split != "train":
            problems.append("augment is for the train split; held-out pages stay as they are")
        if problems:
            raise InputError("; ".join(problems))

    @property
    def shortest(self) -> int:
        """Pages of the shortest videos."""
        return self.fewest_frames or self.frames


class _Item(NamedTuple):
    """An item before its pages are drawn."""

    kinds: list[str]  # of each turn
    pages: list[list[int]]  # the digits of each page, row-major
    turns: list[tuple[str, str]]  # question and answer
    below: Callable[[int], int]  # the rest of the item's random numbers


class DigitsPages:
    """A random-access data source, as Grain wants one.

    An item has an "image", uint8 [H, W, 3], or "frames" [F, H, W, 3]. "<image>" opens its first
    turn (for videos too, as in the release's data). `kind` joins the kinds of all turns by "+".
    """

    def __init__(self, config: DigitsConfig, length: int):
        if length < 1:
            raise InputError(f"length is {length}; a source needs at least 1 item")
        self.config = config
        self.length = length
        labels = load_scans(config.split)[1].tolist()
        self._scans_of = [[i for i, label in enumerate(labels) if label == d] for d in range(10)]
        cell = config.page_size // max(config.rows, config.columns)
        self._zoom = -(-cell * 5 // 6 // _LARGEST_GLYPH)
        # The glyph leaves a sixth of the cell's smaller side free, and moves over half of that.
        self._glyph_size = cell // self._zoom * 5 // 6
        self._glyphs = glyph_bank(config.split, self._glyph_size, config.augment, config.seed)

    def __repr__(self) -> str:
        return f"DigitsPages({self.config!r}, length={self.length})"

    def __len__(self) -> int:
        return self.length

    def id_of(self, index: SupportsIndex) -> str:
        return f"digits-{self.config.split}-{operator.index(index):07d}"

    def dataset_of(self, index: SupportsIndex) -> str:
        return f"digits-{self.config.split}"

    def __getitem__(self, index: SupportsIndex) -> Sample:
        number = operator.index(index)
        plan = self._plan(number)
        pages = [self._draw(digits, plan.below) for digits in plan.pages]
        conversations = []
        for question, answer in plan.turns:
            conversations.append({"from": "human", "value": question})
            conversations.append({"from": "gpt", "value": answer})
        start = "<image>\n" if conversations[0]["value"] else "<image>"
        conversations[0]["value"] = start + conversations[0]["value"]
        item = Sample(id=self.id_of(number), conversations=conversations, kind="+".join(plan.kinds))
        if self.config.frames:
            return {**item, "frames": np.stack(pages)}
        return {**item, "image": pages[0]}

    def odd_page(self, index: SupportsIndex) -> int:
        """Which page of a "needle" video differs, from 0."""
        firsts = [page[0] for page in self._plan(operator.index(index)).pages]
        return next(n for n, digit in enumerate(firsts) if firsts.count(digit) == 1)

    def _plan(self, number: int) -> _Item:
        if not 0 <= number < self.length:
            raise IndexError(f"item {number} of {self!r}")
        config = self.config
        cells, pages = config.rows * config.columns, max(1, config.frames)  # `pages`: the most
        # The split is part of the key: a training page and a held-out page with the same number
        # must not share their digits, questions and colours. One call draws all the numbers of an
        # item and some to spare, because a call costs more than a hundred numbers.
        rng = np.random.default_rng((config.seed, SPLITS.index(config.split), number))
        draw = iter(rng.random(pages * (7 * cells + 16) + 8 * config.turns + cells).tolist())

        def below(limit: int) -> int:
            return int(next(draw) * limit)

        kinds = [config.kinds[below(len(config.kinds))]]
        others = [kind for kind in config.kinds if kind not in ALONE]
        while kinds[0] in others and len(kinds) < config.turns:
            fewest = min(map(kinds.count, others))  # each kind comes once before one comes again
            rare = [kind for kind in others if kinds.count(kind) == fewest]
            kinds.append(rare[below(len(rare))])
        if config.shortest < config.frames:
            pages = config.shortest + below(config.frames - config.shortest + 1)
        asked_pages = [below(pages) for _ in kinds]
        if kinds == ["needle"]:
            digits, turn = needle(pages, cells, asked_pages[0], below)
            return _Item(kinds, digits, [turn], below)
        digits = [[below(10) for _ in range(cells)] for _ in range(pages)]
        digits[asked_pages[0]], counted = digits_for(kinds[0], cells, below)
        turns = []
        for turn, (kind, page) in enumerate(zip(kinds, asked_pages, strict=True)):
            if turn:  # later turns take the page as it is; every fourth digit may be absent
                counted = digits[page][below(cells)] if below(4) else below(10)
            name = f"page {page + 1}" if config.frames else ""
            shown = digits[page]
            turns.append(
                ask(
                    kind,
                    shown,
                    config.columns,
                    counted=counted,
                    page=name,
                    wording=config.wording,
                    below=below,
                )
            )
        return _Item(kinds, digits, turns, below)

    def _draw(self, digits: list[int], below: Callable[[int], int]) -> np.ndarray:
        """A page: uint8 [H, W, 3], dark ink on light paper, both slightly tinted."""
        config, glyph_size = self.config, self._glyph_size
        side = config.page_size // self._zoom
        height, width = side // config.rows, side // config.columns
        room = (min(height, width) - glyph_size) // 2
        top, left = (height - glyph_size - room) // 2, (width - glyph_size - room) // 2
        ink_HW = np.zeros((side, side), np.uint8)
        for cell, digit in enumerate(digits):
            scans = self._scans_of[digit]
            variants = self._glyphs[scans[below(len(scans))]]
            row, column = divmod(cell, config.columns)
            y = row * height + top + below(room + 1)
            x = column * width + left + below(room + 1)
            ink_HW[y : y + glyph_size, x : x + glyph_size] = variants[below(len(variants))]
        if side != config.page_size:
            ink_HW = ink_HW.repeat(self._zoom, 0).repeat(self._zoom, 1)
            ink_HW = np.pad(ink_HW, (0, config.page_size - len(ink_HW)))
        paper = np.array([255 - below(40) for _ in range(3)], np.float32)
        ink = np.array([below(70) for _ in range(3)], np.float32)
        colours = (paper + _INK_RAMP * (ink - paper)).astype(np.uint8)
        return colours.take(ink_HW, axis=0)


_INK_RAMP = np.linspace(0, 1, 256, dtype=np.float32)[:, None]


# All words of this world. Saved models count on their order: new words go to the end.
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
_WORDS = """
0 1 2 3 4 5 6 7 8 9 . , : ; ? ! ' " ( ) -
which digit is in row column how many s are there read the page largest on
a chat between a curious user and an artificial intelligence assistant
the assistant gives helpful detailed and polite answers to the user questions
human what answer question using single word or phrase yes no
of this picture image video pages digits number numbers smallest first last top bottom left right
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows every word of this world and of the Vicuna template.

    Case is ignored; digits and punctuation are tokens of their own, so "7s" is "7", "s" and "10" is
    "1", "0". Like Vicuna's, it opens every text with <s> unless add_special_tokens=False, and reads
    "</s>" inside a text as the end token. Unknown words become <unk>. `save_pretrained` leaves a
    folder that AutoTokenizer opens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = dict.fromkeys([*_SPECIAL, *_WORDS.split()])
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", list(words).index("<s>"))]
    )
    core.decoder = decoders.WordPiece()  # spaces between words, none before punctuation
    return environment.transformers().PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
    )
