"""Other libraries whose loops and networks tests use: where they are missing, these tests are skipped."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(*libraries: str) -> pytest.MarkDecorator:
    """Skip a test where one of `libraries` is not installed."""
    missing = [name for name in libraries if find_spec(name) is None]
    reason = f"{' and '.join(missing)} not installed; to run: make .venv/installed-checks"
    return pytest.mark.skipif(bool(missing), reason=reason)
