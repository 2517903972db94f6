"""One engine for many requests: it sees their images, reads their prompts, answers them together.

    submit --> waiting --> seeing: a chunk of frames --> seen --> in a slot: a block of the prompt
                           (seeing.py)                            (lanes.py)     |
                                    told, call by call <-- decode, all rows <----'

`step` does a bounded piece of each, so that no request waits for another one's end: a finished row
leaves its slot and a waiting one enters after every step, and a long video delays the others by one
chunk of frames at a time. The sizes of programs follow from a request alone, but for how many
images and prompts go together, and no row's numbers depend on the rows beside it: so an answer
does not depend on its neighbours.

An engine belongs to one thread (worker.py gives it one).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llava_mini_jax.data.batches.examples import Example, power_of_two
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds, places
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.gallery import Gallery
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.lanes import Lanes
from llava_mini_jax.inference.loaded import Loaded
from llava_mini_jax.inference.recompute import refuse_inside, refuse_pooled
from llava_mini_jax.inference.seeing import Seeing
from llava_mini_jax.inference.shelf import Budget
from llava_mini_jax.inference.ticket import Medium, Piece, Request, Ticket
from llava_mini_jax.inference.work import Work
from llava_mini_jax.models import cache

NEVER = 2**30  # rows: a call ends with its tokens
IDLE_SECONDS = 0.001  # while a thread reads the frames that are needed next


class Engine:
    """Requests in, Pieces out; `lanes` are its slots, `steps` the tokens of a call at most.

    While requests wait for slots, a call returns once `ends` rows have ended. `timed`: somebody
    watches. Then images are looked at no longer between two tokens than a token takes, and the
    usage of tickets has their seconds, for which the host waits for the device. `chunk`: frames
    that are looked at together, at most; None for seeing.py's own sizes.
    """

    def __init__(
        self,
        model: Loaded,
        lanes: Sequence[LaneSize],
        *,
        budget: Budget | None = None,
        steps: int = bounds.STEPS,
        ends: int = 1,
        timed: bool = True,
        chunk: int | None = None,
    ):
        refuse_inside(model.bundle.model)
        if not lanes or any(size.slots < 1 or size.length < 2 for size in lanes):
            raise InputError(f"the lanes are {list(lanes)}; give 1 or more slots of 2 or more")
        self.model, self._most, self._ends, self._timed = model, steps, ends, timed
        self.call_steps = steps  # tokens of the next calls, at most; never more than `steps`
        self._chunk = chunk
        self.gallery = Gallery(budget or Budget())
        self._begin(lanes)
        self._ahead = sum(size.slots for size in lanes)  # requests that are seen before they do
        self._token_seconds = 0.0  # what a step of decode took of late
        self._began, self._plain = 0.0, False  # the last step, and whether it decoded alone
        self.steps = self.answered = 0  # so far: steps, requests
        self.on_tokens: Callable[[int], Any] = lambda count: None  # of a step that has some

    def _begin(self, lanes: Sequence[LaneSize]) -> None:
        self._lanes = Lanes(self.model, lanes, self._most)
        self._seeing = Seeing(
            self.model, self.gallery, self._fail, timed=self._timed, chunk=self._chunk
        )
        self._waiting: deque[Work] = deque()  # nothing of them is computed yet
        self._seen: deque[Work] = deque()  # they want a slot

    # ------------------------------------------------------------------------------- requests

    @property
    def longest(self) -> int:
        """Positions of a prompt, at most; of one whose images leave the cache, places."""
        lengths = [lane.size.length for lane in self._lanes.lanes]
        most = bounds.longest_prompt(self.model.bundle) + cache.spare(self.model.bundle.model)
        return min(most, max(lengths) - 1)

    def submit(self, request: Request, listener: Callable[[Piece | Exception], None]) -> Ticket:
        """Takes a request; InputError where its prompt is longer than every slot."""
        ticket = Ticket(request, listener)
        self.take(ticket)
        return ticket

    def take(self, ticket: Ticket) -> None:
        """`submit` for a ticket that another thread has made."""
        refuse_pooled(ticket.request.example, self.model.bundle.model)
        needed = places.fitting(ticket.request.example, self.model.bundle, self.longest)
        work = Work(ticket, self.model)
        work.text.cap(max(lane.size.length for lane in self._lanes.lanes) - needed)
        self._waiting.append(work)

    @property
    def text_bucket(self) -> int:
        """What the longest text is padded to."""
        most = min(self.longest, bounds.longest_prompt(self.model.bundle))
        return self.model.buckets.length(most)

    def slots(self) -> tuple[int, int, int]:
        """(slots, places that hold something, places in all)."""
        lanes = self._lanes.lanes
        used = sum(work.held + len(work.drawn) for work in self._lanes.works())
        return self._ahead, used, sum(lane.size.slots * lane.size.length for lane in lanes)

    def lengthen(self, length: int) -> None:
        """Makes the longest slots at least so long; between requests, and no shorter again."""
        self._drop_cancelled()
        self._lanes.lengthen(length)

    def cache_bytes(self) -> int:
        """Of the keys and values of all slots."""
        return self._lanes.cache_bytes()

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting) + len(self._seeing.works) + len(self._seen)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return self._lanes.rows()

    # ------------------------------------------------------------------------------- a step

    def step(self) -> bool:
        """A bounded piece of work; False once there is nothing left to do."""
        self._drop_cancelled()
        rows = len(self._lanes.works())
        tokens = self._lanes.fetch()
        if tokens:
            self.on_tokens(tokens)
        self._measure(tokens / rows if rows else 0.0)
        read = self._enter()
        decoding = self._lanes.decode(self._call_steps(), self._ends if self.waiting else NEVER)
        # The device is busy; meanwhile the host writes what it said before.
        self._tell()
        looked = self._see(decoding)
        self._plain = decoding and not (read or looked)
        self.steps += 1
        if not (tokens or read or decoding or looked) and self.waiting:
            time.sleep(IDLE_SECONDS)
        return bool(self.waiting or self.running or self._lanes.under_way)

    def _tell(self) -> None:
        # First tokens too: they do not wait for the second ones.
        self._lanes.fetch(reads_only=True)
        for work in self._lanes.tell():
            self._leave(work)
            self.answered += 1

    def _call_steps(self) -> int:
        """Tokens of a call: one, while others want to look at images, or to be read.

        Where they would find no slot they wait for a row to end, and so does the call.
        """
        full = bool(self._seen) or self.running == self._ahead
        looking = (self._seeing.works or self._may_begin()) and not full
        return 1 if looking or self._lanes.reading else self.call_steps

    def _may_begin(self) -> bool:
        """Whether waiting requests may be looked at: at once where slots are free, else as many
        as there are slots, half of them together."""
        looked_at = len(self._seeing.works) + len(self._seen)
        free = self._ahead - self.running
        most = self._ahead if self._seeing.works else max(free, self._ahead // 2 + 1)
        return bool(self._waiting) and looked_at < most

    def _see(self, decoding: bool) -> bool:
        while self._may_begin():
            self._try(self._waiting.popleft(), self._seeing.add)
        paced = decoding and self._timed
        done, computed = self._seeing.step(self._token_seconds if paced else None)
        self._seen.extend(done)
        return computed or bool(done)

    def _enter(self) -> bool:
        """Gives free slots to those who wait for one, and reads some of a prompt."""
        moved = self._lanes.promote()
        for work in list(self._seen):
            if self._lanes.place(work):
                self._seen.remove(work)
        return self._lanes.read() or moved

    def _measure(self, tokens: float) -> None:
        """How long a row's token takes, from the steps that had nothing else to do."""
        now = time.perf_counter()
        if self._plain and tokens:
            seconds = (now - self._began) / tokens
            self._token_seconds = 0.8 * (self._token_seconds or seconds) + 0.2 * seconds
        self._began = now

    # ------------------------------------------------------------------------------- endings

    def _try(self, work: Work, action: Callable[[Work], Any]) -> None:
        try:
            action(work)
        except Exception as error:
            self._fail(work, error)

    def _fail(self, work: Work, error: Exception) -> None:
        """Ends one request; the others go on."""
        self._remove(work, failed=True)
        work.tell(error)

    def _remove(self, work: Work, *, failed: bool = False) -> None:
        for queue in (self._waiting, self._seen):
            if work in queue:
                queue.remove(work)
        self._seeing.drop(work)
        self._lanes.release(work)
        self._leave(work, failed=failed)

    def _leave(self, work: Work, *, failed: bool = False) -> None:
        for seen in work.seen:
            if seen.owner is work:
                seen.owner = None
            self.gallery.leave(seen, failed=failed)
        work.seen = []

    def _drop_cancelled(self) -> None:
        everyone = [*self._waiting, *self._seeing.works, *self._seen, *self._lanes.works()]
        for work in everyone:
            if work.ticket.cancelled:
                self._remove(work)

    def fail_all(self, error: Exception) -> None:
        """Ends all requests with `error`; the slots hold nothing afterwards."""
        for work in [*self._waiting, *self._seeing.works, *self._seen, *self._lanes.works()]:
            self._fail(work, error)
        self._lanes.reset()

    def start_anew(self) -> None:
        """Without requests, and with slots that hold nothing, after Ctrl-C anywhere in a step; the
        images and frames that were seen stay known."""
        self.gallery.abandon()
        self._lanes.drop()  # so that there is room for the new ones
        self._begin([lane.size for lane in self._lanes.lanes])


def media_of(example: Example) -> tuple[Medium, ...]:
    """The images of an example that holds its pixels, unknown to everybody else."""
    media, start = [], 0
    for count in example.frames:
        frames_IJYXC = example.pixels[start : start + count]
        media.append(Medium(b"", count, lambda frames=frames_IJYXC: iter(frames)))
        start += count
    return tuple(media)


def answering(
    model: Loaded,
    examples: Sequence[Example],
    settings: Sequence[Settings],
    slots: int,
    hear: Callable[[int, Piece], None],
    *,
    steps: int = bounds.STEPS,
) -> Iterator[None]:
    """Answers all examples, `slots` of them at a time; each `next` is a step of the engine.

    `hear` is told the pieces with the example's number. What goes wrong with one ends them all.
    """
    lanes = lanes_of(model, examples, settings, slots)
    # Several enter together: a program for four prompts takes little more than one for one.
    engine = Engine(model, lanes, steps=steps, ends=max(1, lanes[0].slots // 4), timed=False)

    def listener(number: int) -> Callable[[Piece | Exception], None]:
        def told(news: Piece | Exception) -> None:
            if isinstance(news, Exception):
                raise news
            hear(number, news)

        return told

    # Prompts of one size stand together, and are read together.
    sizes = [bounds.prompt_positions(example, model.bundle) for example in examples]
    for number in sorted(range(len(examples)), key=sizes.__getitem__):
        example, own = examples[number], settings[number]
        engine.submit(Request(example, media_of(example), own), listener(number))
    going = True
    while going:
        going = engine.step()
        yield


def lanes_of(
    model: Loaded, examples: Sequence[Example], settings: Sequence[Settings], slots: int
) -> list[LaneSize]:
    """The lane that the longest of requests that are all known fits into."""
    needed = max(
        places.needed(example, model.bundle) + bounds.allowance(example, model.bundle, own)[0]
        for example, own in zip(examples, settings, strict=True)
    )
    # Few sizes, at most an eighth too long: each is compiled for.
    step = max(bounds.SMALLEST_LENGTH, power_of_two(needed) // 8)
    return [LaneSize(power_of_two(min(slots, len(examples))), -(-needed // step) * step)]
