"""The one exception that stands for a user's mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: its text says what, where, what was expected and what to do.

    The command line prints the text as one sentence and exits with status 2.

    >>> raise UserError("levels must be 0 or more, got -1")
    Traceback (most recent call last):
    tombola.errors.UserError: levels must be 0 or more, got -1
    """


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a clause that names the choices nearest to `name`, or all of them where none is near.

    >>> did_you_mean("magnitud", ["magnitude", "l1"])
    "did you mean 'magnitude'?"
    >>> did_you_mean("LeNet", ["resnet20", "lenet_300_100"])
    "did you mean 'lenet_300_100'?"
    >>> did_you_mean("xyz", ["magnitude", "l1"])
    "choose from 'magnitude', 'l1'"
    """
    known = list(choices)
    folded = {choice.casefold(): choice for choice in known}
    near = [choice for choice in known if name and choice.casefold().startswith(name.casefold())]
    near = near or [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.6)]
    quoted = ", ".join(repr(choice) for choice in (near or known))
    return f"did you mean {quoted}?" if near else f"choose from {quoted}"
