"""An engine's lanes on the host: who sits in which slot, what is read next, who is told what.

    seen requests --place--> a slot, the one that holds most of the prompt already, or the oldest
                  --read, a few short prompts or one block of a long one--> reader.py
                  --decode, all rows of a lane--> calls under way --collect--> texts, free slots

A request begins in the shortest lane that holds its prompt and a usual answer, and moves to a
longer one when it has grown out of it. Which lane that is depends on the request alone.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llava_mini_jax.inference import blocks, bounds, places, slots
from llava_mini_jax.inference.lane import Call, Lane, LaneSize, Slot
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.reader import Reader
from llava_mini_jax.inference.sampling import padded_stops
from llava_mini_jax.inference.ticket import Token
from llava_mini_jax.inference.work import Work, mark_visual, text_marks
from llava_mini_jax.models import cache

USUAL_ANSWER = 256  # tokens that a request's first lane has room for


class Lanes:
    """All lanes, the shortest first."""

    def __init__(self, model: Loaded, sizes: Sequence[LaneSize], most: int):
        self._model, self._params, self._cfg = model, model.params, model.bundle.model
        self._most = most  # tokens of a call of decode
        self.lanes = [Lane(size, self._cfg) for size in sorted(sizes, key=lambda s: s.length)]
        self.reading: list[Work] = []  # in their slots, not read to their end
        self._reader = Reader(self._params, self._cfg, self.reading)
        self._calls: deque[Call] = deque()
        self._news: list[tuple[Work, list[int], slots.Told, int]] = []  # fetched, not told
        self._outgrown: list[Work] = []
        self._clock = 0

    # ----------------------------------------------------------------------------------- slots

    def lane_of(self, work: Work) -> Lane:
        usual = work.places + min(work.text.allowance, USUAL_ANSWER)
        return next((lane for lane in self.lanes if lane.size.length >= usual), self.lanes[-1])

    def place(self, work: Work) -> bool:
        """Gives a request whose media are seen a slot; False where all of its lane are taken."""
        lane = self.lane_of(work)
        free = [number for number, slot in enumerate(lane.slots) if slot.work is None]
        if not free:
            return False
        example = work.ticket.request.example
        work.marks = mark_visual(work.seen, example.ids, example.fuse, work.taken)
        work.visual_VD = blocks.visual(work.seen, work.taken)
        work.pieces = places.pieces(work.marks < 0, self._model.bundle)
        work.places = places.needed_by(work.marks < 0, self._model.bundle)
        # Text is fused with all media: what it gives is the same only where they are.
        name = (work.tenant, *((seen.first, seen.expected) for seen in work.seen))
        again = not cache.chooses(self._cfg)  # else the cache depends on the prompt's end
        common = {n: _common(lane.slots[n], name, work.marks) if again else 0 for n in free}
        best = max(free, key=lambda n: (common[n], -lane.slots[n].left))
        if 2 * common[best] < len(work.marks) and len(lane.slots) > 1:
            # Too little to be worth a block of its own: what others may still want is left alone.
            best = min(free, key=lambda n: lane.slots[n].left)
            common[best] = 0
        known = places.whole(work.pieces, min(common[best], len(work.marks) - 1))
        work.read = work.ticket.usage.cached = known
        work.begin()
        self._sit(work, lane, best)
        lane.slots[best].name = name
        self.reading.append(work)
        usage = work.ticket.usage
        usage.prompt, usage.image = len(work.marks), int((work.marks < 0).sum())
        return True

    def _sit(self, work: Work, lane: Lane, number: int) -> None:
        slot, settings, sampling = lane.slots[number], work.settings, lane.sampling
        slot.work, slot.marks = work, None
        work.lane, work.slot = lane, number
        sampling.temperature_B[number] = settings.temperature
        sampling.top_p_B[number] = settings.top_p
        sampling.top_k_B[number] = settings.top_k
        sampling.seed_B[number] = settings.seeds(1)[0]
        sampling.stop_ids_BE[number] = padded_stops(work.stop_ids)
        sampling.min_tokens_B[number] = settings.min_tokens
        sampling.limit_B[number] = self._limit(work, lane)
        lane.alive_B[number] = True
        lane.told_B[number] = settings.logprobs is not None

    def _limit(self, work: Work, lane: Lane) -> int:
        """Tokens that the work may have in this lane. The last one is not put into the cache, so
        that a place is left, where a row that has ended writes what nobody reads."""
        return min(work.text.allowance, lane.size.length - work.places)

    def release(self, work: Work) -> None:
        """Takes a request out of its slot, which keeps what it holds."""
        if work in self.reading:
            self.reading.remove(work)
        if work in self._outgrown:
            self._outgrown.remove(work)
        if work.lane is None:
            return
        lane, number = work.lane, work.slot
        slot = lane.slots[number]
        lane.decoding.pop(number, None)
        lane.alive_B[number] = False
        slot.work = None
        self._clock += 1
        slot.left = self._clock
        if work.drawn:
            # The token that was drawn last is not in the cache. In a conversation an answer is
            # plain text; where history is fused, it differs from here on.
            said = text_marks(np.array(work.drawn[:-1], np.int64), fuse=False)
            slot.marks = np.concatenate([work.marks, said])
        work.lane = None

    def promote(self) -> bool:
        """Moves rows that have outgrown their lanes, as far as longer ones have slots."""
        moved = False
        for work in list(self._outgrown):
            old, number = work.lane, work.slot
            lane = self.lanes[self.lanes.index(old) + 1]
            free = [n for n, slot in enumerate(lane.slots) if slot.work is None]
            if not free:
                continue
            to = min(free, key=lambda n: lane.slots[n].left)
            lane.state = slots.move(old.state, lane.state, np.int32(number), np.int32(to))
            self.release(work)
            old.slots[number].marks = None
            self._sit(work, lane, to)
            lane.slots[to].name = old.slots[number].name
            lane.decoding[to] = work
            moved = True
        return moved

    # -------------------------------------------------------------------------------- programs

    def read(self) -> bool:
        """Reads some short prompts, or one block of a long one; False where there is none."""
        if not self.reading:
            return False
        self._calls.extend(self._reader.read())
        return True

    def decode(self, steps: int, ends: int) -> bool:
        """A call for every lane that has rows, under way when it returns; False for no rows.

        A call has up to `steps` tokens a row, and returns once `ends` rows have ended.
        """
        for lane in self.lanes:
            if not lane.decoding:
                continue
            stops = any(work.settings.stop for work in lane.decoding.values())
            few = min(steps, bounds.STEPS_WITH_STOP) if stops else steps
            sampling, told_B = lane.settings()
            lane.state, told = slots.decode(
                self._params,
                lane.state,
                sampling,
                lane.alive_B.copy(),
                told_B,
                np.int32(min(few, self._most)),
                np.int32(ends),
                self._cfg,
                self._most,
            )
            self._calls.append(Call(told, list(lane.decoding.items()), lane, True))
        return any(lane.decoding for lane in self.lanes)

    @property
    def under_way(self) -> bool:
        return bool(self._calls or self._news)

    def fetch(self, *, reads_only: bool = False) -> int:
        """Waits for the calls under way, or for those in front of the first one of `decode`.

        Rows that have ended leave their slots; their texts wait for `tell`, which may be called
        while the device is busy again. Returns the tokens that have come.
        """
        tokens = 0
        while self._calls and not (reads_only and self._calls[0].decodes):
            call = self._calls.popleft()
            tokens_BN, going_B = np.asarray(call.told.tokens_BN), np.asarray(call.told.going_B)
            for row, work in call.rows:
                if work.lane is not call.lane:  # it has left meanwhile
                    continue
                new = tokens_BN[row][tokens_BN[row] >= 0].tolist()
                tokens += len(new)
                work.drawn += new
                self._news.append((work, new, call.told, row))
                if not going_B[row]:
                    self._ended(work)
        return tokens

    def _ended(self, work: Work) -> None:
        """The device goes on with it no more: it is done, or its lane is too short for it."""
        done = work.drawn[-1] in work.stop_ids or len(work.drawn) >= work.text.allowance
        if done:
            self.release(work)
        else:
            work.lane.decoding.pop(work.slot, None)
            self._outgrown.append(work)

    def tell(self) -> list[Work]:
        """Turns the tokens that were fetched into text; returns the requests that are answered."""
        finished = []
        for work, new, told, row in self._news:
            if work.text.finish or work.ticket.cancelled:
                continue
            work.take(new, _logprobs(work, new, told, row))
            if work.text.finish:
                self.release(work)  # by a text that the device knows nothing of
                finished.append(work)
        self._news.clear()
        return finished

    def lengthen(self, length: int) -> None:
        """Makes the slots of the longest lane at least so long; nobody sits in them, and they keep
        what they hold."""
        lane = self.lanes[-1]
        count, old = lane.size
        if old >= length:
            return
        state = slots.empty(count, length, self._cfg)
        for number in map(np.int32, range(count)):
            state = slots.move(lane.state, state, number, number)
        lane.state, lane.size = state, LaneSize(count, length)

    def reset(self) -> None:
        """Lanes that hold nothing, after a program has failed and taken their arrays with it."""
        self._calls.clear()
        self._news.clear()
        for lane in self.lanes:
            lane.state = slots.empty(*lane.size, self._cfg)
            for slot in lane.slots:
                slot.marks = None

    def drop(self) -> None:
        """Gives the slots' memory back; these lanes are of no more use."""
        self._calls.clear()
        self._news.clear()
        for lane in self.lanes:
            lane.state = None

    # ---------------------------------------------------------------------------------- counts

    def rows(self) -> int:
        """Slots that are taken."""
        return sum(slot.work is not None for lane in self.lanes for slot in lane.slots)

    def cache_bytes(self) -> int:
        """Of all slots, with the numbers beside them."""
        return sum(x.nbytes for lane in self.lanes for x in jax.tree.leaves(lane.state))

    def works(self) -> list[Work]:
        return [slot.work for lane in self.lanes for slot in lane.slots if slot.work is not None]


def _common(slot: Slot, name: Any, marks: np.ndarray) -> int:
    """Positions at the beginning of a prompt that a slot holds already."""
    if slot.marks is None or slot.name != name:
        return 0
    size = min(len(slot.marks), len(marks))
    return int(np.argmin(np.append(slot.marks[:size] == marks[:size], False)))


def _logprobs(
    work: Work, new: list[int], told: slots.Told, row: int
) -> Callable[[int], Token] | None:
    top = work.settings.logprobs
    if top is None:
        return None
    given = (told.logprobs_BN, told.top_ids_BNJ, told.top_logprobs_BNJ)
    own_N, ids_NJ, top_NJ = (np.asarray(array)[row] for array in given)

    def token(n: int) -> Token:
        likeliest = zip(ids_NJ[n, :top].tolist(), top_NJ[n, :top].tolist(), strict=True)
        return Token(new[n], float(own_N[n]), list(likeliest))

    return token
