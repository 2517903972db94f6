"""What an answer took: tokens as clients count them, and milliseconds where they ask for them.

Tickets' Usage, Said --usage----> {"prompt_tokens", "completion_tokens", ..., details}
                     --timings--> {"time_to_first_token_ms", ...}
"""

from collections.abc import Sequence
from typing import Any

from llava_mini_jax.inference.ticket import Ticket, Usage
from llava_mini_jax.serving.shapes import Said


def usage(tickets: Sequence[Ticket], said: Sequence[Said], choices: int) -> dict[str, Any]:
    """Tokens so far; `choices` answers share a prompt, which counts once."""
    prompts = [ticket.usage for ticket in tickets[::choices]]
    prompt, image = sum(p.prompt for p in prompts), sum(p.image for p in prompts)
    answers = sum(one.count for one in said)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {
            "cached_tokens": sum(p.cached for p in prompts),
            "image_tokens": image,
            "text_tokens": prompt - image,
        },
    }


def timings(usage: Usage, count: int, arrived: float) -> dict[str, Any]:
    """Milliseconds of one answer of `count` tokens, of a request that arrived at `arrived`
    (time.perf_counter); null for what has not happened."""

    def between(start: float | None, end: float | None) -> float | None:
        return None if start is None or end is None else round(1000 * (end - start), 3)

    decoding = between(usage.first, usage.last)
    mean = decoding / (count - 1) if decoding is not None and count > 1 else None
    return {
        "time_to_first_token_ms": between(arrived, usage.first),
        "generation_time_ms": between(usage.begun, usage.last),
        "queue_time_ms": between(arrived, usage.begun),
        "mean_itl_ms": None if mean is None else round(mean, 3),
        "tokens_per_second": round(1000 / mean, 3) if mean else None,
        "vision_ms": round(1000 * usage.vision, 3),
        "prefusion_ms": round(1000 * usage.fusion, 3),
        "frames": usage.frames,
        "frames_recalled": usage.recalled,
    }
