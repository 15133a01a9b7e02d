"""The verbs that list the built-in importances and studies: `importances` and `presets`."""

from __future__ import annotations

import argparse

from tombola.cli.options import Verbs
from tombola.terminal import say


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the command line."""
    verbs.add("importances", importances, verbs.table)
    verbs.add("presets", presets, verbs.table)


def importances(options: argparse.Namespace) -> int:
    """List the built-in importances, and the scores and normalisations that they consist of."""
    from tombola.cli.tables import show_table, wrap
    from tombola.importance import IMPORTANCES, NORMALISATIONS, SCORES, Importance

    scores = {name: Importance(score).description for name, score in SCORES.items() if name not in IMPORTANCES}
    lines = [[name, importance.description] for name, importance in IMPORTANCES.items()]
    lines += [[name, description] for name, description in scores.items()]
    if options.format == "table":
        say("Pruning compares these values over all layers; x = |w| of the surviving weights of one layer")
    show_table(["importance", "description"], lines, options.format)
    if options.format == "table":
        say(wrap("In these formulas, w are the weights, g is the gradient of the loss and H its Hessian."))
        say(
            wrap(
                f"Any score with any normalisation is an importance too, such as taylor/l1. The scores: "
                f"{', '.join(SCORES)}. The normalisations: {', '.join(NORMALISATIONS)}."
            )
        )
    return 0


def presets(options: argparse.Namespace) -> int:
    """List the presets, which are studies that come with tombola."""
    from tombola.cli.tables import show_table
    from tombola.study.schema import load_study
    from tombola.study.schema import presets as preset_files

    lines = []
    for name, path in preset_files().items():
        study = load_study(name)
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append([name, study.levels, len(study.seeds), len(study.importances), first])
    show_table(["preset", "levels", "seeds", "importances", "description"], lines, options.format)
    return 0
