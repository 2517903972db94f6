"""What strangers wrote, run where it can do no harm: the child of guarded.py.

    a line of JSON on stdin --answer--> a line of JSON on stdout: {"ok": ...}, {"error": "why"}
                                                            or {"limit": "which"}

A script of its own that imports nothing of the package, so that it starts in a fraction of a
second. Each request comes with limits of memory and processor time. Python code that exceeds them
is answered with an error; compiled code ends the process, which the other side sees.
"""

import contextlib
import datetime
import functools
import importlib
import json
import signal
import sys
from collections.abc import Iterator
from typing import Any

LARGEST_ID = 2**31 - 1
# Words, other scripts, characters of several code points, digits, white space, markup.
LINES = (
    "",
    "Hello there, what is <b>this</b>? It costs 1,234.50 $.\n\n  a\tb ",
    "Grüße naïve 你好，世界 नमस्ते ภาษาไทย مرحبا 🎂👨‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u00a0\u200b 𝔘 \x01\x7f",
    "USER: <image>\nWhat? ASSISTANT: No.</s>",
    "".join(map(chr, range(1, 256))),
)


class TooLong(BaseException):
    """The processor time of a request is over, or its text; no Exception, so that nothing holds
    it up."""


def main() -> None:
    out = sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        for module in NEEDS[request["work"]]:  # which takes its own time
            importlib.import_module(module)
        try:
            with _limited(request["megabytes"], request["seconds"]):
                reply = {"ok": WORK[request["work"]](**request["given"])}
        except MemoryError:
            reply = {"limit": f"it needs more than {request['megabytes']} MB of memory"}
        except TooLong as reason:
            reply = {"limit": str(reason)}
        except RecursionError:
            reply = {"error": "it calls itself without end"}
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic is no Exception
            reply = {"error": f"{str(error).strip() or type(error).__name__}"[:2000]}
        out.write(json.dumps(reply) + "\n")
        out.flush()


@contextlib.contextmanager
def _limited(megabytes: int, seconds: float) -> Iterator[None]:
    """Memory on top of what is taken now, and processor time; as far as the system knows them."""

    def stop(*_: Any) -> None:
        raise TooLong(f"it takes more than {seconds:g} s")

    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    hard = {kind: resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)}
    used = resource.getrusage(resource.RUSAGE_SELF)
    # A second more: compiled code sees no timer, and ends here.
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 2, hard)
    with contextlib.suppress(OSError):
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + megabytes * 2**20, hard)
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        for kind, most in hard.items():
            resource.setrlimit(kind, (most, most))


def _lower(kind: int, limit: int, hard: dict[int, int]) -> None:
    import resource

    most = hard[kind]
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(kind, (limit, most))


# --- Chat templates -------------------------------------------------------------------------------


def render(
    template: str,
    messages: list[dict[str, Any]],
    is_open: bool,
    tokens: dict[str, str],
    date: str,
    longest: int,
) -> str:
    """What transformers' apply_chat_template makes of the messages, of at most `longest` letters.

    `tokens` are the tokenizer's special ones by name, and `date` ("2024-07-26") is today. Models
    that can think aloud (Qwen3, SmolLM3) are told not to: then an open prompt ends with what stands
    in front of the last answer of a finished conversation, an empty thought.
    """
    today = datetime.datetime.fromisoformat(date)
    pieces, size = [], 0
    for piece in _compiled(template).generate(
        **tokens,
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=is_open,
        enable_thinking=False,
        strftime_now=today.strftime,
    ):
        pieces.append(piece)
        size += len(piece)
        if size > longest:
            raise TooLong(f"it makes more than {longest} letters of a short conversation")
    return "".join(pieces)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The template in the environment that transformers' utils/chat_template_utils.py gives it."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %}: marks what is generated, and writes what is in it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(
                line
            )

        def _as_it_is(self, caller: Any) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ValueError(f"{error.message}, in line {error.lineno}") from error


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter; jinja2's own would write "<" as \\u003c."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


# --- Tokenizers -----------------------------------------------------------------------------------


def try_tokenizer(path: str) -> dict[str, int]:
    """Loads a tokenizer.json, and writes and reads with it; how many tokens it has.

    Raises whatever the library does, and ValueError for ids and offsets that make no sense.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise ValueError("its vocabulary is empty")
    added = tokenizer.get_added_tokens_decoder()
    lines = [*LINES, *(token.content for token in added.values())][:400]
    for line in lines:
        for specials in (False, True):
            encoding = tokenizer.encode(line, add_special_tokens=specials)
            largest = max(largest, *encoding.ids, 0)
            if any(not 0 <= a <= b <= len(line) for a, b in encoding.offsets):
                raise ValueError("its tokens' offsets are outside the text")
            if len(encoding.ids) > 1000 + 50 * len(line):
                raise ValueError(f"it makes {len(encoding.ids)} tokens of {len(line)} letters")
            for skip in (False, True):
                text = tokenizer.decode(encoding.ids, skip_special_tokens=skip)
                if len(text) > 10_000 + 50 * len(line):
                    raise ValueError(f"it reads {len(text)} letters where {len(line)} were written")
    if largest > LARGEST_ID:
        raise ValueError(f"a token has the id {largest}, more than {LARGEST_ID}")
    return {"tokens": tokenizer.get_vocab_size(with_added_tokens=True)}


NEEDS = {"render": ("jinja2.sandbox", "jinja2.ext"), "try_tokenizer": ("tokenizers",)}
WORK = {"render": render, "try_tokenizer": try_tokenizer}

if __name__ == "__main__":
    main()
