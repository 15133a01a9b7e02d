"""The command line. Its verbs parse options, call the library and print; they do not compute anything themselves."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import os
import shlex
import sys
import textwrap
import threading
from collections.abc import Sequence
from typing import Any, TextIO

from tombola import __version__
from tombola.cli import analysis, catalogue, completion, find, further, report, results, run, start, store, trained
from tombola.cli.advice import add_advice
from tombola.cli.options import Parser, Verb, Verbs, store_options, study_options, table_options, with_dashes
from tombola.errors import DamagedResultError, UserError, describe_exception, is_of_own_code
from tombola.exits import end_at_once, watch_exits
from tombola.terminal import say, visible_lines

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN}
"""The errors of a disk that is full, and of a pipe that is full and does not wait for its reader."""

_BROKEN = {errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EBADF}
"""The errors of a disk that is broken, and of a file system on another machine that has gone."""

_LIMITS = {*_FULL, *_BROKEN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""The errors of a system that is full, broken or at a limit: they are told in a sentence."""

_PATIENCE = 5.0  # seconds that a thread of a user's code has to end after the command

GROUPS = {
    "run a study": (start, run, find),
    "show what was found": (results, report),
    "analyse the tickets": (analysis, further, trained),
    "look after the store": (store,),
    "about tombola": (catalogue, completion),
}
"""The groups of verbs, and the modules that have them."""

_TRAIN = {"run", "find", "reinit", "controls", "combine", "transfer", "rewind-point", "early"}
"""The verbs that train networks and keep each training when it is done."""

_INDENT = 16
"""The width of the column of verbs in the help."""

EXAMPLES = """\
examples:
  tombola run digits                      run a whole experiment in a minute
  tombola results digits --format csv     write its results for other programs
  tombola run digits --importances magnitude mine:importance
                                          add an importance of your own

exit status:
  0     success
  1     verify or store check found a difference or damage
  2     a mistake in what was asked for; the message says what to do
  130   stopped by Ctrl-C; finished trainings are kept
  141   the program that reads the output has closed it
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments of the command line; by default those of the process.

    Returns:
        The exit status: 0 for success, 1 if `verify` or `store check` found a difference, 2 for a user's mistake, 130
        for Ctrl-C, 141 if the reader of the output has closed it.
    """
    status = _run(arguments)
    if arguments is None:
        _end_soon(status)
    return status


def _run(arguments: Sequence[str] | None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    _prepare_streams()
    try:
        try:
            parser = make_parser(with_study=not given or given[0] not in ("-h", "--help"))
            completion.complete(parser)
            options = parser.parse_args([with_dashes(argument) for argument in given])
            return _call(options.verb, options, ends=arguments is None)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # for example `head` has exited
        _discard(sys.stdout)
        return 141
    except (OSError, RuntimeError) as error:
        limit = _describe_limit(error)
        if limit is None:
            raise
        _discard(sys.stdout)
        _tell(f"tombola: {limit}")
        return 2
    except KeyboardInterrupt:
        again = "; finished trainings are kept, continue with: " + shlex.join(["tombola", *given])
        _tell(f"\ntombola: stopped{again if set(given[:1]) & _TRAIN else ''}")
        if arguments is None:
            end_at_once(130)  # because the normal exit of torch can take seconds
        return 130
    except (UserError, DamagedResultError) as error:
        _tell(f"tombola: {add_advice(error)}")
        return 2
    except (ValueError, AttributeError):
        if not (_is_closed(sys.stdout) or _is_closed(sys.stderr)):
            raise
        _tell("tombola: the code of the study closed the standard output; leave it open")
        return 2


def _describe_limit(error: OSError | RuntimeError) -> str | None:
    """Return a sentence on the limit of the system that an exception is about; None if it is about something else."""
    number = error.errno if isinstance(error, OSError) else None
    of_fork = number == errno.EAGAIN and not hasattr(error, "characters_written")  # which that of an output has
    if of_fork or str(error) == "can't start new thread":
        return "the system allows no more processes and threads; raise the limit (ulimit -u) or end other programs"
    if isinstance(error, OSError) and number in _LIMITS:
        return f"{error.filename or 'the output'} cannot be written or read: {error.strerror}"
    return None


def _is_closed(stream: TextIO | None) -> bool:
    """Return whether a stream was closed, or replaced by None or by what is no stream."""
    return bool(getattr(stream, "closed", True))


def _tell(text: str) -> None:
    """Print a line to standard error, also where Python's stream was closed: under json and csv, it is both."""
    if not _is_closed(sys.stderr):
        try:
            say(text, file=sys.stderr, flush=True)
        except OSError:  # it is on a full disk
            _discard(sys.stderr)
        return
    with contextlib.suppress(OSError):  # the number is closed too
        os.write(2, f"{visible_lines(text)}\n".encode(errors="backslashreplace"))


def _prepare_streams() -> None:
    """Let no character of a name, and no stream that was closed before the start, raise an exception."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; the next file that is opened would get its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard(stream: TextIO) -> None:
    """Discard what a stream has not written yet, which Python would write at its end."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream has no number, as in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _end_soon(status: int) -> None:
    """Let the process end although a thread that a user's code has started goes on; Python would wait for it."""
    if _has_threads():
        timer = threading.Timer(_PATIENCE, _end_without_threads, [status])
        timer.daemon = True
        timer.start()


def _has_threads() -> bool:
    return any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate())


def _end_without_threads(status: int) -> None:
    if _has_threads():  # else what is left is done by this process itself, as when torch ends
        _tell(f"tombola: a thread of the study's code still runs after {_PATIENCE:g} s; the command ends without it")
        end_at_once(status)


def _call(verb: Verb, options: argparse.Namespace, *, ends: bool) -> int:
    """Call a verb and return its exit status. Whatever a user's code raises becomes a `UserError`.

    Args:
        verb: the verb.
        options: its options.
        ends: whether the process ends after it.
    """
    with watch_exits() as exits:
        try:
            _check_folder()
            if getattr(options, "format", None) not in ("csv", "json"):
                return verb(options)
            from tombola.cli.tables import reserve_output

            with reserve_output(to_the_end=ends):
                return verb(options)
        except (UserError, DamagedResultError, BrokenPipeError):
            raise
        except BaseException as error:
            if exits.is_ctrl_c(error) or not (is_of_own_code(error) or isinstance(error, SystemExit)):
                raise
            raise UserError(f"the code of the study raised {describe_exception(error)}") from error


def _check_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError("the working directory has been removed; change to another one") from error


@functools.cache
def make_parser(*, with_study: bool = True) -> Parser:
    """Return the parser of the command line.

    Args:
        with_study: whether the verbs have the options about a study, which the list of verbs does not need.
    """
    parser = Parser(
        prog="tombola",
        usage="tombola VERB ...",
        description="Find lottery tickets of neural networks under any importance, and compare them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        action=_Version,
        help="show the versions of tombola and torch, and which kernels are used, and exit",
    )
    parsers = parser.add_subparsers(required=True, metavar="VERB", help=argparse.SUPPRESS, parser_class=Parser)
    about_study = study_options() if with_study else Parser(add_help=False)
    verbs = Verbs(parsers, about_study, table_options(), store_options(), {})
    texts = []
    for title, modules in GROUPS.items():
        before = len(verbs.texts)
        for module in modules:
            module.add_verbs(verbs)
        texts.append(_list_verbs(title, list(verbs.texts.items())[before:]))
    parser.epilog = "\n".join([*texts, EXAMPLES])
    return parser


def _list_verbs(title: str, verbs: Sequence[tuple[str, str]]) -> str:
    """Return the verbs of a group with their texts, in lines of at most 80 characters."""
    lines = [f"{title}:"]
    for name, text in verbs:
        if " " not in name:
            first, *others = textwrap.wrap(" ".join(text.split()), 80 - _INDENT) or [""]  # python -OO has no texts
            lines += [f"  {name}".ljust(_INDENT) + first, *(" " * _INDENT + other for other in others)]
    return "\n".join(lines) + "\n"


class _Version(argparse.Action):
    """The argparse action that prints the versions of tombola, of torch and of the kernels, and exits."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print the versions."""
        import torch

        from tombola import kernels

        say(f"tombola {__version__}, torch {torch.__version__}, sparse kernels: {kernels.instruction_set() or 'none'}")
        parser.exit()
