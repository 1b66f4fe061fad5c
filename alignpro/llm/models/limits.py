"""Tries what a stranger's folder computes, a chat template or a pattern, where it can do no harm."""

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator

CPU_S, WALL_S = 5.0, 60.0
"""Seconds that a trial computes, and takes in all, at most."""
MEMORY = 2**30
"""Bytes that it takes beyond what this process has."""
TEXT = 2**20
"""Characters that it gives."""
_TOO_LARGE, _TOO_LONG = 3, 4


def beyond(work: Callable[[], str]) -> str | None:
    """Run `work` in a copy of this process, and say beyond which limit it went; None where it kept to all.

    What it gives or raises is lost: within the limits it can be done again here. Where a system makes no
    copies of a process, nothing is tried.
    """
    if not hasattr(os, "fork"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, whose locks the copy does not ask for
        try:
            child = os.fork()
        except OSError:  # no memory for a copy, say
            return None
    if child == 0:
        status = 1
        try:
            os.closerange(3, 1 << 12)  # a folder's lease must not outlive this process in its copy
            status = _inside(work)
        finally:
            os._exit(status)
    status = _waited(child)
    if status == _TOO_LARGE:
        return f"takes more than {MEMORY >> 30} GB"
    if status == _TOO_LONG:
        return f"writes more than {TEXT >> 20} million characters"
    return f"takes more than {CPU_S:g} s" if status < 0 else None


def _inside(work: Callable[[], str]) -> int:
    import resource

    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends it, in the midst of whatever it computes
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    with contextlib.suppress(OSError, ValueError):  # no /proc, or a lower limit
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    try:
        return _TOO_LONG if len(work()) > TEXT else 0
    except MemoryError:
        return _TOO_LARGE
    except BaseException:
        return 0  # is raised here again


def _waited(child: int) -> int:
    """The exit status of a process, or the number of the signal that ended it, negative."""
    for pause in _pauses():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9


def _pauses() -> Iterator[float]:
    until, pause = time.monotonic() + WALL_S, 0.002
    while time.monotonic() < until:
        yield pause
        pause = min(2 * pause, 0.1)
