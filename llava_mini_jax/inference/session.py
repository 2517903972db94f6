"""A conversation about pictures and videos of any length, in which nothing is computed twice.

    frames, read by a thread --chunks--> tower -> compressor -> pre-fusion's keys and values
                                            |                         |           '--> Shelf
                                            v                         v
                                     visual tokens          fused text, summed over frames
                                            '-------- spliced --------'
                                                         |
              what the KV cache has already ----> the rest, prefilled in blocks --> decode

Pre-fusion is causal with the text behind the picture. So visual tokens and the keys and values of
patches do not depend on the question; and a position of the language model depends on the text
up to it alone. A question therefore costs its own text, run against every frame's keys and values,
and the positions that are new: the cache is kept as far as the new conversation begins like the
old one. Memory on the device does not grow with a video but by the KV cache of its tokens.

Frames that are added later change the mean over frames, and with it all fused text: the language
model then reads its prompt again, the frames are not looked at again.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.data.batches.examples import (
    Example,
    check_fits,
    fused_places,
    make_example,
    power_of_two,
)
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.text.conversation import IMAGE_MARK, Turn
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds, generate, request, session_programs
from llava_mini_jax.inference.answer import Answer, Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.request import Picture, Video
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.inference.session_media import Watched
from llava_mini_jax.inference.shelf import Budget
from llava_mini_jax.models.llava_mini import put_mean

CHUNK = 8  # frames that are computed together


class Session:
    """Pictures, videos and questions about them, in the order in which they are given."""

    def __init__(
        self,
        model: Model,
        settings: Settings | None = None,
        *,
        budget: Budget | None = None,
        chunk: int = CHUNK,
    ):
        if model.bundle.model.inside_layers:
            raise InputError(
                "a session keeps what does not depend on the question; a model that compresses "
                "inside the language model has nothing like that: use Model.generate or eval.py"
            )
        (settings or Settings()).seeds(1)
        (settings or Settings()).refuse_for_engine("a session")
        if chunk < 1:
            raise InputError(f"chunk is {chunk}; give 1 or more frames")
        self.model, self.settings = model, model.with_stop_text(settings or Settings())
        self.turns: list[Turn] = []
        self.answer: Answer | None = None  # the last one
        self._watched = Watched(model, budget or Budget(), chunk)
        self._cache: Any = None  # also while a program has it, which may never give it back
        self._cached = np.zeros(0, np.int64)  # what stands in the cache's slots (`_marks`)
        self._moves = 0  # questions and pictures so far: an answer before the last one is over

    # ------------------------------------------------------------------------------- pictures

    def show_image(self, image: Picture) -> None:
        """Adds a picture, which is read now; it stands before the next question."""
        self._check_frames(1)
        self._watched.show_image(image)
        self._forget()

    def show_video(self, video: Video, sampling: FrameSampling | None = None) -> None:
        """Adds a video, which is read while it is asked about.

        `sampling` None: one frame a second, as the model's dialect chooses them.
        Raises InputError at once for what is no video, or has more frames than the model has
        positions.
        """
        sampling = sampling or request.sampling_for(self.model.bundle)
        medium = self._watched.open_video(video, sampling)
        self._check_frames(medium.expected)
        self._watched.media.append(medium)
        self._forget()

    def append_frames(self, frames: Sequence[np.ndarray]) -> None:
        """More frames, uint8 [H, W, 3], of the last video: one that is still being made.

        Raises InputError where none has been shown, or a picture since.
        """
        if not self._watched.media or self._watched.media[-1].is_picture:
            raise InputError("there is no video to append to; begin with show_video")
        if isinstance(frames, np.ndarray):
            request.check_video(frames)
        request.check_kind(frames, Sequence | np.ndarray, "frames", "a list of uint8 arrays")
        self._check_frames(len(frames))
        self._watched.append_frames(frames)
        self._forget()

    def _forget(self) -> None:
        """All earlier text is fused with the new picture too: the cache holds nothing of use."""
        self._moves += 1
        self._cached = self._cached[:0]

    @property
    def frames(self) -> int:
        """Images and frames that have been shown, those not yet read included."""
        return self._watched.frames

    def memory(self) -> dict[str, int]:
        """Bytes that are kept for the next question: frames by place, and the KV cache."""
        cache = 0 if self._cache is None else sum(x.nbytes for x in jax.tree.leaves(self._cache))
        return {**self._watched.memory(), "kv cache": cache}

    def _check_frames(self, new: int) -> None:
        count = self.frames + new
        needed = count * bounds.tokens_per_image(self.model.bundle)
        longest = bounds.longest_prompt(self.model.bundle)
        most = self.model.bundle.model.llm.max_positions
        if needed >= longest:
            more = f", or allow up to {most} positions (--max-length)" if longest < most - 1 else ""
            raise InputError(
                f"{count} images and frames take {needed} positions, but the model has {longest} "
                "for them and the text: give fewer frames a second, or at most so many of them "
                f"(--fps, --max-frames){more}"
            )

    # ------------------------------------------------------------------------------ questions

    def ask(self, question: str, *, steps: int = bounds.STEPS_STREAMING) -> Iterator[str]:
        """The pieces of the answer; the turn counts once they have all been taken.

        Pictures shown since the last question stand in front of this one. A piece holds up to
        `steps` tokens. Raises InputError at once where the conversation no longer fits the model;
        and for a piece that is taken after the session has gone on. Nothing is computed before the
        first piece is taken.
        """
        turns, where, bundle = self._with_marks(question), "the conversation", self.model.bundle
        counts = tuple(medium.expected for medium in self._watched.media)
        prompt = request.encode_turns(turns, len(counts), bundle, self.model.tokenizer, where)
        none = np.zeros((0, 1, 1, 1, 3), np.uint8)
        example = make_example(prompt, none, counts, bundle.prompt, training=False)
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
        # A model may say "<image>" too, where no picture stands.
        said = self.answer.text.replace(IMAGE_MARK, "")
        self.turns = [*turns[:-1], Turn("assistant", said)]

    def new_conversation(self) -> None:
        """Forgets questions and answers; what was shown stands before the next question."""
        self._moves += 1
        self.turns, self.answer = [], None

    def answer_alone(self, question: str) -> Answer:
        """The answer in a new conversation: Model.generate's about everything that was shown.

        What earlier conversations have computed is used. Raises InputError as `ask`.
        """
        self.new_conversation()
        steps = bounds.STEPS_WITH_STOP if self.settings.stop else bounds.STEPS
        for _ in self.ask(question, steps=steps):
            pass
        assert self.answer is not None
        return self.answer

    def _with_marks(self, question: str) -> list[Turn]:
        """The conversation, with an "<image>" before the question for each picture shown since."""
        request.check_kind(question, str, "the question", "text")
        placed = sum((turn.text or "").count(IMAGE_MARK) for turn in self.turns)
        waiting, given = len(self._watched.media) - placed, question.count(IMAGE_MARK)
        if given not in (0, waiting):
            raise InputError(
                f'the question has "<image>" {given} times for {waiting} pictures or videos shown '
                "since the last one: write it once for each, or not at all"
            )
        text = f"{IMAGE_MARK}\n" * (waiting - given) + question
        return [*self.turns, Turn("user", text), Turn("assistant", None)]

    def _refuse_late(self, move: int) -> None:
        if self._moves != move:
            raise InputError(
                "the session has gone on (another question, a picture, a new conversation) "
                "before this answer was taken to its end; ask again"
            )

    def _answer(self, example: Example, steps: int, move: int) -> Iterator[str]:
        bundle, tokenizer, stop_ids = self.model.bundle, self.model.tokenizer, self.model.stop_ids
        text = bounds.empty_text(example, bundle, tokenizer, stop_ids, self.settings)
        prompt, room = self._marks(example.ids, example.fuse), power_of_two(text.allowance)
        places_T = np.flatnonzero(example.ids >= 0)
        logits_BV = self._prefill(self._fused_text(example), prompt, places_T, room)
        position_B = jnp.full(1, len(prompt), jnp.int32)
        state = generate.begun(self._cache, logits_BV, position_B, room)
        for new_N in self._decode(state, steps, text.allowance):
            if piece := text.push(new_N):
                yield piece
            self._refuse_late(move)
            if text.finish is not None:
                break
        self.answer = text.answer

    def _decode(self, state: generate.Decoding, steps: int, most: int) -> Iterator[np.ndarray]:
        """Up to `most` token ids: the first one, then what each call of up to `steps` adds."""
        model, s = self.model, self.settings
        sampling = make_sampling(1, s.temperature, s.top_p, s.top_k, s.seeds(1), model.stop_ids)
        cfg, ahead = model.bundle.model, bounds.runs_ahead(s, steps)
        calls = generate.Calls(model.params, state, sampling, cfg, steps=steps, most=most)
        (new_N,) = calls.first()
        while True:
            yield new_N
            last = new_N[-1:]  # known, but not in the cache before it is decoded
            # Donated: where the call is interrupted there is no cache, rather than a deleted one.
            self._cache = None
            if not calls.unread:
                calls.dispatch()
            if ahead and calls.known < most:
                calls.dispatch()
            (new_N,) = calls.read()
            self._cache = calls.state.cache
            # In the cache an answer is plain text; where history is fused, it differs from here on.
            # What a call ahead has written behind that is written over.
            decoded_N = np.concatenate([last, new_N[:-1]])
            self._cached = np.concatenate([self._cached, _text_marks(decoded_N, fuse=False)])

    # ------------------------------------------------------------------------------- one pass

    def _fused_text(self, example: Example) -> jax.Array:
        """A prompt's text [1, T, D], padded to a bucket and fused."""
        params, cfg, buckets = self.model.params, self.model.bundle.model, self.model.buckets
        ids_BT = np.zeros((1, buckets.length(len(example.ids))), np.int32)
        ids_BT[0, : len(example.ids)] = example.ids
        # Room for all, as in `collate`.
        fuse_BF = jnp.asarray(fused_places([example.fuse], ids_BT.shape[1]))
        text_BTD, text_BFD = generate.embed_text(params, ids_BT, fuse_BF, cfg)
        # The mean over all frames; new ones are encoded on the way.
        total_FD, frames = jnp.zeros(text_BFD.shape[1:], jnp.float32), 0
        for memory, count in self._watched.memories():
            if memory is not None:
                total_FD = session_programs.prefuse_text(
                    params, total_FD, memory, np.int32(count), text_BFD, cfg
                )
            del memory  # so that two chunks are never on the device at once
            frames += count
        if params.prefusion is None or not frames:
            return text_BTD
        return put_mean(total_FD[None], jnp.full(1, frames), text_BTD, fuse_BF)

    def _prefill(
        self, text_BTD: jax.Array, prompt: np.ndarray, places_T: np.ndarray, room: int
    ) -> jax.Array:
        """Logits [1, V] behind the prompt; the cache keeps what it has in common with it.

        `places_T` are the places of text in `text_BTD`, image marks left out.
        """
        params, cfg = self.model.params, self.model.bundle.model
        # At least one position is computed: the logits behind the prompt come from it.
        same = 0 if self._cache is None else min(len(self._cached), len(prompt) - 1)
        common = int(np.argmin(np.append(self._cached[:same] == prompt[:same], False)))
        needed, _ = session_programs.sizes(len(prompt), room)
        cache, self._cache = self._cache, None
        cache = session_programs.with_room(cache, needed, common, cfg)
        visual_VD = self._watched.visual()
        logits_BV = None
        length = session_programs.length(cache.valid_BS.shape[1])
        for start in range(common, len(prompt), length):
            marks = prompt[start : start + length]
            size = session_programs.block(len(marks))
            slots_S = np.full(size, -1, np.int32)
            # A block's own visual tokens only: those of a long video stay on the host.
            visual_SD = np.zeros((size, cfg.llm.width), text_BTD.dtype)
            for place in np.flatnonzero(marks < 0):
                visual_SD[place] = visual_VD[-1 - marks[place]]
            # A text's place among the text is its place in the prompt less the visual ones before.
            before = np.cumsum(prompt >= 0)[start : start + len(marks)] - 1
            slots_S[: len(marks)] = np.where(
                marks < 0, text_BTD.shape[1] + np.arange(len(marks)), places_T[before]
            )
            logits_BV, cache = session_programs.prefill_block(
                params, cache, text_BTD, visual_SD[None], slots_S[None], np.int32(start),
                np.int32(len(marks)), cfg,
            )  # fmt: skip
        self._cache, self._cached = cache, prompt
        assert logits_BV is not None
        return logits_BV

    def _marks(self, ids_T: np.ndarray, fuse_T: np.ndarray) -> np.ndarray:
        """What stands at each position of the prompt [S]: text and whether it is fused (>= 0), or
        which visual token (-1, -2, ...). Equal beginnings have equal keys and values."""
        Q = bounds.tokens_per_image(self.model.bundle)
        pieces, used, media = [], 0, iter(self._watched.media)
        for token, fused in zip(ids_T.tolist(), fuse_T.tolist(), strict=True):
            if token >= 0:
                pieces.append(_text_marks(np.array([token]), fused))
                continue
            count = next(media).expected * Q
            pieces.append(-1 - used - np.arange(count, dtype=np.int64))
            used += count
        return np.concatenate(pieces)


def _text_marks(ids: np.ndarray, fuse: bool) -> np.ndarray:
    return 2 * ids.astype(np.int64) + fuse
