"""The command line. Its verbs parse options, call the library and print; they do not compute anything themselves."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from tombola import __version__
from tombola.cli import analysis, catalogue, report, results, run, store
from tombola.cli.advice import add_advice
from tombola.cli.options import Parser, Verb, Verbs, with_dashes
from tombola.errors import DamagedResultError, UserError, describe_exception, is_of_own_code
from tombola.exits import end_at_once, watch_exits

EXAMPLES = """\
examples:
  tombola run digits                        run a whole experiment in a minute
  tombola results digits --format csv       write its results for other programs
  tombola run digits --importances magnitude my_module:my_importance
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments of the command line; by default those of the process.

    Returns:
        The exit status: 0 for success, 1 if `verify` or `store check` found a difference, 2 for a user's mistake, 130
        for Ctrl-C, 141 if the reader of the output has closed it.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        try:
            options = _parser().parse_args([with_dashes(argument) for argument in given])
            return _call(options.verb, options)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # for example `head` has exited; discard the remaining output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        again = "; finished trainings are kept, continue with: " + shlex.join(["tombola", *given])
        print(f"\ntombola: stopped{again if given[:1] == ['run'] else ''}", file=sys.stderr, flush=True)
        if arguments is None:
            end_at_once(130)  # because the normal exit of torch can take seconds
        return 130
    except (UserError, DamagedResultError) as error:
        print(f"tombola: {add_advice(error)}", file=sys.stderr)
        return 2


def _call(verb: Verb, options: argparse.Namespace) -> int:
    """Call a verb and return its exit status. Whatever a user's code raises becomes a `UserError`."""
    with watch_exits() as exits:
        try:
            if getattr(options, "format", None) not in ("csv", "json"):
                return verb(options)
            from tombola.cli.tables import reserve_output

            with reserve_output():
                return verb(options)
        except (UserError, DamagedResultError, BrokenPipeError):
            raise
        except BaseException as error:
            if exits.is_ctrl_c(error) or not (is_of_own_code(error) or isinstance(error, SystemExit)):
                raise
            raise UserError(f"the code of the study raised {describe_exception(error)}") from error


def _parser() -> Parser:
    parser = Parser(
        prog="tombola",
        usage="tombola VERB ...",
        description="Find lottery tickets of neural networks under any importance, and compare them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tombola {__version__}")
    verbs = Verbs(parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=Parser))
    for group in (run, results, analysis, report, catalogue, store):
        group.add_verbs(verbs)
    return parser
