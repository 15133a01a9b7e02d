"""Documents: the files of a store are read here, whatever lies in their place, and compared with a schema."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from tombola.files import IrregularFileError, open_regular, read_regular
from tombola.store.names import name_of
from tombola.training.history import HistoryDocument

LARGEST = 2**24
"""Bytes of a document: many times as many as the longest training needs."""

DEEPEST = 100
"""Levels of nesting of a document."""

MOST_DRAWS = 1000
"""Random draws of an analysis. A record that says more is none: each of them would be planned again."""

_MOST_PATHS = 1000
"""Tickets that a search has tried at once."""


def read_document(path: Path) -> Any:
    """Return the JSON document in a file.

    Raises:
        ValueError: if it is no JSON, or nested more than `DEEPEST` levels deep, or has half a character.
        OSError: if there is no regular file of at most `LARGEST` bytes that can be read.
    """
    document = parse_json(read_regular(path, LARGEST))
    json.dumps(document, ensure_ascii=False).encode()  # no lone surrogate, which could not be printed
    return document


def parse_json(content: bytes | str) -> Any:
    """Return the JSON document in a text.

    Raises:
        ValueError: if it is no JSON, or nested more than `DEEPEST` levels deep.

    >>> parse_json("[" * 100 + "1" + "]" * 100) is None
    False
    >>> parse_json("[" * 101 + "]" * 101)
    Traceback (most recent call last):
    ValueError: it is nested more than 100 levels deep
    >>> parse_json("[NaN]")
    Traceback (most recent call last):
    ValueError: NaN is no number in JSON
    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: it is nested more than 100 levels deep
    """
    try:
        document = json.loads(content, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    level = [document]
    for _ in range(DEEPEST + 1):
        level = [each for each in level if isinstance(each, (dict, list))]
        if not level:
            return document
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
    raise _too_deep()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {DEEPEST} levels deep")


def read_tensors(path: Path) -> bytes:
    """Return the bytes of a safetensors file whose size is the one that its header says.

    A file of tensors may be of any size, so the size is compared before it is read.

    Raises:
        OSError: if there is no such file that can be read.
    """
    with open_regular(path) as file:
        _check_size(file, path)
        file.seek(0)
        return file.read()


def check_tensors(path: Path) -> None:
    """Compare the size of a safetensors file with its header, before the file is mapped into memory.

    Raises:
        OSError: if there is no such file that can be read.
    """
    with open_regular(path) as file:
        _check_size(file, path)


def read_metadata(content: bytes) -> dict[str, Any]:
    """Return the metadata of a safetensors file, given its bytes or the first of them.

    Raises:
        ValueError: if it has none.

    >>> import numpy, safetensors.numpy
    >>> read_metadata(safetensors.numpy.save({"w": numpy.zeros(2)}, {"name": "x"}))
    {'name': 'x'}
    >>> read_metadata(safetensors.numpy.save({"w": numpy.zeros(2)}))
    Traceback (most recent call last):
    ValueError: it has no metadata
    """
    length = int.from_bytes(content[:8], "little")
    header = parse_json(content[8 : 8 + length])
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("it has no metadata")
    return metadata


def _check_size(file: BinaryIO, path: Path) -> None:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    try:
        if length > min(size - 8, LARGEST):
            raise ValueError("the header is longer than the file")
        tensors = _Header.model_validate(parse_json(file.read(length))).tensors
    except ValueError:
        raise IrregularFileError(errno.EINVAL, "it is cut short or no file of tensors", str(path)) from None
    stated = 8 + length + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if size != stated:
        raise IrregularFileError(errno.EINVAL, f"it has {size} bytes, its header says {stated}", str(path))


class _Tensor(BaseModel):
    data_offsets: tuple[StrictInt, StrictInt]


class _Header(BaseModel):
    """The header of a safetensors file: tensors by name, and metadata."""

    metadata: Annotated[dict[str, Any], Field(alias="__metadata__")] = {}
    __pydantic_extra__: dict[str, _Tensor]
    model_config = ConfigDict(extra="allow")

    @property
    def tensors(self) -> dict[str, _Tensor]:
        return self.__pydantic_extra__


_Size: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Hash: TypeAlias = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]
_Seconds: TypeAlias = Annotated[float, Field(strict=True, ge=0, lt=1e12)]
_Text: TypeAlias = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]  # it is printed: no control characters
_Scalar: TypeAlias = _Text | int | float | bool | None
_ABSENT: Any = None  # the default of a field that may be missing and is not null where it is there
_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class ResultDocument(BaseModel):
    """The schema of `result.json`.

    Args:
        identity: everything that determines the bits of the result; its hash is the result's key.
        history: the losses and the metrics.
        mask: name and shape of each layer of the mask.
        alive: the number of alive connections of each layer.
        weights: the hash of the weights.
    """

    model_config = ConfigDict(extra="forbid")

    identity: dict[StrictStr, Any]
    history: HistoryDocument
    mask: list[tuple[StrictStr, tuple[_Size, ...]]]
    alive: dict[StrictStr, _Size]
    weights: _Hash

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each layer of the mask."""
        return dict(self.mask)


class MetricsDocument(BaseModel):
    """The schema of `metrics.json`, the metrics that were computed from a result's weights afterwards.

    Args:
        hash: of the result's key and the metrics.
        metrics: by split and by the key of the metric.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    hash: str
    metrics: dict[str, dict[str, float | None]]


def read_metrics(path: Path, key: str) -> dict[str, dict[str, float | None]]:
    """Return the metrics in the file `metrics.json` of a result.

    Args:
        path: the file.
        key: the name of the result.

    Raises:
        ValueError: if they are no metrics, or not those of this result.
        OSError: if there is no regular file that can be read.
    """
    document = MetricsDocument.model_validate(read_document(path))
    if document.hash != name_of([key, document.metrics]):
        raise ValueError("it does not match its hash, or has the metrics of another result")
    return document.metrics


class _Machine(BaseModel):
    """What `tombola.engine.machine.machine` returns; earlier versions recorded less."""

    model_config = _STRICT
    __pydantic_extra__: dict[_Text, _Scalar | dict[_Text, _Scalar]]

    system: _Text = ""
    vendor: _Text = ""
    instruction_set: _Text = ""
    kernels: _Text | None = None
    versions: dict[_Text, _Text] = {}


class _Confirmation(BaseModel):
    model_config = _STRICT

    when: _Text
    machine: _Machine = _ABSENT


class _Reinitialisation(BaseModel):
    model_config = _STRICT

    level: Annotated[int, Field(ge=1, lt=2**31)]
    draws: Annotated[int, Field(ge=1, le=MOST_DRAWS)]
    importances: list[str]


class _Path(BaseModel):
    model_config = _STRICT

    importance: str
    path: Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=1)]
    early: bool = False


class _Transferred(BaseModel):
    model_config = _STRICT

    kind: str
    importance: _Text
    seed: int
    key: _Hash


class _Further(BaseModel):
    model_config = _STRICT

    verb: str
    of: list[str]
    level: Annotated[int, Field(ge=0, lt=2**31)] = 0
    draws: Annotated[int, Field(ge=1, le=MOST_DRAWS)] = 1
    importances: list[str] = []
    kinds: list[str] = []
    iterations: list[Annotated[int, Field(ge=0, lt=2**31)]] = []
    over: str = ""
    source: _Text = ""
    origin: str = ""
    trainings: list[_Transferred] = []


class _Record(BaseModel):
    """The schema of `record.json`. Every field may be missing, and there may be others."""

    model_config = _STRICT

    finished: _Text = ""
    seconds: _Seconds = 0.0
    iterations: _Size = 0
    seconds_per_iteration: _Seconds | None = None
    threads: _Size = 1
    device: _Text = ""
    machine: _Machine = _ABSENT
    confirmed: list[_Confirmation] = []
    contradicted: list[_Confirmation] = []
    reinit: _Reinitialisation = _ABSENT
    search: Annotated[list[_Path], Field(max_length=_MOST_PATHS)] = []
    further: _Further = _ABSENT


def read_record(path: Path) -> dict[str, Any]:
    """Return the record in a file, as it is.

    Raises:
        ValueError: if it is no record.
        OSError: if there is no regular file that can be read.
    """
    record: dict[str, Any] = read_document(path)
    _Record.model_validate(record)
    return record


def describe(error: OSError | ValueError) -> str:
    """Return what is wrong with a file that could not be read, in a few words.

    >>> describe(FileNotFoundError(2, "No such file or directory"))
    'No such file or directory'
    >>> from pydantic import TypeAdapter
    >>> try:
    ...     TypeAdapter(int).validate_python("x", strict=True)
    ... except ValueError as error:
    ...     print(describe(error))
    Input should be a valid integer
    """
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where[:100]}: {first['msg']}" if where else first["msg"]
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
