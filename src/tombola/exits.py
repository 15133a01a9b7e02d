"""Exits: say so when a user's code ends the program, and distinguish its exceptions from Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from tombola.errors import UserError, describe_exception
from tombola.settings import refuse_settings

end_at_once = os._exit
"""`os._exit`, which `watch_exits` does not replace."""


class Exits:
    """What has happened inside a block of `watch_exits`."""

    def __init__(self) -> None:
        self.knows = False
        """Whether Ctrl-C is told apart from a `raise KeyboardInterrupt` of the user's code."""
        self.ctrl_c = False
        """Whether Ctrl-C was pressed."""

    def is_ctrl_c(self, error: BaseException) -> bool:
        """Return whether an exception comes from Ctrl-C, as far as that can be told."""
        return isinstance(error, KeyboardInterrupt) and (self.ctrl_c or not self.knows)


@contextmanager
def watch_exits() -> Iterator[Exits]:
    """Let `os._exit` raise `SystemExit` inside the block, and notice Ctrl-C.

    Only this process is affected: in a copy of it, such as one that a data loader forks, `os._exit` ends the copy. Code
    that ends the process by a signal or by a system call of its own cannot be kept from it.

    >>> with watch_exits():
    ...     os._exit(0)
    Traceback (most recent call last):
    SystemExit: os._exit(0)
    """
    exits, here, before = Exits(), os.getpid(), os._exit

    def refuse(status: int) -> NoReturn:
        if os.getpid() != here:
            end_at_once(status)
        raise SystemExit(f"os._exit({status!r})")

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        exits.ctrl_c = True
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, interrupt)
            stack.callback(signal.signal, signal.SIGINT, signal.default_int_handler)
            exits.knows = True
        os._exit = refuse
        stack.callback(setattr, os, "_exit", before)
        yield exits


@contextmanager
def attribute_failure(what: str) -> Iterator[None]:
    """Turn every exception of a user's code inside the block into a `UserError`, except `KeyboardInterrupt`.

    Code that changes the working directory fails too, because the paths of the store and of the data may be relative;
    the directory is changed back. So does code that changes a setting of torch, see `tombola.settings`.

    Args:
        what: the beginning of the message, which goes on with " raised ...".

    >>> import sys
    >>> with attribute_failure("my_module"):
    ...     sys.exit("usage: ...")
    Traceback (most recent call last):
    tombola.errors.UserError: my_module raised SystemExit: usage: ...
    """
    before = _working_folder()
    try:
        with refuse_settings(what):
            yield
    except (UserError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} raised {describe_exception(error)}") from error
    finally:
        after = _working_folder()
        if before is not None and after != before:
            os.chdir(before)
    if before is not None and after != before:
        raise UserError(f"{what} changed the working directory to {after}; give paths in full instead")


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return None
