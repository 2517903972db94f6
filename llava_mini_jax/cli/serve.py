"""`llava-mini serve`: a model behind OpenAI's protocol, for any number of clients.

MODEL, options --> a socket, at once --> weights --> engine on its own thread
                                             |            '-- compiles, then is ready
                                             '--> HTTP until SIGTERM or Ctrl-C, then status 0
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mini_jax.arguments import VISION_TOWER, vision_tokens
from llava_mini_jax.errors import InputError, short
from llava_mini_jax.terminal import loading, waiting

if TYPE_CHECKING:
    from llava_mini_jax.serving.limits import Limits
    from llava_mini_jax.serving.service import Options

SUMMARY = "serve a model over HTTP, with OpenAI's protocol"
USAGE = "llava-mini serve MODEL [--port N] [options]"
EXAMPLE = """examples:
  llava-mini serve MODEL --port 8000
  llava-mini serve MODEL --host 0.0.0.0 --api-key-file keys.txt --max-queued 64"""

NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client", "h11")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, or a name on the Hugging Face hub")
    add("--host", default="127.0.0.1", metavar="H", help="default: 127.0.0.1, this machine alone")
    add("--port", type=int, default=8000, metavar="N", help="default: 8000")
    add(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="its name in requests; repeatable; default: its folder",
    )
    _add_model(parser)
    _add_access(parser)
    _add_load(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", metavar="TYPE", help="float32 (default on CPU), bfloat16, int8 or int4")
    add("--attention", default="auto", metavar="NAME", help="auto (default), xla, cudnn or splash")
    add("--vision-tower", metavar="FOLDER", help=VISION_TOWER)
    add(
        "--conv-mode",
        metavar="NAME",
        help="prompt template, such as vicuna_v1 (default: config.json's)",
    )
    add("--compressor", metavar="C", help="NAME[,FIELD=VALUE...], as for ask")
    add("--vision-tokens", type=vision_tokens, metavar="N", help="default number for an image")
    add("--max-length", type=int, metavar="N", help="longest prompt, in positions")
    add("--mesh", metavar="tensor=N", help="shard the weights over N devices")


def _add_access(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="API keys, one a line (or LLAVA_MINI_API_KEYS)",
    )
    add("--open-metrics", action="store_true", help="/metrics needs no key")
    add("--vllm-metrics", action="store_true", help="also export metrics under vLLM's names")
    add(
        "--allowed-hosts",
        action="append",
        default=[],
        metavar="HOST",
        help="host to fetch media from; repeatable; default: none",
    )
    add("--allowed-media-folder", type=Path, metavar="DIR", help="folder that file: URLs may name")
    add(
        "--allowed-origins",
        action="append",
        default=[],
        metavar="URL",
        help="other web origin to allow (CORS); repeatable",
    )
    add(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=N",
        help="request limit, such as images=4; repeatable",
    )


def _add_load(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, "default: %(default)g"
    add("--slots", type=int, default=8, metavar="N", help=f"answers decoded together; {default}")
    add(
        "--lengths",
        metavar="N,N,...",
        help="slot lengths in positions; long slots are fewer; default:"
        " 1024,4096 and the model's own",
    )
    add(
        "--media-memory",
        type=float,
        default=2.0,
        metavar="GB",
        help=f"memory for cached images and videos; {default}",
    )
    add(
        "--max-queued",
        type=int,
        default=128,
        metavar="N",
        help=f"most answers, with waiting ones; {default}",
    )
    add(
        "--queue-timeout",
        type=float,
        default=300.0,
        metavar="S",
        help=f"longest wait for a slot, in seconds; {default}",
    )
    add(
        "--drain-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help=f"seconds to finish after SIGTERM; {default}",
    )
    add(
        "--drain-delay",
        type=float,
        default=0.0,
        metavar="S",
        help=f"seconds to accept requests after SIGTERM; {default}",
    )


def run(args: argparse.Namespace) -> int:
    _check_extra()
    _check(args)
    # Behind the checks: JAX takes a while to import, and wrong options are told at once.
    with waiting("starting"):
        from llava_mini_jax.inference.opening import open_folder
        from llava_mini_jax.serving import lifecycle

    limits = _limits(args.limit)
    bound = lifecycle.listen_on(args.host, args.port)  # before minutes are spent on weights
    with bound:
        opened = open_folder(
            args.model,
            dtype=args.dtype,
            attention=args.attention,
            vision_tower=args.vision_tower,
            template=args.conv_mode,
            max_length=args.max_length,
            vision_tokens=args.vision_tokens,
            compressor=args.compressor,
        )
        return _serve(opened, bound, limits, args)


def _check_extra() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"llava-mini serve needs {', '.join(missing)}: pip install 'llava-mini-jax[serve]'"
        )


def _check(args: argparse.Namespace) -> None:
    """Options whose values mean nothing."""
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port is {args.port}; give 1 to 65535, or 0 for any that is free")
    if args.max_queued < 1:
        raise InputError(f"--max-queued is {args.max_queued}; give 1 or more")
    if not 0 <= args.media_memory < float("inf"):
        raise InputError(f"--media-memory is {args.media_memory:g}; give gigabytes, 0 or more")
    for name, least in (("queue_timeout", 0.001), ("drain_timeout", 0), ("drain_delay", 0)):
        value = getattr(args, name)
        if not least <= value < float("inf"):
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {value:g}; give seconds, {least:g} or more")
    for name in args.served_model_name:
        if not name.strip() or not name.isprintable():
            raise InputError(
                f"--served-model-name is {short(name)}; give a name with visible characters"
            )
    for origin in args.allowed_origins:
        if origin != "*" and not origin.startswith(("http://", "https://")):
            raise InputError(
                f"--allowed-origins is {short(origin)}; give an address such as"
                " https://example.org, or * for all"
            )
    _devices(args.mesh)
    _lengths(args.lengths)
    if args.slots < 1:
        raise InputError(f"--slots is {args.slots}; give 1 or more")


def _limits(given: list[str]) -> "Limits":
    """NAME=N, of Limits' fields."""
    from llava_mini_jax.serving.limits import Limits

    fields = {field.name: field.default for field in dataclasses.fields(Limits)}
    chosen: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in fields:
            known = ", ".join(fields)
            raise InputError(f"--limit {short(text)} is unknown; give NAME=N with one of {known}")
        try:
            number = float(value)
        except ValueError:
            raise InputError(
                f"--limit {short(text)} has no number; write, for example, {name}=8"
            ) from None
        whole = number.is_integer() and not isinstance(fields[name], float)
        chosen[name] = int(number) if whole else number
        if not whole and not isinstance(fields[name], float):
            raise InputError(
                f"--limit {short(text)} is not a whole number; write, for example, {name}=8"
            )
    return Limits(**chosen)


def _lengths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise InputError(f"--lengths is {short(text)}; give positions such as 1024,4096")
    return [int(word) for word in words]


def _devices(mesh: str | None) -> int:
    """N of tensor=N; 0: no mesh."""
    if mesh is None:
        return 0
    axis, _, size = mesh.partition("=")
    if axis != "tensor" or not size.isdecimal() or int(size) < 1:
        raise InputError(f"--mesh is {short(mesh)}; give tensor=N, N devices")
    return int(size)


def _meshed(devices: int) -> contextlib.AbstractContextManager[Any]:
    """In which weights are loaded and the engine runs."""
    import jax

    from llava_mini_jax.sharding import make_mesh

    return jax.set_mesh(make_mesh(tensor=devices)) if devices else contextlib.nullcontext()


def _serve(opened: Any, bound: Any, limits: "Limits", args: argparse.Namespace) -> int:
    from llava_mini_jax.inference.model import read
    from llava_mini_jax.inference.shelf import Budget
    from llava_mini_jax.inference.worker import Worker, default_lanes
    from llava_mini_jax.serving import lifecycle
    from llava_mini_jax.serving.app import application
    from llava_mini_jax.serving.media import MediaReader
    from llava_mini_jax.serving.service import Service

    # Pillow warns of images that are merely large; the limits have one of their own.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    folder, hosts = args.allowed_media_folder, args.allowed_hosts
    reader = MediaReader(opened.bundle, limits, hosts=hosts, folder=folder)
    log = _log()
    with _meshed(_devices(args.mesh)):
        log.info("reading the weights of %s", args.model)
        with loading(args.model) as watch:
            model = read(opened, watch)
            options = _options(model, limits, args)
            lanes = default_lanes(model, args.slots, _lengths(args.lengths))
        budget = Budget(host=int(args.media_memory * 1e9))
        worker = Worker(model, lanes, budget=budget)
        worker.start()
        service = Service(worker, reader, options)
        worker.engine.on_tokens = functools.partial(
            service.metrics.observe, "iteration_tokens_total"
        )
        host, port = bound.getsockname()[:2]
        log.info("listening on http://%s:%d", host, port)
        lifecycle.run(application(service), service, bound)
        service.close()
        if worker.state == "ready":  # else it compiles, which nobody waits for any more
            worker.stop()
    return 0


def _options(model: Any, limits: "Limits", args: argparse.Namespace) -> "Options":
    from llava_mini_jax.serving import identity, keys
    from llava_mini_jax.serving.service import Options
    from llava_mini_jax.weights.hub import resolve_folder

    return Options(
        names=tuple(args.served_model_name) or (identity.served_name(args.model),),
        keys=keys.read_keys(args.api_key_file),
        open_metrics=args.open_metrics,
        limits=limits,
        defaults=identity.defaults(resolve_folder(args.model)),
        fingerprint=identity.fingerprint(model, args.attention),
        max_queued=args.max_queued,
        queue_timeout=args.queue_timeout,
        drain_timeout=args.drain_timeout,
        drain_delay=args.drain_delay,
        origins=tuple(args.allowed_origins),
        vllm_metrics=args.vllm_metrics,
    )


def _log() -> logging.Logger:
    """Lines of the server on stderr; uvicorn's own are left to its errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("llava_mini_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logging.getLogger(__name__)
