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


def leave(code: int) -> NoReturn:
    """Runs what was registered for the exit, flushes the streams, and ends the process with `code`.

    Threads are not waited for: what must be finished, main has finished. The interpreter's own end is left out.
    """
    for end in (atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        with suppress(Exception):  # a closed pipe, a full disk: the code is what counts
            end()
    os._exit(code)
