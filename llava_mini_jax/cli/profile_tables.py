"""The tables that `llava-mini profile` prints."""

from typing import Any

import jax

from llava_mini_jax.cost.paper_figures import LATENCY_MS, PARTS
from llava_mini_jax.terminal import columns, human_bytes

_UNITS = (("TFLOPs", 1), ("GFLOPs", 1e3), ("MFLOPs", 1e6))


def flops(found: list[Any], text: int, notes: list[str]) -> None:
    names = {"ours": "this package", "xla": "XLA's count", "rule": "paper's rule", "paper": "paper"}
    rows, largest = [], max(counts["ours"]["total"] for _, counts in found)
    unit, times = next((u, n) for u, n in _UNITS if largest * n >= 1 or n == _UNITS[-1][1])
    for entry, counts in found:
        title = (f"table {entry.table}: " if entry.table else "") + entry.name
        rows.append([title, *[""] * (len(PARTS) + 1)])
        for kind, counted in counts.items():
            if counted is not None:
                cells = [counted.get(part) for part in (*PARTS, "total")]
                shown = ["" if cell is None else f"{cell * times:.3f}" for cell in cells]
                rows.append([f"  {names[kind]}", *shown])
    print(f"{unit} of a first token, {text} tokens of text; the head is in llm\n")
    _table(["", *PARTS, "total"], rows)
    print(
        "\nthis package, XLA's count: what is computed here, attention scores included, last layers"
        "\n  and logits only where they are read. paper's rule: linear layers at every position,"
        "\n  attention left out (the tool of section 5.3)."
    )
    for note in notes:
        print(f"- {note}")


def latency(result: dict[str, Any], baseline: str, *, paper: bool) -> None:
    """Medians and spreads, and how many times as fast as `baseline`; `paper`: table 13 below."""
    request, spreads = result["request"], result["milliseconds"]
    print(
        f"{result['device']}, {result['dtype']}, jax {jax.__version__};"
        f" {request['images']} images of {request['resolution']} px,"
        f" {request['text']} tokens of text, {request['new_tokens']} new;"
        f" {request['repeats']} times\n"
    )
    rows, base = [], next(each for name, each in spreads.items() if name.startswith(baseline))
    for name, each in spreads.items():
        cells = []
        for kind in ("first", "token"):
            s = each[kind]
            cells += [f"{s.median:.2f}", f"{s.low:.2f} - {s.high:.2f}"]
            cells.append(f"{base[kind].median / s.median:.2f}x")
        whole = each["first"].median + request["new_tokens"] * each["token"].median
        rows.append([name, *cells, f"{whole:.0f}"])
    header = ["ms, median and 10-90 %", "first token", "", "faster", "a token after", "", "faster"]
    _table([*header, "whole answer"], rows)
    _machine(result)
    if paper:
        print("\npaper, table 13: milliseconds of a response, by vision tokens")
        rows = [[str(q), *(f"{t:.2f}" for t in ms)] for q, ms in LATENCY_MS.items()]
        _table(["tokens", "RTX 3090", "A100 40 GB", "A800 80 GB"], rows)


def _machine(result: dict[str, Any]) -> None:
    """Times beside what the machine can do, and follow-up questions."""
    bandwidth, speed = result["machine"]["GB/s"], result["machine"]["GFLOP/s"]
    rows = []
    for name, each in result["milliseconds"].items():
        read, token = result["token bytes"][name], each["token"].median
        reached = result["first FLOPs"][name] / 1e6 / each["first"].median
        shown = [f"{read / 1e9:.3f} GB", f"{read / 1e6 / token:.1f} GB/s"]
        shown += [f"{token * bandwidth * 1e6 / read:.2f}", f"{reached:.0f} GFLOP/s"]
        rows.append([name, *shown, f"{reached / speed:.2f}"])
    print(
        f"\nmeasured in the same rounds: memory read at {bandwidth:.1f} GB/s, float32 matrices"
        f" multiplied at {speed:.0f} GFLOP/s\n"
    )
    _table(["", "weights a token", "read at", "plain reads", "first token", "of that"], rows)
    for name, (first, after) in result["follow-up"].items():
        print(
            f"\n{name}: in a session the first question's first token after {first.median:.0f} ms,"
            f" the next one's after {after.median:.0f} ms, {after.median / first.median:.2f} of it"
        )


def memory(result: dict[str, Any], images: int) -> None:
    weights, kept = result["weights"], result["cache"]
    components = list(next(iter(weights.values())))
    print("weights\n")
    rows = [[n, *(human_bytes(weights[d][n]) for d in weights)] for n in components]
    rows.append(["all", *(human_bytes(sum(each.values())) for each in weights.values())])
    _table(["", *weights], rows)
    print("\nkeys and values, bfloat16\n")
    header = ["", "tokens an image", "a token", "an image or frame", f"{images} of them"]
    rows = [
        [name, str(each["tokens an image"]), *(human_bytes(v) for v in list(each.values())[1:])]
        for name, each in kept.items()
    ]
    _table(header, rows)
    if "programs" in result:
        print(f"\nplanned by the compiler, {result['programs']['dtype']}, one after the other\n")
        programs = result["programs"]["bytes"]
        rows = [[n, *(human_bytes(v) for v in p.values())] for n, p in programs.items()]
        _table(["", "weights", "inputs", "outputs", "temporaries", "total"], rows)
    if result.get("allocator_peak"):
        print(f"\npeak of the device's allocator: {human_bytes(result['allocator_peak'])}")


def _table(header: list[str], rows: list[list[str]]) -> None:
    print(*columns([header, *rows]), sep="\n")
