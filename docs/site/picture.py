"""make readme-picture: the picture of README's first screen, from a model of the digits world.

MODEL, a held-out page --ask--> answers ------------------------------.
                   '--compressor--> what its vision token looked at --+--draw--> mini.png,
                   '--pre-fusion--> what each word of a question read-'          mini-dark.png

python docs/site/picture.py MODEL FOLDER
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import llava_mini_jax
from llava_mini_jax.analysis import compression
from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages
from llava_mini_jax.evaluation.image.digits import SEED
from llava_mini_jax.models import decoder, llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.ops.attention import attend, attention_weights
from llava_mini_jax.ops.layers import fold_layers
from llava_mini_jax.ops.masks import Mask, causal
from llava_mini_jax.ops.rope import angles

QUESTIONS = ("which digit is in row 2 column 3?", "read row 1.", "which is the largest digit?")


class Asked(NamedTuple):
    question: str
    answer: str
    truth: str


class Found(NamedTuple):
    """What the picture shows of a model and a page of Y x X patches."""

    page: Image.Image
    token_YX: np.ndarray  # attention of the vision token; its sum is 1
    words: list[str]  # those that pre-fusion reads of the first question's prompt
    reads_FYX: np.ndarray  # attention of each to the patches, mean over heads and layers
    asked: list[Asked]


# --- what is shown --------------------------------------------------------------------------------


def look(folder: str) -> Found:
    """The first page of the held-out ones, asked about by the model in `folder`."""
    model = llava_mini_jax.load(folder)
    cfg = model.bundle.model
    pages = DigitsPages(DigitsConfig(split="heldout", kinds=("read",), seed=SEED), 1)
    page = pages[0]
    digits = page["conversations"][1]["value"].split()
    image = Image.fromarray(page["image"])
    truths = (digits[5], " ".join(digits[:3]), max(digits))
    answers = model.generate(list(QUESTIONS), [[image]] * len(QUESTIONS), max_new_tokens=16)
    pictures = model.read_pictures([image], None)
    example = model.request(QUESTIONS[0], pictures)
    ids_F = example.ids[example.fuse]
    side = cfg.vision.grid
    reads_NFP = read_by_words(model.params, jnp.asarray(pictures.pixels), ids_F, cfg)[0]
    return Found(
        page=image,
        token_YX=compression.maps(model.params, pictures.pixels, cfg)[0].mean(axis=0),
        words=model.tokenizer.convert_ids_to_tokens(ids_F.tolist()),
        reads_FYX=np.asarray(reads_NFP).mean(axis=0).reshape(-1, side, side),
        asked=[Asked(*each) for each in zip(QUESTIONS, answers, truths, strict=True)],
    )


def read_by_words(
    params: LlavaMini, pixels_IJYXC: Any, ids_F: np.ndarray, cfg: LlavaMiniConfig
) -> tuple[jax.Array, jax.Array]:
    """(attention [N, F, P] of a text to one picture's patches in each layer of pre-fusion, the mean
    over heads; the text behind it [1, F, D]). For the paper's dialect, whose compressed tokens go
    around pre-fusion."""
    assert params.prefusion is not None and not cfg.fuse_compressed
    patches_ISD, _ = llava_mini.encode_and_compress(params, pixels_IJYXC, cfg)
    text_IFD = llava_mini.embed_text(params, jnp.asarray(ids_F)[None], cfg)
    x_ISD = jnp.concatenate([patches_ISD, text_IFD], axis=1)
    patches, size = patches_ISD.shape[1], x_ISD.shape[1]
    valid_IS = jnp.ones((1, size), bool)
    angles_ISH = angles(jnp.arange(size)[None], cfg.llm.head_width, cfg.llm.rope)
    attends = attend(Mask(first=0, window=cfg.llm.window), "xla")
    mask_ITS = causal(valid_IS, cfg.llm.window)

    def body(layer: decoder.Layer, x_ISD: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x_ISD, (_, weights_ITS) = decoder.block(
            layer,
            x_ISD,
            angles_ISH,
            attends,
            cfg.llm,
            observe=lambda q, k: attention_weights(q, k, mask_ITS),
        )
        return x_ISD, weights_ITS[0, patches:, :patches]

    layers = decoder.each(params.prefusion.layers, cfg.llm, whole=False)
    x_ISD, reads_NFP = fold_layers(body, layers, x_ISD)
    return reads_NFP, x_ISD[:, patches:]


# --- how it is drawn ------------------------------------------------------------------------------

DENSITY = 2  # pixels of the file for one of the layout below
WIDTH, HEIGHT, MARGIN = 900, 456, 24
PICTURE = 232  # the page's side
TILE = 42  # that of a word's


class Theme(NamedTuple):
    ground: str
    text: str
    soft: str
    line: str
    hot: str  # what is looked at
    right: str
    wrong: str
    bubble: str
    fade: float  # of what is not looked at, 1: nothing is left of it


LIGHT = Theme(
    *("#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#d9480f", "#1a7f37", "#b42318", "#eef1fb", 0.78)
)
DARK = Theme(
    *("#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#ff8a3d", "#3fb950", "#ff8f85", "#232a3f", 0.6)
)


def draw(found: Found, theme: Theme) -> Image.Image:
    """The picture, WIDTH x HEIGHT at DENSITY."""
    sheet = Sheet(theme)
    left, middle, right = MARGIN, MARGIN + PICTURE + 28, MARGIN + 2 * PICTURE + 64
    top = 72
    patches = found.token_YX.size
    sheet.heading(left, "A page of handwriting", f"that training never showed; {patches} patches")
    sheet.paste(_page(found.page, None, theme), left, top)
    sheet.heading(middle, "What its one vision token saw", f"{patches} tokens become 1")
    sheet.paste(_page(found.page, found.token_YX, theme), middle, top)
    sheet.heading(right, "What the model answers", "questions in words, about the same page")
    for number, asked in enumerate(found.asked):
        _exchange(sheet, right, top + 46 * number - 2, asked)
    _counts(sheet, right, top + 158, patches)
    below = top + PICTURE + 30
    sheet.text(MARGIN, below, "What the words of the first question read", 16, bold=True)
    note = "in pre-fusion, each over all patches, before the language model"
    sheet.text(MARGIN + 322, below + 1.5, note, 13.5, theme.soft)
    step = (WIDTH - 2 * MARGIN - TILE) / (len(found.words) - 1)
    for number, (word, map_YX) in enumerate(zip(found.words, found.reads_FYX, strict=True)):
        x = MARGIN + number * step
        sheet.tiles(x, below + 34, map_YX)
        sheet.text(x + TILE / 2, below + 34 + TILE + 8, word, 13, theme.soft, anchor="ma")
    return sheet.image


def _exchange(sheet: "Sheet", x: float, y: float, asked: Asked) -> None:
    """A question in a bubble, the answer beside it, and whether it is right."""
    theme = sheet.theme
    width = sheet.width(asked.question, 14) + 22
    sheet.box(x, y, x + width, y + 31, theme.bubble, radius=9)
    sheet.text(x + 11, y + 7, asked.question, 14)
    right = asked.answer.split() == asked.truth.split()
    answer, start = asked.answer or "none", x + width + 14
    sheet.text(start, y + 5, answer, 18, theme.right if right else theme.wrong, bold=True)
    end = start + sheet.width(answer, 18) + 10
    if right:
        sheet.check(end, y + 10, theme.right)
    else:
        sheet.text(end, y + 8, f"the page: {asked.truth}", 12.5, theme.soft)


def _counts(sheet: "Sheet", x: float, y: float, patches: int) -> None:
    """A square for each vision token: LLaVA-1.5's and LLaVA-Mini's."""
    theme, size, name = sheet.theme, 15, 92
    sheet.text(x, y, "Vision tokens", 14, bold=True)
    at_full_size = "at 336 pixels: 576 and 1"
    sheet.text(x + name + 8, y + 0.5, at_full_size, 13.5, theme.soft)
    for row, (model, count) in enumerate({"LLaVA-1.5": patches, "LLaVA-Mini": 1}.items()):
        top = y + 25 + 24 * row
        sheet.text(x, top, model, 13.5, theme.soft)
        for number in range(count):
            left = x + name + 8 + number * (size + 3)
            colour = theme.hot if count == 1 else theme.line
            sheet.box(left, top + 1, left + size, top + 1 + size, colour, radius=3)


def _page(page: Image.Image, map_YX: np.ndarray | None, theme: Theme) -> Image.Image:
    """The page as people read it; under a map, patches fade by how little was looked at them."""
    side = PICTURE * DENSITY
    smooth = np.asarray(page.resize((side, side), Image.Resampling.BICUBIC))
    # No pixel is lighter than the paper, as the filter would have it beside strokes.
    shown = Image.fromarray(np.minimum(smooth, np.asarray(page).max(axis=(0, 1))))
    if map_YX is not None:
        share_YX = map_YX / map_YX.max()
        weight = Image.fromarray((255 * share_YX).round().astype(np.uint8)).resize(
            (side, side), Image.Resampling.NEAREST
        )
        faded = Image.blend(shown, Image.new("RGB", shown.size, theme.ground), theme.fade)
        warm = Image.blend(shown, Image.new("RGB", shown.size, theme.hot), 0.42)
        shown = Image.composite(warm, faded, weight)
    return shown


class Sheet:
    """A drawing in the layout's units."""

    def __init__(self, theme: Theme):
        self.theme = theme
        self.image = Image.new("RGB", (WIDTH * DENSITY, HEIGHT * DENSITY), theme.ground)
        self._draw = ImageDraw.Draw(self.image)

    def heading(self, x: float, title: str, note: str) -> None:
        self.text(x, 20, title, 16, bold=True)
        self.text(x, 43, note, 13.5, self.theme.soft)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: str = "",
        *,
        bold: bool = False,
        anchor: str = "la",
    ) -> None:
        self._draw.text(
            (x * DENSITY, y * DENSITY),
            text,
            colour or self.theme.text,
            _font(size),
            anchor,
            stroke_width=0.35 * DENSITY if bold else 0,
        )

    def width(self, text: str, size: float) -> float:
        return _font(size).getlength(text) / DENSITY

    def box(
        self, left: float, top: float, right: float, bottom: float, colour: str, *, radius: float
    ) -> None:
        corners = [DENSITY * value for value in (left, top, right, bottom)]
        self._draw.rounded_rectangle(corners, DENSITY * radius, colour)

    def paste(self, picture: Image.Image, x: float, y: float) -> None:
        """A picture with round corners and a thin frame."""
        place, radius = (round(x * DENSITY), round(y * DENSITY)), 10 * DENSITY
        mask = Image.new("L", picture.size, 0)
        end = (picture.width - 1, picture.height - 1)
        ImageDraw.Draw(mask).rounded_rectangle([(0, 0), end], radius, 255)
        self.image.paste(picture, place, mask)
        corners = [*place, place[0] + end[0], place[1] + end[1]]
        self._draw.rounded_rectangle(corners, radius, outline=self.theme.line, width=DENSITY)

    def tiles(self, x: float, y: float, map_YX: np.ndarray) -> None:
        """A word's map: a square for each patch, full where all of its attention is."""
        size = TILE / len(map_YX)
        ground, hot = (np.array(_rgb(c)) for c in (self.theme.line, self.theme.hot))
        for row, column in np.ndindex(map_YX.shape):
            share = float(map_YX[row, column]) ** 0.6  # so that small shares are seen
            colour = tuple(np.round(ground + share * (hot - ground)).astype(int).tolist())
            left, top = (x + column * size) * DENSITY, (y + row * size) * DENSITY
            end = size * DENSITY - 1.5 * DENSITY
            self._draw.rounded_rectangle([left, top, left + end, top + end], 2 * DENSITY, colour)

    def check(self, x: float, y: float, colour: str) -> None:
        """A tick 14 wide."""
        points = [(x, y + 6), (x + 5, y + 11), (x + 14, y)]
        large = [(px * DENSITY, py * DENSITY) for px, py in points]
        self._draw.line(large, colour, round(2.4 * DENSITY), joint="curve")


def _font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own: the same letters on every machine."""
    font = ImageFont.load_default(size * DENSITY)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _rgb(colour: str) -> Sequence[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def main(folder: str, target: Path) -> None:
    found = look(folder)
    for name, theme in {"mini.png": LIGHT, "mini-dark.png": DARK}.items():
        draw(found, theme).save(target / name, optimize=True)
        print(target / name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
