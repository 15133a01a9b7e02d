"""Hooks that write to TensorBoard and to MLflow, each the package of an extra."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola.errors import UserError, as_path, describe_exception, expect

if TYPE_CHECKING:
    from tombola.hooks.hook import Report
    from tombola.study.chains import Chain


def tensorboard(folder: str | Path) -> _Writer:
    """Return a hook that writes to TensorBoard: `tensorboard --logdir FOLDER` shows one run for each chain.

    The horizontal axis of density, metrics and losses is the level; that of the losses of epochs, the epoch.

    Args:
        folder: the folder to write to.

    Raises:
        UserError: if the extra `tensorboard` is not installed; when the run begins, if the folder cannot be written.
    """
    folder = as_path(folder, "folder")
    with _installed("tensorboard", "tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # an error, if the folder cannot be written to

    def open_run(chain: Chain) -> _Run:
        writer = SummaryWriter(str(folder / _name(chain)))

        def log(key: str, value: float, step: int) -> None:
            writer.add_scalar(key, value, step)
            writer.flush()

        return log, lambda _: writer.close()

    return _Writer(f"TensorBoard in {folder}", prepare, open_run)


def mlflow(uri: str, experiment: str = "tombola") -> _Writer:
    """Return a hook that writes to MLflow, one run for each chain, with density, metrics and losses by level.

    The losses of epochs are one metric for each level, by epoch.

    Args:
        uri: the tracking server, such as "http://localhost:5000", or a database, such as "sqlite:///mlflow.db". A
            database needs the package `mlflow`; the extra has `mlflow-skinny`, which reaches servers.
        experiment: the experiment of the runs; it is created if it is missing.

    Raises:
        UserError: if the extra `mlflow` is not installed, or if a database is named without the package `mlflow`; when
            the run begins, if the server cannot be reached.
    """
    expect(uri, str, "uri", "a text, such as 'sqlite:///mlflow.db'")
    expect(experiment, str, "experiment", "a name")
    with _installed("mlflow", "mlflow"):
        from mlflow import MlflowClient
    if uri.startswith(_DATABASES) and find_spec("sqlalchemy") is None:
        raise UserError(f"MLflow at {uri}: a database needs more than mlflow-skinny: pip install mlflow")

    client: Any = None
    place = ""

    def prepare() -> None:
        nonlocal client, place
        with _few_tries():
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(experiment)
            place = client.create_experiment(experiment) if found is None else found.experiment_id

    def open_run(chain: Chain) -> _Run:
        run = client.create_run(place, run_name=_name(chain)).info.run_id
        client.log_param(run, "importance", chain.importance)
        client.log_param(run, "seed", chain.seed)
        client.log_param(run, "data_seed", chain.order_seed)

        def log(key: str, value: float, step: int) -> None:
            client.log_metric(run, key, value, step=step)

        return log, lambda status: client.set_terminated(run, status)

    return _Writer(f"MLflow at {uri}", prepare, open_run)


_DATABASES = ("sqlite:", "postgresql:", "mysql:", "mssql:")

_TRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""What MLflow tries by default takes four minutes, and 14 if nothing answers: too long before a run."""


@contextmanager
def _few_tries() -> Iterator[None]:
    """Let MLflow give up soon, unless the user has said how often and how long it tries."""
    ours = {name: value for name, value in _TRIES.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


_Run = tuple[Callable[[str, float, int], None], Callable[[str], None]]
"""How to log a value under a key at a step, and how to close the run with its status, "FINISHED" or "FAILED"."""


class _Writer:
    """A hook that logs the numbers of each report in a run of the chain, which it opens when it is first told of it.

    Args:
        place: where it writes, for messages.
        prepare: a function that fails if nothing can be written there; it is called when a run begins.
        open_run: a function that opens the run of a chain.
    """

    def __init__(self, place: str, prepare: Callable[[], None], open_run: Callable[[Chain], _Run]) -> None:
        self._place, self._prepare, self._open = place, prepare, open_run
        self._runs: dict[Chain, _Run] = {}

    def __enter__(self) -> _Writer:
        with self._reachable():
            self._prepare()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        runs, self._runs = self._runs, {}
        for _log, close in runs.values():
            if kind is None:
                with self._reachable():
                    close("FINISHED")
            else:
                with suppress(Exception):  # the user hears of what ended the run
                    close("FAILED")

    def __call__(self, report: Report) -> None:
        with self._reachable():
            if report.chain not in self._runs:
                self._runs[report.chain] = self._open(report.chain)
            log, _ = self._runs[report.chain]
            if report.epoch is not None:
                log(f"loss of level {report.level}", report.losses[-1], report.epoch)
                return
            values: dict[str, float | None] = {"density": report.density, **report.metrics}
            if report.losses:
                values["train loss"] = report.losses[-1]
            for key, value in values.items():
                if value is not None and math.isfinite(value):
                    log(_plain(key), value, report.level)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise UserError(f"hooks: {self._place} cannot be written: {describe_exception(error)}") from error


def _name(chain: Chain) -> str:
    """Return the name of a chain's run, also that of a folder; the run of `taylor/l1` is in a folder `taylor`."""
    return str(chain).replace(", ", " ")


def _plain(name: str) -> str:
    """Return a name without the characters that TensorBoard or MLflow does not have in names."""
    return "".join(letter if letter.isalnum() or letter in "-_. " else "-" for letter in name)


@contextmanager
def _installed(package: str, extra: str) -> Iterator[None]:
    """If a package is missing, raise `UserError` with what to install."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{package} is not installed: pip install 'tombola[{extra}]'") from error
