"""Evaluation: `python eval.py --model DIR --benchmarks pope,gqa --data playground/data/eval`.

Several --model are scored on the same questions and shown side by side. The same command resumes a
run that was stopped. `llava-mini benchmarks` lists the benchmarks.
"""

import os
import sys

from llava_mini_jax import signals
from llava_mini_jax.errors import InputError, memory_sentence

MEMORY_ADVICE = (
    "try --dtype int8, int4 or bfloat16, a smaller --batch-size, or a machine with more memory; the"
    " same command resumes from here"
)

STOPPED = "eval.py: stopped; the same command resumes from here"


def main(argv: list[str]) -> int:
    from llava_mini_jax.evaluation.run import evaluate, options, report

    try:
        command = options.parse(argv, __doc__)
        results = evaluate.evaluate(command)
        report.show(results, command.paper)
        print(f"all of it: {command.out / 'results.md'}, {command.out / 'results.json'}")
    except InputError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at its end; there must be something to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if (sentence := memory_sentence(error, MEMORY_ADVICE)) is None:
            raise
        print(f"eval.py: {sentence}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signals.run(lambda: main(sys.argv[1:]), STOPPED)
