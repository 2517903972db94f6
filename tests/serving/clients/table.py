"""What AIPerf and EvalScope found, as a table; a status of 1 where anything went wrong.

OUT/aiperf-*/profile_export_aiperf.json, OUT/evalscope/**/benchmark_summary.json --> OUT/table.md
OUT/aiperf-*.before, .after: /metrics, whose first tokens stand beside the client's ----^
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

AIPERF = {
    "aiperf-16": "AIPerf, 16 at a time",
    "aiperf-1": "AIPerf, one at a time",
    "aiperf-16-alone": "AIPerf, 16 at a time, one slot",
}
FIRST = "llava_mini:time_to_first_token_seconds"


def main(out: Path, requests: int) -> int:
    lines = [
        "| | requests a second | first token, ms | with warm-up | by /metrics | a token, ms | P99"
        " | errors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {name: _aiperf(out / name) for name in AIPERF}
    problems = []
    for name, told in AIPERF.items():
        one = found[name]
        lines.append(
            f"| {told} | {one['rate']:.1f} | {one['first']:.1f} | {one['client']:.1f} |"
            f" {one['server']:.1f} | {one['token']:.2f} | {one['slowest']:.2f} | {one['errors']} |"
        )
        if one["errors"] or one["done"] != requests:
            problems.append(f"{told}: {one['done']} of {requests} answers, {one['errors']} errors")
        if one["counted"] != one["asked"]:
            problems.append(f"{told}: /metrics has {one['counted']} of {one['asked']} first tokens")
        if one["server"] > one["client"]:  # what a client waits for has more in it
            problems.append(f"{told}: first tokens are later by /metrics than for the client")
    (path,) = out.glob("evalscope/**/benchmark_summary.json")
    scope = json.loads(path.read_text())
    lines.append(
        f"| EvalScope, 16 at a time | {scope['Req Throughput (req/s)']:.1f} |"
        f" {scope['Avg TTFT (ms)']:.1f} | | | {scope['Avg TPOT (ms)']:.2f} | |"
        f" {scope['Failed Requests']} |"
    )
    if scope["Failed Requests"] or scope["Success Requests"] != requests:
        problems.append(f"EvalScope: {scope['Success Requests']} of {requests} answers")
    if scope["Avg Output Tokens"] != 8:
        problems.append(f"EvalScope: answers of {scope['Avg Output Tokens']} tokens, not of 8")
    batched, alone = found["aiperf-16"]["rate"], found["aiperf-16-alone"]["rate"]
    lines += ["", f"Against one slot: {batched / alone:.1f} times the requests a second."]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join([*lines, "", *problems]))
    return 1 if problems else 0


def _aiperf(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "profile_export_aiperf.json").read_text())
    errors = report.get("error_request_count") or {"avg": 0}
    # Records and /metrics have the warm-up too: both are about the very same requests.
    records = [json.loads(x) for x in (folder / "profile_export.jsonl").read_text().splitlines()]
    client = [x["metrics"]["time_to_first_token"]["value"] for x in records if not x.get("error")]
    before, after = (_first(folder.with_suffix(f".{when}")) for when in ("before", "after"))
    counted, seconds = after[0] - before[0], after[1] - before[1]
    return {
        "rate": report["request_throughput"]["avg"],
        "first": report["time_to_first_token"]["avg"],
        "client": statistics.fmean(client),
        "server": 1000 * seconds / max(1, counted),
        "asked": len(records),
        "counted": counted,
        "token": report["inter_token_latency"]["avg"],
        "slowest": report["inter_token_latency"]["p99"],
        "done": int(report["request_count"]["avg"]),
        "errors": int(errors["avg"]),
    }


def _first(metrics: Path) -> tuple[int, float]:
    """How many first tokens /metrics had seen, and their seconds together."""
    lines = [line for line in metrics.read_text().splitlines() if line.startswith(FIRST)]
    found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
    return int(found[f"{FIRST}_count"]), found[f"{FIRST}_sum"]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
