"""The verb `completion`, which lets a shell complete what is typed."""

from __future__ import annotations

import argparse
import os
import sys

from tombola.cli.options import Verbs
from tombola.errors import UserError

_SHELLS = ("bash", "zsh", "fish")


def add_verbs(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    added = verbs.add("completion", completion)
    added.usage = "tombola completion bash|zsh|fish"
    added.add_argument("shell", metavar="SHELL", choices=_SHELLS, help="bash, zsh or fish")


def completion(options: argparse.Namespace) -> int:
    """Print a script that lets a shell complete verbs, names of presets, and options.

    Bash: add the line `eval "$(tombola completion bash)"` to ~/.bashrc. Zsh: add `eval "$(tombola completion zsh)"` to
    ~/.zshrc. Fish: add `tombola completion fish | source` to ~/.config/fish/config.fish.
    """
    try:
        import argcomplete
    except ImportError as error:
        raise UserError(f"completion: {error}; install it with: pip install 'tombola[completion]'") from error
    print(argcomplete.shellcode(["tombola"], shell=options.shell))  # noqa: T201
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell if it asks what can be typed next; otherwise do nothing."""
    if "_ARGCOMPLETE" in os.environ:
        try:
            import argcomplete
        except ImportError:
            sys.exit(1)
        argcomplete.autocomplete(parser, always_complete_options=False)  # else they would hide the names of presets
