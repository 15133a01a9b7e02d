"""Write the published reference of a preset from a store in which it is finished.

    python tests/write_reference.py digits --store tombola-store

takes the options of `tombola results` that name a study, its store and its data.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tombola.analysis import reference
from tombola.cli.options import open_planner, study_options
from tombola.errors import UserError
from tombola.study.tickets import Tickets

FOLDER = Path(__file__).parents[1] / "src/tombola/analysis/references"


def main() -> int:
    """Run the script."""
    options = study_options().parse_args()
    file = FOLDER / f"{options.study}.csv"
    try:
        file.write_text(reference.write(Tickets(open_planner(options))), encoding="utf-8")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{file}: {file.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
