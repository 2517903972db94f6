"""What `llava-mini profile compile` tells of a program: lines for people, or plain numbers."""

from typing import Any

import jax

from llava_mini_jax.cli.profile_programs import Job, Result
from llava_mini_jax.cost.compiled import MemoryUse, Reading
from llava_mini_jax.terminal import GIB, columns

SHOWN = 6  # collectives and arrays, the largest ones


def lines(result: Result) -> list[str]:
    """What people read."""
    job, machine = result.job, result.machine
    chip, found = machine.chip, as_json(result)
    memory, times = found["memory_gib"], found["milliseconds"]
    told = [
        f"{job.name}: {job.about}",
        f"  compiled in {result.seconds:.0f} s for {machine.name} {machine.shape},"
        f" mesh {job.mesh}, jax {jax.__version__}; of one device:",
    ]
    parts = ", ".join(f"{name} {size:.2f}" for name, size in memory.items() if name != "total")
    share = f"{memory['total']:.2f} of {chip.memory:g} GiB ({memory['total'] / chip.memory:.0%})"
    estimated = f"; --dry-run {found['estimate_gib']:.2f}" * bool(job.estimate)
    fused = f", {found['kernel_tflop']:.4g} of it fused attention" * bool(found["kernel_tflop"])
    scores = f", {found['attention_gb']:,.1f} of it XLA's attention" * bool(found["attention_gb"])
    rows = [
        ("memory", f"{share}: {parts}{estimated}"),
        ("products", f"{found['tflop']:,.5g} TFLOP, {times['products']:,.2f} ms at peak{fused}"),
        ("traffic", f"{found['traffic_gb']:,.2f} GB, {times['traffic']:,.2f} ms{scores}"),
        ("links", f"{found['wire_gb']:,.3f} GB, {times['links']:,.2f} ms"),
    ]
    if job.model_flops:
        rows.append(("model", f"{found['model_tflop']:,.1f} TFLOP without recomputation"))
    for how, floor in found["floors"].items():
        bound = f", MFU at most {floor['mfu']:.2f}" if job.model_flops else ""
        rows.append(("time", f"{floor['ms']:,.2f} ms{bound}: {how}"))
    rows.append(("attention", _attention(found["attention"])))
    told += [f"  {name:<11}{text}" for name, text in rows]
    return told + _details(found, job)


def _attention(found: dict[str, Any]) -> str:
    said = [
        f"XLA, scores {count}" if name == "xla" else f"{name}, {count} kernels"
        for name, count in found.items()
    ]
    return "; ".join(said) or "no scores of their own"


def _details(found: dict[str, Any], job: Job) -> list[str]:
    told = []
    if found["collectives"]:
        told.append("  collectives, loops multiplied out")
        rows = [
            (f"    {c['kind']}", f"x {c['count']:,}", c["array"], f"{c['gb']:,.2f} GB")
            for c in found["largest_collectives"]
        ]
        told += columns(rows)
    told.append("  largest arrays that are made")
    rows = [(f"    {a['array']}", a["scope"][-70:], f"{a['gb']:,.3f} GB") for a in found["largest"]]
    told += columns(rows, left=2)
    if job.cache:
        copies = found["cache_copies"]
        told.append(
            f"  copies of a layer's keys or more, once a call: {', '.join(copies) or 'none'}"
        )
    return told


def _floors(result: Result) -> dict[str, float]:
    """Few rows' products are limited by their bytes too: there the kernels' floor alone counts."""
    floors = list(result.times.floors.items())
    return dict(floors if result.job.model_flops else floors[-1:])


def as_json(result: Result) -> dict[str, Any]:
    """Everything that is told, as plain numbers."""
    job, found = result.job, result.reading
    model = job.model_flops / len(result.machine.devices)
    peak = result.machine.chip.tflops * 1e12
    return {
        "program": job.name,
        "sizes": job.about,
        "chip": result.machine.name,
        "slice": result.machine.shape,
        "mesh": str(job.mesh),
        "jax": jax.__version__,
        "compile_seconds": round(result.seconds, 1),
        "memory_gib": _memory(found.memory),
        "capacity_gib": result.machine.chip.memory,
        "estimate_gib": job.estimate / GIB,
        "tflop": (found.total("flops") + found.kernel_flops()) / 1e12,
        "kernel_tflop": found.kernel_flops() / 1e12,
        "model_tflop": model / 1e12,
        "traffic_gb": found.total("bytes") / 1e9,
        "attention_gb": found.total("bytes", found.xla_attention()) / 1e9,
        "wire_gb": found.wire_bytes() / 1e9,
        "milliseconds": {
            name: 1e3 * getattr(result.times, name) for name in ("products", "traffic", "links")
        },
        "floors": {
            how: {"ms": 1e3 * floor, "mfu": model / peak / floor if model else None}
            for how, floor in _floors(result).items()
        },
        "attention": found.attention(),
        **_largest(found),
        "cache_copies": [f"{i.opcode} {i.array}" for i in found.entry_copies(job.cache)]
        if job.cache
        else [],
    }


def _memory(memory: MemoryUse) -> dict[str, float]:
    names = ("arguments", "temporaries", "outputs", "code", "total")
    return {name: getattr(memory, name) / GIB for name in names}


def _largest(found: Reading) -> dict[str, Any]:
    return {
        "collectives": {
            kind: {"count": count, "gb": size / 1e9}
            for kind, (count, size) in found.collectives().items()
        },
        "largest_collectives": [
            {"kind": kind, "count": count, "array": array, "gb": size / 1e9}
            for kind, count, array, size in found.largest_collectives(SHOWN)
        ],
        "largest": [
            {"array": array, "gb": size / 1e9, "scope": scope}
            for array, size, scope in found.largest_arrays(SHOWN)
        ],
    }
