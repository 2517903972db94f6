"""make compile-check: small programs for chips that are not here, and what they must not do.

python -m tests.compiled.check v5e      needs the extra compile-tpu, some minutes
python -m tests.compiled.check h100     needs compile-gpu, a minute or two
"""

import sys
import time

from llava_mini_jax import environment

CHIPS = ("v5e", "h100")


def main(chip: str) -> int:
    environment.compile_for_absent()
    from tests.compiled import small_programs  # JAX reads the environment when it is imported

    began, counts = time.monotonic(), {"passed": 0, "failed": 0}
    for name, complaints in small_programs.all_of(chip):
        since = time.monotonic()
        told = list(complaints)
        counts["failed" if told else "passed"] += 1
        print(f"{'FAIL' if told else 'ok':4}  {name:40} {time.monotonic() - since:4.0f} s")
        print(*(f"      {complaint}\n" for complaint in told), sep="", end="", flush=True)
    seconds = time.monotonic() - began
    print(f"{counts['passed']} passed, {counts['failed']} failed in {seconds:.0f} s for {chip}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    if sys.argv[1:] not in [[chip] for chip in CHIPS]:
        sys.exit(f"usage: python -m tests.compiled.check {' | '.join(CHIPS)}")
    sys.exit(main(sys.argv[1]))
