"""Ctrl-C and SIGTERM, whatever the program is busy with.

    Ctrl-C --> KeyboardInterrupt in the main thread --> its sentence, status 130
           once more, or lost in a callback that swallows exceptions --> raised again
           a second Ctrl-C, or a minute --> the process ends, also from inside of a library
    SIGTERM --> what its own handler does; `alarmed` tells since when it has waited to be done

Python runs handlers between two instructions of the main thread: not while a library computes or
waits. The wakeup file descriptor is written to at once, and a thread of ours reads it.
"""

import _thread
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
GIVEN = 60.0  # seconds that a program has to end: what was interrupted may be waited for for ever
_LOST = 255  # no signal's number
_SAME = 0.05  # seconds: a terminal and a wrapper both hand one Ctrl-C on


class _State:
    """Of this process; signals are a process's own."""

    interrupts = 0  # Ctrl-C since the program began, or since one was dealt with
    interrupted_at = 0.0  # time.monotonic() of the last one
    raised = False  # in the main thread, since then
    raised_again = 0  # by ourselves, and not yet heard of
    terminated_at: float | None = None  # time.monotonic() of the first SIGTERM
    sentence = ""  # what the second Ctrl-C says
    written: socket.socket | None = None  # what the interpreter writes signals to


def run(program: Callable[[], int], sentence: str) -> NoReturn:
    """Ends the process with the status of `program`, or by Ctrl-C with `sentence` and 130.

    Threads and what libraries do at their end are not waited for: JAX's may crash there once a
    computation was interrupted, and those of data and checkpoints may never end.
    """
    _have_streams()
    _plain_warnings()
    _watch(sentence)
    try:
        status = program()
        status = status or _flushed()
    except KeyboardInterrupt:
        status = INTERRUPTED
        say(sentence)
    except SystemExit as end:  # argparse's, after --help or a wrong option
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            say(end.code)
    except BaseException as error:
        # `leave` skips the interpreter's own end, which would have printed this.
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    if not status and _State.raised:  # somebody else has caught it
        status = INTERRUPTED
        say(sentence)
    leave(status)


def _plain_warnings() -> None:
    """What this package warns of is a line for people, without the place in the code."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *more: Any, **named: Any) -> None:
        if category is UserWarning:
            say(str(message))
        else:
            shown(message, category, *more, **named)

    warnings.showwarning = show


def _have_streams() -> None:
    """A closed stream (`>&-`) becomes one that drops what it gets.

    Python has None for it, and the next file that is opened would be what libraries print to.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                nowhere = os.open(os.devnull, os.O_RDWR)
                if nowhere != number:
                    os.dup2(nowhere, number)
                    os.close(nowhere)
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115


def _flushed() -> int:
    """The status that what is left to be printed leads to."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk
        say(f"standard output cannot be written: {error}")
        return 1
    return 0


def leave(status: int) -> NoReturn:
    """Ends the process with what it has printed, and nothing else."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed
            stream.flush()
    os._exit(status)


def say(sentence: str) -> None:
    """A line on stderr, if there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(sentence, file=sys.stderr, flush=True)


def dealt_with() -> None:
    """A Ctrl-C has done what it was for, and the program goes on: the next one is a first one."""
    time.sleep(_SAME)  # until the thread has heard of it
    _State.interrupts, _State.raised = 0, False


def alarmed() -> float | None:
    """When the first SIGTERM came (time.monotonic()), also while its handler cannot run yet."""
    return _State.terminated_at


def _watch(sentence: str) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    _State.interrupts, _State.raised, _State.sentence = 0, False, sentence
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a job in the background
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _not_lost
    watch_signals()


def watch_signals() -> None:
    """Starts the thread that hears of signals at once; Python allows it in the main thread only."""
    heard, written = socket.socketpair()
    # Python refuses a wakeup descriptor that could block.
    written.setblocking(False)
    signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    _State.written = written  # kept open
    threading.Thread(target=_hear, args=(heard,), name="signals", daemon=True).start()


def _hear(heard: socket.socket) -> None:
    while True:
        # Woken by the clock only while a program is given time to end.
        heard.settimeout(1.0 if _State.interrupts else None)
        try:
            numbers = heard.recv(64)
        except TimeoutError:
            if time.monotonic() - _State.interrupted_at > GIVEN and _State.interrupts:
                _end_now()
            continue
        for number in numbers:
            if number == signal.SIGTERM and _State.terminated_at is None:
                _State.terminated_at = time.monotonic()
            elif number == _LOST:
                # Until the callback that has swallowed one, and would swallow this, is over.
                time.sleep(_SAME)
                # `interrupt_main` writes SIGINT to our socket as well: nobody pressed that.
                _State.raised_again += 1
                _thread.interrupt_main()
            elif number == signal.SIGINT and _State.raised_again:
                _State.raised_again -= 1
            elif number == signal.SIGINT:
                _heard_interrupt()


def _heard_interrupt() -> None:
    now = time.monotonic()
    twice = _State.interrupts and now - _State.interrupted_at > _SAME
    _State.interrupts, _State.interrupted_at = _State.interrupts + 1, now
    if twice:
        _end_now()


def _end_now() -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"{_State.sentence}\n".encode())
    os._exit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _State.raised = True
    raise KeyboardInterrupt


def _not_lost(unraisable: Any) -> None:
    """Of exceptions that nothing can catch, as in a callback of the garbage collector."""
    if unraisable.exc_type is KeyboardInterrupt:
        # By the other thread: here it would be raised, and lost, before this function returns.
        assert _State.written is not None
        _State.written.send(bytes([_LOST]))
    else:
        sys.__unraisablehook__(unraisable)
