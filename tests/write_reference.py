"""Write the published reference of a preset from a store in which it is finished.

    python tests/write_reference.py digits --store tombola-store

takes the options of `tombola results` that name a study, its store and its data.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tombola.analysis import reference
from tombola.cli.options import open_planner, study_options
from tombola.errors import DamagedResultError, UserError
from tombola.files import write_output
from tombola.study.schema import presets
from tombola.study.tickets import Tickets

FOLDER = Path(__file__).parents[1] / "src/tombola/analysis/references"


def main() -> int:
    """Run the script."""
    options = study_options().parse_args()
    file = FOLDER / f"{options.study}.csv"
    try:
        if options.study not in presets():
            raise UserError(f"{options.study}: expected the name of a preset, one of {', '.join(presets())}")
        write_output(file, reference.write(Tickets(open_planner(options))).encode())
    except (UserError, DamagedResultError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{file}: {file.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
