"""What AIPerf and EvalScope found, as a table; a status of 1 where anything went wrong.

OUT/aiperf-*/profile_export_aiperf.json, OUT/evalscope/**/benchmark_summary.json --> OUT/table.md
"""

import json
import sys
from pathlib import Path
from typing import Any

AIPERF = {
    "aiperf-16": "AIPerf, 16 at a time",
    "aiperf-1": "AIPerf, alone",
    "aiperf-16-alone": "AIPerf, 16 at a time, one slot",
}


def main(out: Path, requests: int) -> int:
    lines = [
        "| | requests a second | first token, ms | a token, P99 ms | errors |",
        "|---|---|---|---|---|",
    ]
    found = {name: _aiperf(out / name) for name in AIPERF}
    problems = []
    for name, told in AIPERF.items():
        one = found[name]
        lines.append(
            f"| {told} | {one['rate']:.1f} | {one['first']:.1f} | {one['token']:.2f} |"
            f" {one['errors']} |"
        )
        if one["errors"] or one["done"] != requests:
            problems.append(f"{told}: {one['done']} of {requests} answers, {one['errors']} errors")
    (path,) = out.glob("evalscope/**/benchmark_summary.json")
    scope = json.loads(path.read_text())
    lines.append(
        f"| EvalScope, 16 at a time | {scope['Req Throughput (req/s)']:.1f} |"
        f" {scope['Avg TTFT (ms)']:.1f} | | {scope['Failed Requests']} |"
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
    return {
        "rate": report["request_throughput"]["avg"],
        "first": report["time_to_first_token"]["avg"],
        "token": report["inter_token_latency"]["p99"],
        "done": int(report["request_count"]["avg"]),
        "errors": int(errors["avg"]),
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
