"""Collection: remove from a store what nobody needs, without taking anything from a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tombola.errors import UserError
from tombola.store.claims import Claims
from tombola.store.store import Entry, Store


@dataclass(frozen=True)
class Collection:
    """What a collection has removed, or would remove, and what it has kept."""

    removed: tuple[Entry, ...]
    kept: tuple[Entry, ...]


def collect(store: Store, needs: Callable[[], set[str]], *, remove: bool = True) -> Collection:
    """Remove all results, masks and checkpoints from a store whose names are not needed.

    No result that a run needs is lost, also if the run begins in the middle of the collection:

    - A run that began before has its file in the folder `runs`; the collection sees it and removes nothing.
    - A run that begins later sees the file of the collection, and reads no result until the collection has ended; see
      `Claims.collector`. What it then misses, it trains.
    - A version of tombola that does not wait is noticed as well, because the collection looks for other runs before
      each removal, and ends when there is one.

    Args:
        store: the store.
        needs: a function that returns the names that are needed; it is called while no run uses the store.
        remove: whether to remove anything; otherwise it is only found out what would be removed.

    Raises:
        UserError: if another run uses the store, or begins to use it.
    """
    with Claims(store.root, collects=True) as claims:
        if not claims.alone():
            raise UserError(f"store {store.root}: another run of tombola uses it; wait until that has finished")
        needed = needs()
        entries = list(store.entries())
        removed = [entry for entry in entries if entry.name not in needed]
        kept = [entry for entry in entries if entry.name in needed]
        if remove:
            store.sweep(claims.alone)
            for number, entry in enumerate(removed):
                if not claims.alone():
                    raise UserError(
                        f"store {store.root}: another run of tombola has begun to use it; {number} of {len(removed)} "
                        f"results, masks and checkpoints were removed before; wait until that run has finished"
                    )
                store.remove(entry)
    return Collection(tuple(removed), tuple(kept))
