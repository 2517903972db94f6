"""A conversation about images and videos of any length, in which nothing is computed twice.

    what is shown --session_media.py--> Media --.
                                                |--a Request--> an engine of one slot --> pieces
    turns, the new question --request.py--> ids-'                     |
                                         gallery: frames that were seen; the slot: what was read

Pre-fusion is causal with the text behind the image. So visual tokens and the keys and values of
patches do not depend on the question; and a position of the language model depends on the text
up to it alone. A question therefore costs its own text, run against every frame's keys and values,
and the positions that are new: the slot's cache is kept as far as the new conversation begins like
the old one. Memory on the device does not grow with a video but by the KV cache of its tokens.

Frames that are added later change the mean over frames, and with it all fused text: the language
model then reads its prompt again, the frames are not looked at again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from llava_mini_jax.data.batches.examples import Example, check_fits, make_example
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.text.conversation import IMAGE_MARK, Turn
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds, places, request, session_media
from llava_mini_jax.inference.answer import Answer, Settings
from llava_mini_jax.inference.engine import Engine
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.recompute import refuse_inside
from llava_mini_jax.inference.request import Picture, Video
from llava_mini_jax.inference.session_media import Shown
from llava_mini_jax.inference.shelf import PLACES, Budget
from llava_mini_jax.inference.ticket import Medium, Piece, Request, Ticket, Usage
from llava_mini_jax.inference.vision_tokens import VisionTokens, chosen, with_unasked

CHUNK = 8  # frames that are computed together


class Session:
    """Images, videos and questions about them, in the order in which you give them."""

    def __init__(
        self,
        model: Model,
        settings: Settings | None = None,
        *,
        budget: Budget | None = None,
        chunk: int = CHUNK,
        vision_tokens: VisionTokens = None,
    ):
        """`vision_tokens` is the default number for each image and frame, if the model supports
        several; None is the model's own.
        """
        refuse_inside(model.bundle.model)
        (settings or Settings()).seeds(1)
        (settings or Settings()).refuse_for_engine("a session")
        if chunk < 1:
            raise InputError(f"chunk is {chunk}; give 1 or more frames")
        if vision_tokens is not None:
            model = replace(model, bundle=with_unasked(model.bundle, vision_tokens))
        self.model, self.settings = model, model.with_stop_text(settings or Settings())
        self.turns: list[Turn] = []
        self.answer: Answer | None = None  # the last one
        # Hears, while a question is read, how many of its images and frames are seen, of how many.
        self.watch: Callable[[int, int], None] = lambda seen, frames: None
        self._shown: list[Shown] = []
        self._budget, self._chunk = budget or Budget(), chunk
        self._engine: Engine | None = None  # made for the first question, as long as that needs
        self._ticket: Ticket | None = None  # of the last question
        self._cut_off = False  # Ctrl-C, or a program that failed, has ended a step halfway
        self._broken = ""  # why a video cannot be read to its end
        self._moves = 0  # questions and images so far: an answer before the last one is over

    # ------------------------------------------------------------------------------- images

    def show_image(self, image: Picture) -> None:
        """Adds an image, which is read now; it comes before the next question."""
        self._check_frames(1)
        self._shown.append(session_media.picture(image, self.model.bundle))
        self._moves += 1

    def show_video(self, video: Video, sampling: FrameSampling | None = None) -> None:
        """Adds a video, whose frames are read when the next question is answered.

        `sampling` None is one frame a second, as the model's dialect samples them.
        Raises InputError at once if it is not a video, has more frames than the model has
        positions, or if the model's compressor supports images only.
        """
        request.refuse_videos(self.model.bundle)
        sampling = sampling or request.sampling_for(self.model.bundle)
        shown = session_media.video(video, sampling, self.model.bundle)
        self._check_frames(shown.frames)
        shown.read_ahead(self._chunk)
        self._shown.append(shown)
        self._moves += 1

    def append_frames(self, frames: Sequence[np.ndarray]) -> None:
        """Adds frames, uint8 [H, W, 3], to the last video, for example of a live stream.

        Raises InputError if no video was shown, or if an image was shown after it.
        """
        if not self._shown or self._shown[-1].is_picture:
            raise InputError("there is no video to append to; call show_video first")
        if isinstance(frames, np.ndarray):
            request.check_video(frames)
        request.check_kind(frames, Sequence | np.ndarray, "frames", "a list of uint8 arrays")
        frames = list(frames)
        for frame in frames:
            request.check_frame(frame, "frame of a video")
        self._check_frames(len(frames))
        self._shown[-1].append(frames)
        self._moves += 1

    @property
    def frames(self) -> int:
        """Images and frames shown so far, including those not yet read."""
        return sum(shown.frames for shown in self._shown)

    @property
    def usage(self) -> Usage | None:
        """The token counts of the last question, once its first piece has arrived; None before."""
        return None if self._ticket is None else self._ticket.usage

    def memory(self) -> dict[str, int]:
        """Bytes cached for the next question: frames by place, and the KV cache."""
        used: dict[str, int] = dict.fromkeys([*PLACES, "tokens", "kv cache"], 0)
        if self._engine is not None:
            used |= self._engine.gallery.used()
            used["kv cache"] = self._engine.cache_bytes()
        used.pop("media", None)
        used["host"] += sum(shown.pixel_bytes for shown in self._shown)
        return used

    def _check_frames(self, new: int) -> None:
        count = self.frames + new
        needed = count * bounds.tokens_per_image(self.model.bundle)
        longest = bounds.longest_prompt(self.model.bundle)
        most = self.model.bundle.model.llm.max_positions
        if needed >= longest:
            more = f", or allow up to {most} positions (--max-length)" if longest < most - 1 else ""
            raise InputError(
                f"{count} images and frames take {needed} positions, but the model has {longest} "
                "for them and the text: give fewer frames a second, or limit them (--fps, "
                f"--max-frames){more}"
            )

    # ------------------------------------------------------------------------------ questions

    def ask(
        self,
        question: str,
        *,
        steps: int = bounds.STEPS_STREAMING,
        vision_tokens: VisionTokens = None,
    ) -> Iterator[str]:
        """The answer in pieces; the turn counts once you have taken them all.

        Images shown since the last question come before this one. A piece holds up to
        `steps` tokens. `vision_tokens` is the number for each image shown so far, for this question
        alone: images are not encoded again for another number, videos are.

        Raises InputError at once if the conversation no longer fits the model, or the model does
        not support that number of tokens; and for a piece that you take after the session moved on.
        Nothing is computed before you take the first piece.
        """
        turns, where, bundle = self._with_marks(question), "the conversation", self.model.bundle
        counts = tuple(shown.frames for shown in self._shown)
        prompt = request.encode_turns(turns, len(counts), bundle, self.model.tokenizer, where)
        none = np.zeros((0, 1, 1, 1, 3), np.uint8)
        tokens = chosen(vision_tokens, bundle)
        example = make_example(prompt, none, counts, bundle.prompt, training=False, tokens=tokens)
        check_fits(
            example,
            bounds.tokens_per_image(bundle),
            bounds.longest_prompt(bundle),
            where,
        )
        self._moves += 1
        return self._said(turns, example, steps, self._moves)

    def _said(self, turns: list[Turn], example: Example, steps: int, move: int) -> Iterator[str]:
        self._refuse_late(move)
        yield from self._answer(example, steps, move)
        assert self.answer is not None
        # A model may say "<image>" too, where no image stands.
        said = self.answer.text.replace(IMAGE_MARK, "")
        self.turns = [*turns[:-1], Turn("assistant", said)]

    def new_conversation(self) -> None:
        """Forgets questions and answers; what was shown comes before the next question."""
        self._moves += 1
        self.turns, self.answer = [], None

    def answer_alone(self, question: str, *, vision_tokens: VisionTokens = None) -> Answer:
        """The answer in a new conversation, equal to Model.generate's about everything shown.

        It uses what earlier conversations have computed. Raises InputError as `ask` does.
        """
        self.new_conversation()
        steps = bounds.STEPS_WITH_STOP if self.settings.stop else bounds.STEPS
        for _ in self.ask(question, steps=steps, vision_tokens=vision_tokens):
            pass
        assert self.answer is not None
        return self.answer

    def _with_marks(self, question: str) -> list[Turn]:
        """The conversation, with an "<image>" before the question for each image shown since."""
        request.check_kind(question, str, "the question", "text")
        placed = sum((turn.text or "").count(IMAGE_MARK) for turn in self.turns)
        waiting, given = len(self._shown) - placed, question.count(IMAGE_MARK)
        if given not in (0, waiting):
            raise InputError(
                f'the question has "<image>" {given} times for {waiting} images or videos shown '
                "since the last one: write it once for each, or not at all"
            )
        text = f"{IMAGE_MARK}\n" * (waiting - given) + question
        return [*self.turns, Turn("user", text), Turn("assistant", None)]

    def _refuse_late(self, move: int) -> None:
        if self._moves != move:
            raise InputError(
                "the session moved on (another question, an image, a new "
                "conversation) before this answer was complete; ask again"
            )

    def _answer(self, example: Example, steps: int, move: int) -> Iterator[str]:
        heard: list[Piece | Exception] = []
        engine = self._engine_for(example)
        engine.call_steps = min(steps, bounds.STEPS)
        asked = Request(example, self._media(), self.settings)
        self._cut_off = True
        self._ticket = engine.submit(asked, heard.append)
        answer: Answer | None = None
        while answer is None:
            self._cut_off = True
            engine.step()
            self._cut_off = False
            self.watch(self._ticket.usage.seen, self._ticket.usage.frames)
            news, heard[:] = list(heard), []
            for one in news:
                if isinstance(one, InputError):
                    self._broken = str(one)
                if isinstance(one, Exception):
                    raise one
                if one.text:
                    yield one.text
                    self._refuse_late(move)
                answer = one.answer
        self.answer = answer

    def _engine_for(self, example: Example) -> Engine:
        """The engine, with a slot for a question and its answer."""
        if self._broken:
            raise InputError(self._broken)
        bundle = self.model.bundle
        prompt = places.needed(example, bundle)
        answer, _ = bounds.allowance(example, bundle, self.settings)
        length = bounds.slot_length(prompt, answer, bundle)
        if self._engine is None:
            lanes = [LaneSize(1, length)]
            self._engine = Engine(
                self.model, lanes, budget=self._budget, timed=False, chunk=self._chunk
            )
        if self._cut_off:
            self._engine.start_anew()
            self._cut_off = False
        if self._ticket is not None:  # of an answer that nobody has taken to its end
            self._ticket.cancel()
        self._engine.lengthen(length)
        return self._engine

    def _media(self) -> list[Medium]:
        return [shown.medium(b"%d" % number) for number, shown in enumerate(self._shown)]
