"""Names: the hash of a document that contains everything that determines a result."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical(document: Any) -> bytes:
    """Return the canonical JSON text of a document: keys sorted, no spaces, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def name_of(document: Any) -> str:
    """Return SHA-256 of a document's canonical JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical(document)).hexdigest()
