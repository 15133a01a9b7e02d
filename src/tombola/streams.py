"""Independent random streams, derived from one seed by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *name: str | int) -> int:
    """Return the 63-bit seed of the stream `name` of `seed`.

    It consists of the first 8 bytes of the SHA-256 of the seed and the parts of the name. Streams with different names
    are therefore independent, and no stream depends on which other streams are used.

    >>> derive(0, "order", 3) == derive(0, "order", 3) != derive(0, "order", 4)
    True
    """
    text = "\0".join([str(seed), *(str(part) for part in name)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *name: str | int) -> torch.Generator:
    """Return a CPU generator at the start of the stream `name` of `seed`."""
    return torch.Generator().manual_seed(derive(seed, *name))


@contextmanager
def ambient(seed: int, *name: str | int) -> Iterator[None]:
    """Seed torch's global generator with the stream `name` of `seed` inside the block, and restore it afterwards.

    This is for code that takes no generator, such as the constructors of modules.
    """
    number, gpus = derive(seed, *name), torch.cuda.device_count()
    with torch.random.fork_rng(devices=range(gpus)):
        torch.default_generator.manual_seed(number)  # torch.manual_seed formats its stack for each kind of device
        if gpus:
            torch.cuda.manual_seed_all(number)
        yield
