"""The digits world: pages show what the questions say, and nothing leaks between the splits."""

import collections
import dataclasses
import hashlib
import itertools
import random
import re
import sys

import numpy as np
import pytest

from llava_mini_jax.data.digits import glyphs, questions
from llava_mini_jax.data.digits import pages as world
from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages, build_tokenizer
from llava_mini_jax.errors import InputError
from tests.data.data_files import page_digits

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
CONFIGS = {
    "train": DigitsConfig(augment=True),
    "heldout": DigitsConfig(split="heldout", columns=3),
    "multi-turn": DigitsConfig(turns=3, seed=5),
    "caption": DigitsConfig(kinds=("caption",)),
    "oblong": DigitsConfig(kinds=("caption", "row", "column"), rows=2),
    "video": DigitsConfig(frames=4, turns=2, rows=2, columns=2),
    "clips": DigitsConfig(frames=6, fewest_frames=2, turns=2),
    "needle": DigitsConfig(frames=9, fewest_frames=3, kinds=("needle",)),
    "one digit": DigitsConfig(rows=1, columns=1, page_size=10, turns=5),
    "large page": DigitsConfig(page_size=224, rows=3, columns=2),
}


ALONE = {"read", "caption", "needle"}  # nothing is asked beside them


def turns_of(item):
    """(question, answer) of an item's conversation, without the image's token."""
    values = [turn["value"].removeprefix("<image>").strip() for turn in item["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def answer(question, pages):
    """The answer worked out from the question's words and the digits [pages, rows, columns]."""
    if question == questions.NEEDLE_QUESTION:
        shown = [set(grid.ravel().tolist()) for grid in pages]
        (odd,) = (digit for digit in range(10) if sum(digit in on for on in shown) == 1)
        return str(odd)
    page = re.search(r"page (\d+)", question)
    grid = pages[int(page[1]) - 1 if page else 0]
    if place := re.search(r"row (\d+) column (\d+)", question):
        return str(grid[int(place[1]) - 1, int(place[2]) - 1])
    if counted := re.search(r"how many (\d)s", question):
        return str(np.sum(grid == int(counted[1])))
    if "largest" in question:
        return str(np.max(grid))
    if line := re.search(r"read (row|column) (\d+)", question):
        return say(LINES[line[1]](grid)[int(line[2]) - 1])
    assert re.fullmatch(r"read (the page|page \d+)\.", question)
    return say(grid.ravel())


LINES = {"row": np.asarray, "column": np.transpose}


def say(digits_N):
    return " ".join(map(str, digits_N))


def check_caption(caption, grid):
    """Every row, or every column, once."""
    parts = [re.fullmatch(r"(row|column) (\d+) is ([\d ]+)", part) for part in caption.split(", ")]
    kind = parts[0][1]
    numbers = [int(part[2]) for part in parts]
    assert {part[1] for part in parts} == {kind}
    assert sorted(numbers) == list(range(1, 1 + len(LINES[kind](grid))))
    for part, number in zip(parts, numbers, strict=True):
        assert part[3] == say(LINES[kind](grid)[number - 1])


def read_page(source, image_HWC):
    """The scans that a page without augmentation shows: their numbers in the split, row-major.

    Compares every cell, at every place in it, with every glyph of the split.
    """
    config, glyphs = source.config, source._glyphs[:, 0].astype(np.float32)
    size = glyphs.shape[-1]
    light_HW = image_HWC.astype(np.float32).sum(-1)
    height, width = config.page_size // config.rows, config.page_size // config.columns
    found = []
    for row, column in itertools.product(range(config.rows), range(config.columns)):
        y, x = row * height, column * width
        cell = light_HW.max() - light_HW[y : y + height, x : x + width]
        windows = np.lib.stride_tricks.sliding_window_view(cell, (size, size))
        windows, templates = windows.reshape(-1, size * size), glyphs.reshape(len(glyphs), -1)
        scores = (windows @ templates.T) / np.linalg.norm(templates, axis=1)
        score, scan = scores.max(0).max(), scores.max(0).argmax()
        assert score > 0.995 * np.linalg.norm(cell)  # all ink of the cell belongs to this glyph
        found.append(int(scan))
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_answers_follow_from_the_digits_of_the_page(config):
    source = DigitsPages(config, 150)
    for index in range(150):
        item, pages = source[index], page_digits(source, index)
        turns, kinds = turns_of(item), item["kind"].split("+")
        assert len(turns) == len(kinds) == (1 if kinds[0] in ALONE else config.turns)
        assert ALONE.isdisjoint(kinds[1:])
        for question, given in turns:
            if question:
                assert given == answer(question, pages), (index, question)
            else:
                check_caption(given, pages[0])


def test_captions_go_by_row_or_by_column_in_every_order():
    source = DigitsPages(DigitsConfig(kinds=("caption",)), 300)
    captions = [turns_of(source[index])[0][1] for index in range(300)]
    orders = {tuple(re.findall(r"(row|column) (\d)", caption)) for caption in captions}
    assert len(orders) == 2 * 6  # 3! orders of each


def answer_in_english(question, grid):
    """The digits that a reply ends with, worked out from the question's words and the page."""
    places = {kind: int(n) - 1 for kind, n in re.findall(r"(row|column) (\d)", question)}
    if len(places) == 2:
        return str(grid[places["row"], places["column"]])
    if places:
        ((kind, number),) = places.items()
        return say(LINES[kind](grid)[number])
    if counted := re.search(r"\d", question):
        return str(np.sum(grid == int(counted[0])))
    if "largest" in question or "highest" in question:
        return str(np.max(grid))
    return say(grid.ravel())


def test_english_answers_follow_from_the_page_and_every_form_comes():
    kinds = tuple(questions.WORDINGS["english"])
    config = DigitsConfig(wording="english", rows=3, columns=2, kinds=kinds, turns=3, augment=True)
    source, forms = DigitsPages(config, 300), {}
    for index in range(300):
        (grid,) = page_digits(source, index)
        for question, given in turns_of(source[index]):
            assert given.endswith(f" {answer_in_english(question, grid)}."), (index, question)
            assert question[0].isupper() and question[-1] in ".?"
            asked, replied = (re.sub(r"\d( \d)*", "#", text) for text in (question, given))
            assert forms.setdefault(asked, replied) == replied  # one question, one reply
    assert len(forms) == sum(map(len, questions.WORDINGS["english"].values()))
    again = DigitsPages(config, 300)
    assert all(turns_of(source[i]) == turns_of(again[i]) for i in range(300))


def test_both_wordings_show_the_same_page_and_ask_for_the_same():
    brief, english = (
        DigitsPages(DigitsConfig(kinds=("row",), wording=wording), 50)
        for wording in ("brief", "english")
    )
    for index in range(50):
        np.testing.assert_array_equal(page_digits(brief, index), page_digits(english, index))
        ((_, short),), ((_, long),) = turns_of(brief[index]), turns_of(english[index])
        assert long.endswith(f" {short}.")


@pytest.mark.parametrize("split", world.SPLITS)
def test_pictures_show_the_digits_and_scans_of_their_split(split):
    from sklearn.datasets import load_digits

    targets = load_digits().target
    labels = targets[:360] if split == "heldout" else targets[360:]
    source = DigitsPages(DigitsConfig(split=split), 12)
    for index in range(12):
        scans = read_page(source, source[index]["image"])
        assert labels[scans].tolist() == page_digits(source, index).ravel().tolist()


def test_splits_share_no_scan_and_no_layout():
    train, _ = glyphs.load_scans("train")
    heldout, _ = glyphs.load_scans("heldout")
    assert (len(train), len(heldout)) == (1437, 360)
    distances = np.abs(train.reshape(-1, 1, 64) - heldout.reshape(1, -1, 64)).sum(-1)
    assert distances.min() > 0
    worlds = [DigitsPages(DigitsConfig(split=split), 50) for split in world.SPLITS]
    assert sum(np.array_equal(*(page_digits(p, i) for p in worlds)) for i in range(50)) <= 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shapes_and_fields(config):
    item = DigitsPages(config, 3)[2]
    side = config.page_size
    if config.frames:
        pages = len(item["frames"])
        assert (config.fewest_frames or config.frames) <= pages <= config.frames
        assert item["frames"].shape == (pages, side, side, 3)
        assert "image" not in item
    else:
        assert item["image"].shape == (side, side, 3)
    picture = item["frames"] if config.frames else item["image"]
    assert picture.dtype == np.uint8
    assert picture.max() > 210 and picture.min() < 130  # ink on paper
    values = [turn["value"] for turn in item["conversations"]]
    speakers = [turn["from"] for turn in item["conversations"]]
    assert speakers == ["human", "gpt"] * len(turns_of(item))
    assert values[0].startswith("<image>") and "<image>" not in "".join(values[1:])
    assert config.kinds != ("caption",) or values[0] == "<image>"


def test_items_depend_on_config_and_index_only():
    config = DigitsConfig(augment=True, turns=2)
    forward, other = DigitsPages(config, 40), DigitsPages(config, 1_000_000)
    order = random.Random(0).sample(range(40), 40)
    shuffled = {index: other[np.int64(index)] for index in order}
    for index in range(40):
        np.testing.assert_equal(forward[index], shuffled[index])
    assert len({item["id"] for item in shuffled.values()}) == 40
    changed = DigitsPages(dataclasses.replace(config, seed=1), 40)
    assert any(not np.array_equal(forward[i]["image"], changed[i]["image"]) for i in range(40))
    assert repr(DigitsPages(config, 40)) == repr(forward) and "0x" not in repr(forward)


def test_kinds_and_answers_are_balanced():
    source = DigitsPages(DigitsConfig(), 4000)
    kinds, answers = collections.Counter(), collections.defaultdict(collections.Counter)
    for index in range(4000):
        plan = source._plan(index)
        kinds[plan.kinds[0]] += 1
        answers[plan.kinds[0]][plan.turns[0][1]] += 1
    assert set(kinds) == set(questions.KINDS) - {"caption", "needle"}
    assert max(kinds.values()) < 1.2 * min(kinds.values())
    for kind, options in {"position": 10, "count": 5, "largest": 10}.items():
        assert len(answers[kind]) == options
        # some 670 answers: four standard deviations around an even share
        share = kinds[kind] / options
        assert all(abs(n - share) < 4 * share**0.5 for n in answers[kind].values()), kind


@pytest.mark.parametrize("turns", [3, 5])
def test_a_conversation_asks_for_the_whole_page_alone_or_for_every_other_kind(turns):
    source = DigitsPages(DigitsConfig(turns=turns), 60)
    conversations = [source._plan(index).kinds for index in range(60)]
    assert ["read"] in conversations
    for kinds in (k for k in conversations if k != ["read"]):
        counts = collections.Counter(kinds)
        assert set(counts) <= {"position", "row", "column", "count", "largest"}
        assert counts.total() == turns
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len({tuple(kinds) for kinds in conversations}) > 6  # in every order


def test_items_are_those_that_models_were_trained_on():
    # A hash of the words, and the mean of the pixels: glyphs may round differently elsewhere.
    known = {
        DigitsConfig(augment=True): ("aef6c1a6ff339dcb", 208.1026),
        DigitsConfig(split="heldout"): ("d1f583b605e163bc", 202.0466),
        DigitsConfig(turns=3, seed=5): ("05942c06685c9597", 201.2141),
        DigitsConfig(kinds=("caption",)): ("dacc847553001362", 201.6781),
        DigitsConfig(frames=4, turns=2, rows=2, columns=2): ("6b0f32ae6eb27501", 202.4387),
    }
    for config, (words, light) in known.items():
        items = list(itertools.islice(DigitsPages(config, 40), 40))
        said = repr([(item["id"], item["conversations"], item["kind"]) for item in items])
        shown = [item["frames"] if config.frames else item["image"] for item in items]
        assert hashlib.sha256(said.encode()).hexdigest()[:16] == words, config
        assert np.mean(shown) == pytest.approx(light, abs=1e-3), config


def test_one_page_of_a_needle_video_differs_and_is_asked_for():
    config = dataclasses.replace(CONFIGS["needle"], split="heldout")
    source, lengths, places, answers = DigitsPages(config, 400), [], [], []
    for index in range(400):
        pages, number = page_digits(source, index), source.odd_page(index)
        others = np.delete(pages, number, axis=0)
        assert (pages[number] == pages[number].flat[0]).all()
        assert (others == others.flat[0]).all() and others.flat[0] != pages[number].flat[0]
        ((question, given),) = source._plan(index).turns
        assert question == questions.NEEDLE_QUESTION and given == str(pages[number].flat[0])
        lengths.append(len(pages))
        places.append(number / (len(pages) - 1))
        answers.append(given)
    assert set(lengths) == set(range(3, 10))
    assert min(collections.Counter(answers).values()) > 20  # of 40: no digit is a good guess
    # Depths are spread evenly: three standard errors of a mean of 400, and both ends are met.
    assert abs(np.mean(places) - 0.5) < 3 * 0.35 / 20 and {0, 1} < set(places)


def test_pages_of_a_needle_video_are_drawn_anew():
    item = DigitsPages(DigitsConfig(frames=6, kinds=("needle",), split="heldout"), 3)[1]
    seen = {frame.tobytes() for frame in item["frames"]}
    assert len(seen) == 6
    source = DigitsPages(DigitsConfig(frames=3, kinds=("needle",)), 2)
    labels = glyphs.load_scans("train")[1]
    for frame, grid in zip(source[0]["frames"], page_digits(source, 0), strict=True):
        scans = read_page(source, frame)
        assert labels[scans].tolist() == grid.ravel().tolist()
        assert len(set(scans)) > 5  # other hands in every cell


def test_source_feeds_grain():
    import grain

    source = DigitsPages(DigitsConfig(), 20)
    ids = [item["id"] for item in grain.MapDataset.source(source).shuffle(seed=0)]
    assert sorted(ids) == [source[i]["id"] for i in range(20)]
    with pytest.raises(IndexError):
        source[20]
    assert len(list(source)) == 20


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tokenizer_knows_every_word(tokenizer, config):
    source = DigitsPages(config, 100)
    for index in range(100):
        for question, given in turns_of(source[index]):
            text = f"{VICUNA_SYSTEM} USER: {question} ASSISTANT: {given}</s>"
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids, text
            assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
            answer_ids = tokenizer(given, add_special_tokens=False)["input_ids"]
            assert ids[-1 - len(answer_ids) : -1] == answer_ids  # the same in and out of context
            assert tokenizer.decode(ids[-1 - len(answer_ids) :], skip_special_tokens=True) == given


def test_tokenizer_maps_tokens_to_their_text(tokenizer):
    text = f"{VICUNA_SYSTEM} USER: how many 7s are on page 12? ASSISTANT: 2</s>"
    coded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    pieces = [text[start:end] for start, end in coded["offset_mapping"]]
    words = ["USER", ":", "how", "many", "7", "s", "are", "on", "page", "1", "2", "?"]
    assert pieces[-16:] == [*words, "ASSISTANT", ":", "2", "</s>"]
    assert tokenizer("User: WHICH")["input_ids"] == tokenizer("USER: which")["input_ids"]
    assert tokenizer("zebra", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer.decode(tokenizer("which page?")["input_ids"][1:]) == "which page?"


def test_token_numbers_stay(tokenizer):
    # Saved models count on these; new words belong at the end of the list.
    words = ["<unk>", "<s>", "</s>", "<pad>", "0", "9", "which", "human", "right"]
    assert tokenizer.convert_tokens_to_ids(words) == [0, 1, 2, 3, 4, 13, 25, 58, 84]


def test_saved_tokenizer_opens_as_any_other(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "USER: read the page. ASSISTANT: 7 1 0 4</s>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded("7 1 0 4")["input_ids"], skip_special_tokens=True) == "7 1 0 4"
    for name in ("unk_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "padding_side"):
        assert getattr(loaded, name) == getattr(tokenizer, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 29}, "page_size 29"),
        ({"rows": 0}, "rows"),
        ({"split": "test"}, "train, heldout"),
        ({"kinds": ("sum",)}, "position, row"),
        ({"kinds": ()}, "choose from"),
        ({"kinds": ("caption", "read"), "turns": 2}, "one turn"),
        ({"split": "heldout", "augment": True}, "train split"),
        ({"seed": -1}, "seed"),
        ({"frames": 8, "fewest_frames": 9}, "fewest_frames is 9; give 0 to frames, 8"),
        ({"frames": 8, "fewest_frames": 2, "kinds": ("needle",)}, "3 pages or more, not 2"),
        ({"kinds": ("needle", "row")}, "3 pages or more, not 0"),
        ({"wording": "french"}, "wording is 'french'; choose from brief, english"),
        ({"wording": "english", "kinds": ("caption",)}, "nor for kinds but position, row"),
        ({"wording": "english", "frames": 2}, "no words for videos"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        DigitsConfig(**change)


def test_empty_source_and_missing_scikit_learn_are_explained(monkeypatch):
    with pytest.raises(InputError, match="length is 0"):
        DigitsPages(DigitsConfig(), 0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    glyphs.load_scans.cache_clear()
    with pytest.raises(InputError, match=r"llava-mini-jax\[demo\]"):
        DigitsPages(DigitsConfig(), 1)
