"""Telling: call the hooks of a run with what is new, and end the chains that they stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

from tombola.engine.run import Show, Status
from tombola.engine.workers import Workers
from tombola.errors import UserError
from tombola.hooks.hook import Hook, Report, StopTraining
from tombola.study.chains import Chain, Progress
from tombola.study.planner import Planner
from tombola.study.trainings import Training
from tombola.training.history import History


@contextmanager
def tell_hooks(
    show: Show, hooks: Sequence[Hook], planner: Planner, workers: Workers, *, epochs: bool
) -> Iterator[Show]:
    """Yield a function that calls `show`, and then the hooks with what is new.

    Args:
        show: the function that shows the status of a run.
        hooks: the hooks, each of which is told every report; that one raises `StopTraining` is known to the run after
            all have been told.
        planner: the planner of the study.
        workers: the workers of the run.
        epochs: whether they are told of epochs too.

    Raises:
        UserError: if something else than a function is among the hooks.
    """
    check_hooks(hooks)
    if not hooks:
        yield show
        return
    told: dict[Chain, tuple[int, int]] = {}  # the level to tell next, and its epochs that are told

    def tell(status: Status, finished: Training | None) -> None:
        show(status, finished)
        for chain, progress in status.chains.items():
            if chain in status.to_halt:
                continue
            for report in list_reports(chain, progress, status, planner.end, told.get(chain, (0, 0)), epochs=epochs):
                told[chain] = (report.level, report.epoch) if report.epoch is not None else (report.level + 1, 0)
                with workers.pause():
                    reason = _tell(hooks, report)
                if reason is not None:
                    status.to_halt[chain] = reason
                    break

    with ExitStack() as stack:
        for hook in hooks:
            if isinstance(hook, AbstractContextManager):
                stack.enter_context(hook)
        yield tell


def check_hooks(hooks: Sequence[Hook]) -> None:
    """Raise `UserError` unless these are functions.

    >>> check_hooks(["tensorboard"])
    Traceback (most recent call last):
    tombola.errors.UserError: hooks: expected functions of a report, such as tombola.hooks.tensorboard("runs"), got str
    """
    for hook in hooks if isinstance(hooks, (list, tuple)) else [hooks]:
        if not callable(hook) or hooks is hook:
            raise UserError(
                f'hooks: expected functions of a report, such as tombola.hooks.tensorboard("runs"), '
                f"got {type(hook).__name__}{' instead of a list of them' if hooks is hook else ''}"
            )


def _tell(hooks: Sequence[Hook], report: Report) -> str | None:
    """Tell hooks a report; return why the chain is to end if one of them says so."""
    reason = None
    for hook in hooks:
        try:
            hook(report)
        except StopTraining as stop:
            reason = reason or str(stop) or "a hook stopped it"
    return reason


def list_reports(
    chain: Chain, progress: Progress, status: Status, end: int, since: tuple[int, int], *, epochs: bool
) -> Iterator[Report]:
    """Yield the reports on a chain that are new.

    Args:
        chain: the chain.
        progress: its progress.
        status: the status of the run, with the epochs of the running trainings.
        end: the number of iterations of a complete training; the training up to the rewind point has no report.
        since: the level to report next, and how many of its epochs were reported.
        epochs: whether to report epochs.
    """
    level, done = since
    for ticket in progress.tickets[level:]:
        assert ticket.trained is not None
        history = ticket.trained.history
        whole = Report(chain, ticket.level, ticket.mask.density, losses=history.losses)
        if epochs:
            yield from _list_epochs(whole, done)
        diverged = history.diverged_at is not None
        yield replace(whole, metrics={} if diverged else _name_metrics(history), diverged=diverged)
        done = 0
    need = next((need for need in progress.needs if isinstance(need, Training)), None)
    if epochs and need is not None and need.end >= end:
        losses = status.losses.get(need.key, ())
        yield from _list_epochs(Report(chain, len(progress.tickets), need.mask.density, losses=losses), done)


def _list_epochs(report: Report, done: int) -> Iterator[Report]:
    for epoch in range(done + 1, len(report.losses) + 1):
        yield replace(report, epoch=epoch, losses=report.losses[:epoch])


def _name_metrics(history: History) -> dict[str, float | None]:
    accuracy = {} if history.test_accuracy is None else {"accuracy": history.test_accuracy}
    test = {**accuracy, "loss": history.test_loss, **history.metrics.get("test", {})}
    splits = {**history.metrics, "test": test}
    return {f"{split} {key}": value for split, values in splits.items() for key, value in values.items()}
