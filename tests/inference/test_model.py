"""Models as people use them: load a folder, ask, stream, batch; on tiny random weights."""

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import llava_mini_jax
from llava_mini_jax import InputError, Model
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.text.conversation import Turn
from llava_mini_jax.inference import recompute
from llava_mini_jax.inference.answer import Answer, Settings
from llava_mini_jax.inference.model import compiled_programs
from llava_mini_jax.inference.request import sampling_for
from llava_mini_jax.inference.session import Session
from llava_mini_jax.sharding import make_mesh
from tests import tiny, tiny_model
from tests.inference.steps import said

fast_compilation = tiny.fast_compilation

QUESTION = "which digit is in row 1 column 2?"


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_mini_jax.load(tiny_model.folder("paper"))


@pytest.fixture(scope="module")
def release() -> Model:
    return llava_mini_jax.load(tiny_model.folder("release"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    tiny_model.write_video(folder / "clip.mp4", seconds=3)
    pictures = {
        name: tiny_model.write_picture(folder / name, ord(name[0])) for name in ("a.png", "b.png")
    }
    return {"clip.mp4": folder / "clip.mp4", **pictures}


def requests(files: dict[str, Path]) -> list[tuple]:
    """(prompt, images, videos) of every kind."""
    image = files["a.png"]
    return [
        (QUESTION, image, None),
        ("what is this?", [image, files["b.png"].read_bytes()], None),
        ("first <image> and then <image> ?", [image, tiny_model.picture(3)], None),
        ("how many 7s are there?", None, files["clip.mp4"]),
        ("read the page.", [image], [files["clip.mp4"], np.stack([tiny_model.picture(5)])]),
        ("the largest digit", None, None),
    ]


def with_eos(model: Model, *ids: int) -> Model:
    return dataclasses.replace(model, bundle=dataclasses.replace(model.bundle, eos_ids=ids))


def with_prompt(model: Model, **changes) -> Model:
    prompt = dataclasses.replace(model.bundle.prompt, **changes)
    return dataclasses.replace(model, bundle=dataclasses.replace(model.bundle, prompt=prompt))


# --- Answers --------------------------------------------------------------------------------------


def test_pictures_of_every_kind_and_streamed_is_whole(model: Model, files: dict[str, Path]) -> None:
    answers = []
    for prompt, images, videos in requests(files):
        answer = model.generate(prompt, images, videos, max_new_tokens=12)
        pieces = list(model.stream(prompt, images, videos, max_new_tokens=12))
        assert "".join(pieces) == answer and len(pieces) > 1 and all(pieces)
        answers.append(answer)
    assert len(set(answers)) == len(answers), "images and questions must matter"


@pytest.mark.parametrize("name", ["model", "release"])
def test_a_batch_answers_as_each_row_alone(
    name: str, files: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    asked = requests(files)
    if name == "release":
        asked = [(QUESTION, files["a.png"], None), ("a human", files["b.png"], None)]
    prompts, images, videos = zip(*asked, strict=True)
    alone = [model.generate(*row, max_new_tokens=12) for row in asked]
    assert model.generate(prompts, images, videos, max_new_tokens=12) == alone
    assert model.generate(prompts, images, videos, max_new_tokens=12, stop=["zzz"]) == alone
    assert model.generate([]) == []


def test_blank_images_for_rows_without_one(release: Model) -> None:
    blank = with_prompt(release, blank_image=True)
    shown = blank.request(QUESTION, blank.read_pictures(None, None))
    assert shown.pixels.shape == (1, 1, 16, 16, 3) and not shown.pixels.any()
    with_blank = blank.generate(QUESTION, max_new_tokens=8)
    assert with_blank != release.generate(QUESTION, max_new_tokens=8)


def test_a_mesh_gives_the_same_answer(model: Model, files: dict[str, Path]) -> None:
    with jax.set_mesh(make_mesh(tensor=2)):
        split = llava_mini_jax.load(tiny_model.folder("paper"))
        assert len(split.params.llm.layers[0].q_proj.addressable_shards) == 2
        answer = split.generate(QUESTION, files["a.png"], max_new_tokens=12)
    assert answer == model.generate(QUESTION, files["a.png"], max_new_tokens=12)


@pytest.mark.slow  # a model over two devices
def test_rows_split_over_devices_have_the_same_answers(
    model: Model, files: dict[str, Path]
) -> None:
    questions = [QUESTION, "what", "a human", "read the page"]
    pictures = [files["a.png"], None, None, files["a.png"]]
    how = dict(max_new_tokens=6, temperature=0.7, seed=3)
    with jax.set_mesh(make_mesh(data=2)):
        split = llava_mini_jax.load(tiny_model.folder("paper"))
        answers = split.generate(questions, pictures, **how)
        assert split.generate(QUESTION, files["a.png"], **how) == answers[0]
    assert answers == model.generate(questions, pictures, **how)


def test_batches_are_of_one_kind_of_pixels_and_of_similar_length(release: Model) -> None:
    blank = with_prompt(release, blank_image=True)
    examples = [
        blank.request(prompt, blank.read_pictures(image, None))
        for prompt in ("a " * 30, "a", "a " * 20)
        for image in (None, tiny_model.picture(0))
    ]
    assert list(recompute.batches(examples, blank.bundle, 2)) == [[2, 4], [0], [3, 5], [1]]


def test_sampling_depends_on_the_seed_and_the_row_alone(model: Model) -> None:
    def ask(prompts, seed):
        return model.generate(prompts, max_new_tokens=8, temperature=1.0, top_k=50, seed=seed)

    assert ask(QUESTION, 1) == ask(QUESTION, 1) != ask(QUESTION, 2)
    four = ask([QUESTION] * 4, 1)
    assert len(set(four)) == 4 and four[0] == ask(QUESTION, 1)
    # Neither the rows beside one nor the batches they are answered in change it.
    assert ask([QUESTION, "a human"], 1)[0] == four[0]
    assert ask(["what is this digit in the first row ?", QUESTION, "a"], 1)[1] == four[1]
    assert model.generate([QUESTION] * 4, temperature=1.0, top_k=50, seed=1, max_new_tokens=8,
                          batch_size=3) == four  # fmt: skip
    # Seeds of one's own are those that each prompt has alone.
    assert ask([QUESTION, "a human"], [1, 2]) == [ask(QUESTION, 1), ask("a human", 2)]
    with pytest.raises(InputError, match="seed is a list of 3; give 2, one a prompt"):
        ask([QUESTION, "a human"], [1, 2, 3])
    with pytest.raises(InputError, match="seed is a list of 2; give 1"):
        model.stream(QUESTION, seed=[1, 2])


def test_nothing_is_compiled_twice(model: Model, files: dict[str, Path]) -> None:
    def some_requests(seed: int) -> None:
        rng = np.random.default_rng(seed)
        words = " ".join(rng.choice(["how", "many", "digits"], rng.integers(1, 9)))
        picture = tiny_model.picture(seed)
        tokens, temperature = int(rng.integers(1, 17)), float(rng.choice([0.0, 0.5]))
        model.generate(words, picture, max_new_tokens=tokens, temperature=temperature, seed=seed)
        model.generate([words, "a"], [None, picture], max_new_tokens=tokens)
        list(model.stream(words, [picture] * 2, max_new_tokens=tokens, stop=["which", "is 2"]))

    some_requests(0)
    warm = compiled_programs()
    for seed in range(1, 20):
        some_requests(seed)
    assert compiled_programs() == warm > 0


# --- Where answers end ----------------------------------------------------------------------------


def one_answer(model: Model, prompt: str = QUESTION, **changes) -> Answer:
    (answer,) = model.answers([prompt], None, None, Settings(**changes))
    return answer


@pytest.mark.parametrize("count", [1, 15, 16, 17])
def test_never_more_tokens_than_asked(model: Model, count: int) -> None:
    assert one_answer(model, max_new_tokens=count) == Answer(
        model.generate(QUESTION, max_new_tokens=count), count, "length"
    )


def test_stops_at_any_of_the_stop_tokens(model: Model) -> None:
    ids = first_ids(model, 6)
    stop = ids[4]
    cut = ids[: ids.index(stop)]
    answer = one_answer(with_eos(model, 84, stop), max_new_tokens=6)
    assert (answer.tokens, answer.finish) == (len(cut), "stop")
    assert model.stop_ids == (model.tokenizer.eos_token_id,)  # template's, tokenizer's, config's


def first_ids(model: Model, count: int) -> list[int]:
    """Ids of the greedy answer, found by forbidding nothing and reading what was pushed."""
    example = model.request(QUESTION, model.read_pictures(None, None))
    return said(model, [example], Settings(max_new_tokens=count)).ids[0]


def test_stop_strings_are_cut_off_and_never_begin_to_show(model: Model) -> None:
    whole = model.generate(QUESTION, max_new_tokens=16)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 5]
    expected = whole[: whole.index(stop)].strip()
    assert model.generate(QUESTION, max_new_tokens=16, stop=["never", stop]) == expected
    pieces = list(model.stream(QUESTION, max_new_tokens=16, stop=["never", stop]))
    assert "".join(pieces) == expected
    assert one_answer(model, max_new_tokens=16, stop=[stop]).finish == "stop"
    # In a batch, the other rows go on.
    both = model.generate([QUESTION, "a human"], max_new_tokens=16, stop=[stop])
    assert both == [expected, model.generate("a human", max_new_tokens=16, stop=[stop])]


def test_a_full_context_ends_the_answer_and_says_so() -> None:
    model = llava_mini_jax.load(tiny_model.folder("paper", positions=64))
    used = len(model.request(QUESTION, model.read_pictures(None, None)).ids)
    assert one_answer(model).finish == "context" and one_answer(model).tokens == 64 - used
    with pytest.warns(UserWarning, match="fill all 64 positions"):
        answer = model.generate(QUESTION)
    with pytest.warns(UserWarning, match="fill all 64 positions"):
        assert "".join(model.stream(QUESTION)) == answer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(QUESTION, max_new_tokens=64 - used)


# --- Conversations --------------------------------------------------------------------------------


def test_a_chat_is_the_conversation_so_far(model: Model, files: dict[str, Path]) -> None:
    chat = Session(model, Settings(max_new_tokens=6))
    chat.show_image(files["a.png"])
    first = "".join(chat.ask("what is this?"))
    second = "".join(chat.ask("and the last digit?"))
    turns = [
        Turn("user", "<image>\nwhat is this?"),
        Turn("assistant", first),
        Turn("user", "and the last digit?"),
    ]
    assert model.generate(turns, files["a.png"], max_new_tokens=6) == second
    assert model.generate([turns], [files["a.png"]], max_new_tokens=6) == [second]
    assert [turn.text for turn in chat.turns] == [*(turn.text for turn in turns), second]


def test_release_rule_for_frames_squeezes_files(model: Model, files: dict[str, Path]) -> None:
    release_rule = FrameSampling(fps=1.0, rule="release")
    ours = model.read_pictures(None, files["clip.mp4"])
    theirs = model.read_pictures(None, files["clip.mp4"], release_rule)
    assert ours.frames == theirs.frames == (3,) and ours.pixels.shape == theirs.pixels.shape
    fill = (np.array(model.bundle.images.mean) * 255).astype(int)
    assert np.abs(ours.pixels[:, 0, 0] - fill).max() <= 8, "the top is padding"
    assert np.abs(theirs.pixels[:, 0, 0] - fill).max() > 8, "nothing is padded"


def test_frames_in_a_folder_are_pictures_not_squeezed(release: Model, tmp_path: Path) -> None:
    """The release squeezes the frames of video files alone (docs/release.md, "Videos")."""
    pictures = []
    for n in range(3):
        noise = np.random.default_rng(n).integers(0, 256, (32, 80, 3), dtype=np.uint8)
        pictures.append(tmp_path / f"{n}.png")
        Image.fromarray(noise).save(pictures[-1])
    assert sampling_for(release.bundle).rule == "release"
    shown = release.read_pictures(None, tmp_path)
    assert shown.frames == (3,)
    expected = release.read_pictures(pictures, None).pixels
    np.testing.assert_array_equal(shown.pixels, expected)
    session = Session(release, Settings(max_new_tokens=6))
    session.show_video(tmp_path)
    (medium,) = session._media()
    np.testing.assert_array_equal(np.stack(list(medium.read())), expected)


def test_videos_are_read_in_the_dialect_of_the_weights(
    model: Model, release: Model, files: dict[str, Path]
) -> None:
    """As eval.py reads them, wherever no sampling is given."""
    clip = files["clip.mp4"]
    for asked, rule in ((model, "time_stamps"), (release, "release")):
        assert sampling_for(asked.bundle) == FrameSampling(fps=1.0, rule=rule)
        pixels = asked.read_pictures(None, clip).pixels
        given = asked.read_pictures(None, clip, sampling_for(asked.bundle)).pixels
        np.testing.assert_array_equal(pixels, given)
        session = Session(asked, Settings(max_new_tokens=6))
        session.show_video(clip)
        (medium,) = session._media()
        np.testing.assert_array_equal(np.stack(list(medium.read())), pixels)
    ours = model.read_pictures(None, clip).pixels
    assert (ours != release.read_pictures(None, clip).pixels).any()


def test_template_and_length_may_be_given() -> None:
    folder = tiny_model.folder("paper")
    given = llava_mini_jax.load(folder, template="brief", max_length=100)
    assert (given.bundle.prompt.template, given.bundle.prompt.max_length) == ("brief", 100)
    with pytest.raises(InputError, match="but the model has 100"):
        given.generate("digits " * 120)
    for template, max_length, expected in (
        ("welsh", None, 'template "welsh" is unknown; give one of plain, vicuna_v1'),
        (None, 257, "max_length is 257; give 2 to 256"),
        (None, 1, "max_length is 1; give 2 to 256"),
    ):
        with pytest.raises(InputError, match=expected):
            llava_mini_jax.load(folder, template=template, max_length=max_length)


# --- What cannot be used --------------------------------------------------------------------------

BAD_CALLS = {
    "more marks": (dict(prompts="<image> <image> what?", images=[b""]), "empty"),
    "marks without images": (dict(prompts="<image> what?"), '"<image>" 1 times for 0'),
    "array of floats": (dict(prompts="a", images=np.zeros((4, 4, 3))), "uint8"),
    "number as image": (dict(prompts="a", images=[3]), "int"),
    "number as prompt": (dict(prompts=[3]), "text, or a list of Turns"),
    "images not nested": (dict(prompts=["a", "b"], images="a.png"), "one file for 2 prompts"),
    "too few lists": (dict(prompts=["a", "b"], images=[None]), "1 entries for 2 prompts"),
    "closed conversation": (
        dict(prompts=[Turn("user", "a"), Turn("assistant", "b")]),
        "ends with an answer",
    ),
    "max_new_tokens": (dict(prompts="a", max_new_tokens=0), "max_new_tokens is 0"),
    "temperature": (dict(prompts="a", temperature=-1.0), "temperature is -1.0"),
    "top_p": (dict(prompts="a", top_p=0.0), "top_p is 0.0"),
    "top_k": (dict(prompts="a", top_k=-1), "top_k is -1"),
    "seed": (dict(prompts="a", seed=-1), "seed is -1"),
    "stop": (dict(prompts="a", stop="abc"), "stop is 'abc'"),
    "empty stop": (dict(prompts="a", stop=[""]), "none of them empty"),
    "batch_size": (dict(prompts=["a", "b"], batch_size=0), "batch_size is 0"),
    "too long": (dict(prompts="digits " * 300), "positions"),
    "open image for a list": (
        dict(prompts=["a"], images=Image.new("RGB", (8, 8))),
        "one file for 1 prompts",
    ),
    "no character": (dict(prompts="which \udcff digit"), "'\\udcff' at character 7"),
    "large top_k": (dict(prompts="a", top_k=99999999999), "top_k is 99999999999"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_in_words(model: Model, name: str) -> None:
    arguments, said = BAD_CALLS[name]
    with pytest.raises(InputError) as caught:
        model.generate(**arguments)
    assert said in str(caught.value)


def test_errors_name_the_prompt_and_the_arithmetic(model: Model, files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"prompt 2 of 2: .*2 times for 1 images"):
        model.generate(["a", "<image> and <image>"], [None, files["a.png"]])
    long = "digits " * 300
    with pytest.raises(InputError, match=r"needs (\d+) positions \((\d+) of text, 1 for images"):
        model.generate(long, files["a.png"])
    with pytest.raises(InputError, match="but the model has 255"):
        next(iter(model.stream(long)))


def test_dtypes(model: Model) -> None:
    half = llava_mini_jax.load(tiny_model.folder("paper"), dtype="bfloat16")
    assert half.params.llm.embed_tokens.dtype == "bfloat16" and half.generate("a", max_new_tokens=4)
    with pytest.raises(InputError, match='dtype "int2"'):
        llava_mini_jax.load(tiny_model.folder("paper"), dtype="int2")


# --- The package ----------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, llava_mini_jax, llava_mini_jax.cli;"
        "heavy = {'jax', 'numpy', 'transformers', 'flax', 'rich'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    assert {"load", "Model", "InputError", "__version__"} <= set(dir(llava_mini_jax))
    assert llava_mini_jax.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = llava_mini_jax.train  # pyright: ignore
