"""What a question about a long video takes, worked out before anything is read or computed.

    llava-mini plan video NAME [--frames N] [--dtype TYPE]    of a published shape

    model, frames, text --> positions against the model's limit
                        --> device: weights + KV cache + text, and the largest of the phases of
                              the programs that a session's engine runs (session_memory.py)
                        --> host: what the shelf keeps, visual tokens, frames read ahead
                        --> passes over the frames

Sizes are arithmetic on the shapes of those programs; tests/cost/test_video_plan.py says how
far off they are from what XLA plans for them on CPU. Not counted: the runtime's own memory,
fragmentation, and a file's own index (about 60 bytes a frame of the file, wanted or not).
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from llava_mini_jax import config as configs
from llava_mini_jax.config import Bundle
from llava_mini_jax.cost.device_memory import Memory
from llava_mini_jax.cost.inference_memory import cache_bytes_per_token, weight_bytes
from llava_mini_jax.cost.session_memory import SessionMemory
from llava_mini_jax.data.batches.examples import power_of_two
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import blocks, bounds
from llava_mini_jax.inference.shelf import Budget, Shelf
from llava_mini_jax.terminal import human_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Memory):
    """Bytes, positions and passes of one question about `frames` images and frames."""

    frames: int
    tokens: int  # visual ones, in all
    text: int
    answer: int  # the longest
    limit: int  # positions that the model has
    slots: int  # of the KV cache: the positions, and what rounding up leaves free
    per_slot: int  # bytes of the KV cache
    host: dict[str, int]
    kept: dict[tuple[str, str], int]  # frames by (tier, place) of shelf.py
    chunks: int  # calls of the tower
    blocks: int  # calls of the language model for the prompt

    @property
    def positions(self) -> int:
        return self.tokens + self.text + self.answer

    @property
    def fits_positions(self) -> bool:
        """Whether the prompt fits and leaves a position for the answer."""
        return self.tokens + self.text < self.limit

    @property
    def most_frames(self) -> int:
        """Frames that would fit with this text: what to thin a video out to."""
        return max(0, (self.limit - 1 - self.text) * self.frames // max(1, self.tokens))

    @property
    def per_frame(self) -> float:
        """Bytes that a frame adds to the device: its keys and values."""
        return self.per_slot * self.tokens / max(1, self.frames)

    @property
    def read_again(self) -> int:
        """Frames that each further question decodes and sees again."""
        return self.kept.get(("source", ""), 0)

    def as_json(self) -> dict[str, Any]:
        """The plan for programs: bytes, positions, frames and calls."""
        return {
            "positions": {
                "needed": self.positions,
                "frames": self.tokens,
                "text": self.text,
                "answer": self.answer,
                "limit": self.limit,
                "fit": self.fits_positions,
            },
            "frames": {
                "count": self.frames,
                "most": self.most_frames,
                "kept": {f"{t} {where}".strip(): n for (t, where), n in self.kept.items()},
                "read_again": self.read_again,
            },
            "kv_cache": {"slots": self.slots, "slot_bytes": self.per_slot},
            "device": {"bytes": self.total, "peak": self.peak, "terms": self.terms},
            "host": {"bytes": sum(self.host.values()), "terms": self.host},
            "calls": {"tower": self.chunks, "language_model": self.blocks},
        }

    def lines(self) -> Iterator[str]:
        """The plan for people."""
        over = "" if self.fits_positions else f": too many; {self.most_frames:,} frames would fit"
        yield (
            f"positions      {self.positions:,} = {self.tokens:,} of {self.frames:,} frames +"
            f" {self.text:,} of text + {self.answer:,} of the answer, of the model's"
            f" {self.limit:,}{over}"
        )
        frame = f"; a frame adds {self.per_frame:,.0f}" if self.frames else ""
        yield f"KV cache       {self.slots:,} slots of {self.per_slot:,} bytes{frame}"
        yield f"device         {_gb(self.total)} at the peak ({self.peak})"
        yield from (f"  {name:<34} {_gb(size)}" for name, size in self.terms.items())
        yield f"host           {_gb(sum(self.host.values()))}"
        yield from (f"  {name:<34} {_gb(size)}" for name, size in self.host.items())
        kept = [
            f"{n:,} as {tier} {where and f'({where})'}" for (tier, where), n in self.kept.items()
        ]
        yield f"frames kept    {', '.join(kept) or 'none'}"
        yield (
            f"passes         1 over the frames, {self.chunks:,} calls of the tower and of"
            f" pre-fusion, {self.blocks:,} of the language model;"
            f" {self.read_again:,} frames are read again for every further question"
        )


def plan(
    bundle: Bundle,
    frames: int,
    text: int,
    *,
    dtype: str,
    chunk: int,
    answer: int,
    budget: Budget,
    in_parts: bool = False,
) -> Plan:
    """The plan of a session's first question about `frames` frames with `text` ids of text.

    `dtype` is that of the weights (one of ASKING_DTYPES), `chunk` frames go together, and the
    answer has at most `answer` tokens; `in_parts` says that weights are never in the products'
    dtype as a whole (ops/einsum.py, on one CPU). Where the positions do not fit, the plan says so.
    """
    cfg, Q = bundle.model, bounds.tokens_per_image(bundle)
    prompt = frames * Q + text
    answer = max(0, min(answer, cfg.llm.max_positions - prompt))
    slots = bounds.slot_length(prompt, max(1, answer), bundle)
    # Of a prompt that does not fit, those of as much as fits.
    read = blocks.sizes_of(min(prompt, slots), slots)
    work = _work(bundle, frames, text, chunk)
    pictures = frames > 0 or bundle.prompt.blank_image
    cast = dtype != cfg.compute_dtype and not in_parts
    kept, host = _host(work, frames, chunk, budget)
    return Plan(
        frames=frames,
        tokens=frames * Q,
        text=text,
        answer=answer,
        limit=min(bundle.prompt.max_length, cfg.llm.max_positions),
        slots=slots,
        per_slot=cache_bytes_per_token(cfg, cfg.compute_dtype),
        always=_always(work, slots, dtype),
        phases=work.phases(slots, read, pictures, cast),
        host=host,
        kept=kept,
        chunks=-(-frames // chunk),
        blocks=len(read),
    )


def _work(bundle: Bundle, frames: int, text: int, chunk: int) -> SessionMemory:
    longest = bounds.longest_prompt(bundle)
    padded = bounds.buckets_for(bundle).length(max(1, min(text, longest)))
    together = min(chunk, power_of_two(max(1, frames)))
    return SessionMemory(bundle.model, bundle.images.parts, together, padded)


def _always(work: SessionMemory, slots: int, dtype: str) -> dict[str, int]:
    cfg = work.cfg
    return {
        "weights": sum(weight_bytes(cfg, dtype).values()),
        "KV cache": slots * cache_bytes_per_token(cfg, cfg.compute_dtype),
        "text and the sum of fused text": work.texts(),
    }


def _host(
    work: SessionMemory, frames: int, chunk: int, budget: Budget
) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """(frames by tier and place, bytes on the host) of a file's chunks."""
    kept: Counter[tuple[str, str]] = Counter()
    shelf = Shelf(budget)
    if work.cfg.prefusion_layers:
        for unseen in range(frames, 0, -chunk):
            count = min(chunk, unseen)
            padded = dataclasses.replace(work, chunk=min(chunk, power_of_two(count)))
            sizes = {"memory": padded.memory(), "features": padded.features()}
            kept[shelf.choose(sizes, -(-(unseen - count) // chunk))] += count
    return dict(kept), {
        "frames kept": shelf.used()["host"],
        "visual tokens": 2 * work.tokens(frames),  # of each chunk, and all of them in a row
        "frames read ahead": 3 * work.pixels(),  # waiting, taken, and put together
    }


def _gb(size: float) -> str:
    return f"{human_bytes(size, 'GB'):>11}"


def published(name: str, frames: int, *, dtype: str, chunk: int) -> Plan:
    """The plan of a question about a video to one of config.BACKBONES."""
    if dtype not in configs.ASKING_DTYPES:
        raise InputError(
            f'dtype "{dtype}" is unknown; use one of {", ".join(configs.ASKING_DTYPES)}'
        )
    llm, vision = configs.backbone(name), configs.tower_of(name)
    bundle = Bundle(
        model=configs.build(llm, vision, "release"),
        images=configs.image_config("release", vision),
        prompt=configs.prompt_config("release", "vicuna_v1", llm.max_positions),
        eos_ids=(),
        pad_id=0,
    )
    return plan(bundle, frames, 60, dtype=dtype, chunk=chunk, answer=512, budget=Budget(host=0))
