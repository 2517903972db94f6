"""What start-up reads and says: a wrong environment variable is told in one sentence.

    JAX_*, XLA_FLAGS --check--> JAX is imported and has its devices, or InputError
    compile_for_absent --> the ones that compilers for other machines' accelerators need
    XDG_CACHE_HOME --cache_folder--> where what can be made again is kept
    transformers --> the library, imported without its greeting

JAX reads its variables while it is imported and XLA its flags when the first device is asked for;
there a wrong one ends in a traceback, or ends the process from inside XLA.
"""

import functools
import importlib
import logging
import os
import subprocess
import sys
from typing import Any

from llava_mini_jax.errors import InputError

_FLAGS = "XLA_FLAGS"
_PROBE = "import jax; jax.devices()"
_LONGEST = 300  # seconds, for one import on a busy machine

# With which compilers for absent accelerators start: libtpu asks no cloud what machine this is, is
# silent about it, and several processes may compile at a time.
_ABSENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # any will do: it compiles for the slice that is named
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def compile_for_absent() -> None:
    """Sets what JAX must find before it starts, to compile for devices that are not here."""
    os.environ |= _ABSENT


def cache_folder(name: str) -> str:
    """The folder of that name in the user's own cache; nothing makes it here."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The standard has relative paths ignored.
    home = home if os.path.isabs(home) else os.path.expanduser("~/.cache")
    return os.path.join(home, "llava-mini-jax", name)


# That torch is missing, and is not missed; a line that is no fault of a tokenizer.
_GREETINGS = ("PyTorch was not found", "None of PyTorch", "Could not extract SentencePiece")


def transformers() -> Any:
    """The library; it would greet everyone without PyTorch, of which nothing here has a use."""
    for name in ("transformers", "transformers.tokenization_utils_tokenizers"):
        logging.getLogger(name).addFilter(_is_news)
    return importlib.import_module("transformers")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_GREETINGS)


def check(*, devices: bool = True) -> None:
    """Imports JAX and, with `devices`, asks for its devices. InputError where it cannot."""
    try:
        importlib.import_module("jax")
    except ValueError as error:
        raise _wrong(error) from error
    if devices:
        check_devices()


def check_devices() -> None:
    """InputError where JAX finds none that it can use; `distributed.start` has to come before."""
    import jax

    _check_flags(os.environ.get(_FLAGS, ""))
    try:
        jax.devices()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise _wrong(error) from error


def _wrong(error: Exception) -> InputError:
    """The sentence about what JAX said, with the variables that were set."""
    said = " ".join(str(error).split())[:300]
    told = said.lower().replace("jax.", "jax_")
    given = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    named = [name for name in given if name.lower() in told]
    if not said and "JAX_PLATFORMS" in given:  # an assertion without words, for a known name
        named, said = ["JAX_PLATFORMS"], "there is no such device here"
    if "process_index" in said and "JAX_NUM_CPU_DEVICES" in given:  # there are none
        named = ["JAX_NUM_CPU_DEVICES"]
    if not named:
        return InputError(f"JAX has no device that it can use ({said}); free or repair it")
    is_set = " and ".join(f'{name} is "{given[name]:.80}"' for name in named)
    return InputError(
        f"the environment variable {is_set}, which JAX cannot use ({said}); correct it, or unset it"
    )


@functools.cache
def _check_flags(given: str) -> None:
    """XLA ends the process where it cannot read its flags, so another one tries them first."""
    if not given:
        return
    variables = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=variables | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LONGEST,
        )
    except subprocess.TimeoutExpired:
        return  # slow, but no mistake in it
    if tried.returncode:
        lines = [line for line in tried.stderr.splitlines() if line.strip()]
        told = next((x for x in lines if "flag" in x.lower() or _FLAGS in x), "it ends the process")
        raise InputError(
            f'the environment variable {_FLAGS} is "{given:.120}", which XLA cannot use'
            f" ({told.rpartition('] ')[2]:.200}); correct it, or unset it"
        )
