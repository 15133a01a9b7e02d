"""A finished study that takes a second, for the examples of the documentation."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from typing import Any

from tombola.engine.here import WorkersHere
from tombola.engine.run import run
from tombola.models import lenet_300_100
from tombola.store.store import Store
from tombola.study.planner import Planner
from tombola.study.schema import load_study
from tombola.study.task import load_problem
from tombola.threads import one_thread


@functools.cache
def finished() -> dict[str, Any]:
    """Return a study and the folder of a store that has its results, as `study` and `store`.

    It is run when it is first asked for, in a temporary folder that is removed when Python exits.

    >>> sorted(finished())
    ['store', 'study']
    """
    few = {"train_per_class": 10, "test_per_class": 5}
    overrides = {"levels": 1, "seeds": [0], "data_seeds": [], "importances": ["magnitude", "l1"], "recipe.epochs": 1}
    own = {"task.model": lambda: lenet_300_100(inputs=64), "task.model_arguments": {}}  # trained in this process
    study = load_study("digits", {**overrides, **own, "task.dataset_arguments": few})
    folder = tempfile.mkdtemp(prefix="tombola-example-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = Store(folder)
    with one_thread():
        planner = Planner(study, load_problem(study.task), store)
        with WorkersHere(planner.problem, store) as workers:
            run(planner, workers, lambda *_: None)
    return {"study": study, "store": folder}
