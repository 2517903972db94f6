"""The model as lmms-eval asks it: `lmms-eval --model llava_mini_jax --model_args pretrained=DIR`.

    requests (context, generation_kwargs, doc_to_visual, doc_id, task, split)
        --by settings, then by length--> windows --read by threads--> Examples, Sessions of videos
        --answered in batches, one by one--> texts, in the order of the requests

lmms-eval makes the prompts and scores the answers. It imports torch; nothing here does.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image

import llava_mini_jax
from llava_mini_jax.data.batches.examples import Example
from llava_mini_jax.data.media.video import PICTURE_SUFFIXES
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.answer import Answer, Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.request import sampling_for
from llava_mini_jax.inference.session import Session
from llava_mini_jax.inference.shelf import Budget

_WINDOW = 4  # batches whose images are read together
_MAX_NEW_TOKENS = 1024  # where a task does not say; LLaVA's wrapper takes the same
# What a task may say that changes nothing here: caching, and how other models cut images up.
_WITHOUT_EFFECT = {"until", "image_aspect_ratio", "use_cache"}


class LmmsRequest(NamedTuple):
    """`args` of lmms-eval's Instance, for models that are not given chat messages."""

    context: str
    generation_kwargs: Mapping[str, Any]
    doc_to_visual: Callable[[Any], Sequence[Any] | None]
    doc_id: int
    task: str
    split: str

    @property
    def where(self) -> str:
        return f"{self.task}, document {self.doc_id}"


class LmmsEvalModel(lmms):
    is_simple = True  # contexts and images, not chat messages

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        conv_template: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        use_until: bool = False,
        fps: float = 1.0,
        max_frames: int | None = None,
        max_batch_size: Any = None,  # these two are lmms-eval's; JAX chooses the device itself
        device: Any = None,
        **unknown: Any,
    ) -> None:
        """`pretrained`, `dtype`, `conv_template` and `max_length` are llava_mini_jax.load's.

        `use_until` ends answers before the strings that a task names. LLaVA's own wrapper ignores
        them: lmms-eval names "\\n\\n" for every task that names none, which cuts long answers.
        `fps` and `max_frames` choose the frames of videos.
        """
        super().__init__()
        if unknown:
            raise InputError(
                f"--model_args has {', '.join(sorted(unknown))}; known are pretrained, dtype,"
                " conv_template, max_length, use_until, fps and max_frames"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"--batch_size is {batch_size}; give a number, 1 or more")
        self.batch_size = int(batch_size)
        self.device = "cpu"  # where lmms-eval counts its own numbers
        self._use_until = use_until
        self._load: Callable[[], Model] = lambda: llava_mini_jax.load(
            str(pretrained), dtype=dtype, template=conv_template, max_length=max_length
        )
        self._model: Model | None = self._load()
        self._sampling = sampling_for(self._model.bundle, fps=fps, max_frames=max_frames)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers to all requests, in order.

        A request that cannot be read, or does not fit the model, gets the answer "" and a warning
        that names its document; lmms-eval's cache keeps no empty answers, so the next run asks it
        again.
        """
        from tqdm.auto import tqdm  # lmms-eval's own

        model = self._model = self._model or self._load()
        asked = [LmmsRequest(*request.args) for request in requests]
        settings = [settings_of(request, self._use_until) for request in asked]
        texts = [""] * len(asked)
        lost = 0
        with (
            ThreadPoolExecutor() as pool,
            tqdm(total=len(asked), disable=self.rank != 0, desc="llava_mini_jax") as bar,
        ):
            for same, numbers in self._windows(asked, settings):
                # Data sets are read by this thread, images are prepared by several.
                shown = [self._visuals(asked[number]) for number in numbers]
                prepare = partial(self._prepare, model, same)
                found = deque(pool.map(prepare, (asked[number] for number in numbers), shown))
                examples = [example for example in found if isinstance(example, Example)]
                answers = iter(model.answer_requests(examples, same, batch_size=self.batch_size))
                for number in numbers:
                    ready = found.popleft()  # an answered session goes, and its memory
                    if isinstance(ready, Session):
                        answer = _watch(asked[number], ready)
                    else:
                        answer = None if ready is None else next(answers)
                    bar.update()
                    if answer is None:
                        lost += 1
                        continue
                    texts[number] = answer.text
                    if answer.finish == "context":
                        warnings.warn(model.full_context(asked[number].where), stacklevel=2)
        if lost:
            warnings.warn(f"{lost} of {len(asked)} requests have no answer", stacklevel=2)
        return texts

    def _windows(
        self, asked: Sequence[LmmsRequest], settings: Sequence[Settings]
    ) -> Iterator[tuple[Settings, list[int]]]:
        """Numbers of requests that are answered together, the shorter ones first."""
        groups: dict[Settings, list[int]] = {}
        for number, same in enumerate(settings):
            groups.setdefault(same, []).append(number)
        size = _WINDOW * self.batch_size
        for same, numbers in groups.items():
            # A batch is as long as its longest row.
            numbers.sort(key=lambda number: len(asked[number].context))
            for start in range(0, len(numbers), size):
                yield same, numbers[start : start + size]

    def _visuals(self, request: LmmsRequest) -> list[Any]:
        document = self.task_dict[request.task][request.split][request.doc_id]
        return [shown for shown in request.doc_to_visual(document) or [] if shown is not None]

    def _prepare(
        self, model: Model, settings: Settings, request: LmmsRequest, shown: Sequence[Any]
    ) -> Example | Session | None:
        """A request as an Example or, where it shows a video of whatever length, a Session."""
        images: list[Any] = []
        videos: list[Any] = []
        try:
            for given in shown:
                (videos if _is_video(given, request.where) else images).append(given)
            if not videos:
                pictures = model.read_pictures(images, videos, self._sampling)
                return model.request(request.context, pictures, request.where)
            # One question is asked of it, so nothing of its frames is worth keeping.
            session = Session(model, settings, budget=Budget(host=0))
            for image in images:
                session.show_image(image)
            for video in videos:
                session.show_video(video, self._sampling)
            return session
        except InputError as error:
            return _not_asked(request, error)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("llava_mini_jax answers generate_until tasks only")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("llava_mini_jax answers generate_until tasks only")

    def clean(self) -> None:
        """Frees the weights, so that a judge may use the device; the next request reloads them."""
        self._model = None


def settings_of(request: LmmsRequest, use_until: bool) -> Settings:
    """A task's generation_kwargs as settings; InputError for what this model cannot do."""
    given = dict(request.generation_kwargs)  # shared by all requests of the task
    beams = given.pop("num_beams", None) or 1
    if beams != 1:
        raise InputError(
            f"{request.task} has num_beams {beams}; only 1 is known: give --gen_kwargs num_beams=1"
        )
    until = given.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
    temperature = given.pop("temperature", None)
    drawn = given.pop("do_sample", None)
    if temperature is None:
        temperature = 1.0 if drawn else 0.0
    if drawn is False:
        temperature = 0.0
    top_p, top_k = given.pop("top_p", None), given.pop("top_k", None)
    greedy = temperature == 0  # tasks then say anything, "top_p: 0" too
    tokens = given.pop("max_new_tokens", None)
    if left := sorted(given.keys() - _WITHOUT_EFFECT):
        warnings.warn(f"{request.task}: {', '.join(left)} of its settings is ignored", stacklevel=2)
    return Settings(
        max_new_tokens=_MAX_NEW_TOKENS if tokens is None else int(tokens),
        temperature=float(temperature),
        top_p=1.0 if greedy or top_p is None else float(top_p),
        top_k=0 if greedy or top_k is None else int(top_k),
        stop=until if use_until else (),
    )


def _watch(request: LmmsRequest, session: Session) -> Answer | None:
    try:
        return session.answer_alone(request.context)
    except InputError as error:
        return _not_asked(request, error)


def _not_asked(request: LmmsRequest, error: InputError) -> None:
    warnings.warn(f"{request.where}: not asked: {error}", stacklevel=3)


def _is_video(given: Any, where: str) -> bool:
    """Tasks give images as Pillow images and videos as paths, now and then an image as one."""
    if isinstance(given, Image.Image):
        return False
    if not isinstance(given, str | Path):
        raise InputError(
            f"{where} shows a {type(given).__name__}; this model reads Pillow images and the paths"
            " of images and videos"
        )
    suffix = Path(given).suffix.lower()
    return Path(given).is_dir() or suffix == ".gif" or suffix not in PICTURE_SUFFIXES
