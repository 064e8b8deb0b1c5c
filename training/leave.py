"""The end of a process that had a process group: with the exit code that it was given, whatever still runs.

The interpreter, once it ends, unwinds each thread that asks for its lock, and C++ takes that for a crash. gloo's
threads ask for it when they let go of the last collective's tensors, the watch over the ranks after each request to
the store: now and then a run that was done, or preempted and saved, ended with SIGABRT, which Slurm does not requeue.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

from training.errors import EXIT_FAILED


def leave(code: int) -> NoReturn:
    """Runs what was registered for the exit, flushes the streams, and ends the process with `code`.

    With 1 instead of 0 where what was printed to stdout is lost: a table on a full disk is no table. Threads are not
    waited for: what must be finished, main has finished. The interpreter's own end is left out.
    """
    atexit._run_exitfuncs()  # tells what fails in them, and raises nothing
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        code = code or EXIT_FAILED
        _tell(f"error: stdout cannot be written: {getattr(error, 'strerror', None) or error}\n")
    _tell("")
    os._exit(code)


def _tell(text: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # nobody is left to be told
            sys.stderr.write(text)
            sys.stderr.flush()
