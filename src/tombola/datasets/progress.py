"""Progress bars on standard error; nothing is printed if that is not a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A bar that counts items or bytes up to `total`, shown while its context is open.

    pooch's downloader drives a bar of bytes itself: it sets `total`, then calls `update`, `reset` and `close`.

    >>> with Bar("decoding", total=2) as bar:
    ...     bar.update(2)
    """

    def __init__(self, what: str, total: float = 0, of_bytes: bool = False, shown: bool = True) -> None:
        console = Console(stderr=True)
        count = DownloadColumn() if of_bytes else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
        )
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def total(self) -> float:
        """The number of items or bytes at the end."""
        return self._progress.tasks[0].total or 0

    @total.setter
    def total(self, total: float) -> None:
        self._progress.update(self._task, total=total)

    def update(self, count: float) -> None:
        """Advance by `count`."""
        self._progress.update(self._task, advance=count)

    def reset(self) -> None:
        """Go back to 0."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()
