"""Ticket files: a ticket as one safetensors file, with a seal over everything in it.

The file has the tensors `mask.<parameter>` (bool), `rewind.<name>` for every entry of the rewound state, and possibly
`trained.<name>`. A weight that modules share is there once, by its name in the mask. Its metadata has one entry,
`tombola`, a JSON document with level, layers, numbers of alive connections, history, provenance, the other names of
shared weights if there are any, and the seal: the SHA-256 over this document and all tensors. The seal shows damage
and mistakes. It is not a signature: anybody can compute it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tombola.errors import UserError
from tombola.files import open_regular
from tombola.pruning.mask import Mask
from tombola.training.history import History, HistoryDocument
from tombola.training.weights import Shared, State, apply_mask, state_hash

_LONGEST = 300
"""Characters of a message about what is wrong with a file; names in a damaged file can be of any length."""


class UnsealedTicketWarning(UserWarning):
    """A ticket file was written before tickets had a seal, so a change of its content cannot be noticed."""


@dataclass(frozen=True)
class Content:
    """What a ticket file holds.

    Args:
        level: the number of pruning rounds.
        mask: the connections that are alive.
        rewound: the state from which the ticket is trained, with pruned weights 0.0.
        trained: the trained state; None if the file does not have it.
        history: of the training.
        provenance: where the ticket comes from, as a document of JSON types.
        shared: the other names of weights that modules share, by their names in the mask.
    """

    level: int
    mask: Mask
    rewound: State
    trained: State | None
    history: History = field(default_factory=History)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    shared: Shared = field(default_factory=dict)


class _About(BaseModel):
    """The document in the metadata; `alive` and `seal` are missing in files of tombola's first version."""

    model_config = ConfigDict(extra="forbid", strict=True)

    level: Annotated[int, Field(ge=0)]
    layers: list[str]
    alive: list[int] | None = None
    history: HistoryDocument
    provenance: dict[str, Any]
    shared: dict[str, list[str]] = {}
    seal: str | None = None


def encode(content: Content) -> bytes:
    """Return the file of a ticket.

    Raises:
        UserError: if `read` would refuse the file.
    """
    others = {other for names in content.shared.values() for other in names}
    parts = {"rewind": content.rewound, "trained": content.trained or {}}
    tensors = {f"mask.{name}": alive for name, alive in content.mask.items()}
    for part, state in parts.items():
        tensors |= {f"{part}.{name}": tensor.contiguous() for name, tensor in state.items() if name not in others}
    about = {
        "level": content.level,
        "layers": list(content.mask),
        "alive": list(content.mask.counts.values()),
        "history": content.history.to_json(),
        "provenance": dict(content.provenance),
    }
    if content.shared:
        about["shared"] = {name: list(others) for name, others in content.shared.items()}
    try:
        _to_content(_About.model_validate(about), tensors)
    except ValueError as error:
        raise UserError(f"the ticket cannot be saved: {error}") from error
    about["seal"] = _compute_seal(about, tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses memory that is shared
    return safetensors.torch.save(tensors, {"tombola": json.dumps(about, sort_keys=True)})


def read(path: Path) -> Content:
    """Return what the file of a ticket holds, after every part was checked against the others and against the seal.

    Raises:
        UserError: if the file is missing, is not a ticket, or was changed or damaged since it was written.

    Warns:
        UnsealedTicketWarning: if the file was written before tickets had a seal.
    """
    try:
        open_regular(path).close()
        with safetensors.safe_open(path, "pt") as file:
            document = json.loads((file.metadata() or {})["tombola"])
            about = _About.model_validate(document)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        content = _to_content(about, tensors)
        unsealed = {key: value for key, value in document.items() if key != "seal"}
        if about.seal is not None and about.seal != _compute_seal(unsealed, tensors):
            raise ValueError("its content does not match its seal: it was changed or damaged; get it again")
        if about.seal is None and about.alive is not None:
            raise ValueError("its seal is missing: it was changed; get it again")
    except KeyError as error:
        raise _refuse(path, f"{error} is missing") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise _refuse(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except OSError as error:
        raise _refuse(path, error.strerror or str(error)) from error
    except (safetensors.SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise _refuse(path, str(error)) from error  # RuntimeError: also a document nested too deeply
    if about.seal is None:
        warnings.warn(
            f"{path}: this ticket has no seal, because an earlier version of tombola wrote it; a change of its content "
            "cannot be noticed",
            UnsealedTicketWarning,
            stacklevel=3,
        )
    return content


def _compute_seal(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the document without the seal and over names, types, shapes and bytes of all tensors."""
    text = json.dumps(about, sort_keys=True)
    return hashlib.sha256(f"{text}\n{state_hash(tensors)}".encode()).hexdigest()


def _to_content(about: _About, tensors: Mapping[str, Tensor]) -> Content:
    """Return the content of a file whose parts fit together.

    Raises:
        ValueError: if they do not.
    """
    parts: dict[str, State] = {"mask": {}, "rewind": {}, "trained": {}}
    for name, tensor in tensors.items():
        kind, _, entry = name.partition(".")
        if kind not in parts:
            raise ValueError(f"its tensor {name!r} belongs to no part of a ticket")
        parts[kind][entry] = tensor
    masks, rewound, trained = parts["mask"], parts["rewind"], parts["trained"]
    if sorted(masks) != sorted(about.layers):
        raise ValueError(f"it has masks of {', '.join(sorted(masks)) or 'no layer'}, not of the layers that it names")
    mask = Mask.from_tensors({name: masks[name] for name in about.layers})
    if about.alive is not None and about.alive != list(mask.counts.values()):
        raise ValueError("the numbers of alive connections are not those of its masks")
    if about.level == 0 and mask.alive < mask.total:
        raise ValueError("it is of level 0, the dense network, and its masks have pruned connections")
    if not 0 < mask.alive <= mask.total - about.level:  # each round removes at least one connection, and not all
        raise ValueError(f"its masks have {mask.alive} of {mask.total} connections alive, at level {about.level}")
    named = {name: tuple(others) for name, others in about.shared.items()}
    _share(named, mask, rewound, trained)
    shared = named or _find_shared(mask, rewound)
    diverged = about.history.diverged_at is not None
    _check_state("rewind", rewound, mask, finite=True)
    if trained:
        _check_state("trained", trained, mask, finite=not diverged)
        for name in rewound.keys() | trained.keys():
            if name not in rewound or name not in trained or _kind(rewound[name]) != _kind(trained[name]):
                raise ValueError(f"its rewound and its trained state differ in the type or shape of {name!r}")
    history = History.from_json(about.history.model_dump())
    rewound = apply_mask(rewound, mask, shared) if shared else rewound
    return Content(about.level, mask, rewound, trained or None, history, about.provenance, shared)


def _share(shared: Shared, mask: Mask, *states: State) -> None:
    """Give the states, which have each shared weight once, the weight under its other names."""
    for name, others in shared.items():
        if name not in mask:
            raise ValueError(f"it names weights that are shared with {name!r}, of which it has no mask")
        for state in states:
            for other in others:
                if other in state:
                    raise ValueError(f"its {other!r} is shared with {name!r} and has a tensor of its own")
                if name in state:
                    state[other] = state[name]


def _find_shared(mask: Mask, rewound: State) -> Shared:
    """Return what is shared in a file that does not say so: it has equal weights that are pruned under one name only.

    Weights that are all equal to each other, such as initial zeros and ones, are taken as weights of their own.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, alive in mask.items():
        if name not in rewound or rewound[name].shape != alive.shape or alive.all():
            continue
        weights = rewound[name][alive]
        others = tuple(
            other
            for other, tensor in rewound.items()
            if other not in mask and _kind(tensor) == _kind(rewound[name]) and tensor[alive].equal(weights)
        )
        if others and len(weights) and (weights != weights[0]).any():
            found[name] = others
    return found


def _check_state(part: str, state: State, mask: Mask, *, finite: bool) -> None:
    for name, alive in mask.items():
        weight = state.get(name)
        if weight is None or weight.shape != alive.shape:
            has = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
            raise ValueError(f"its mask of {name!r} has shape {tuple(alive.shape)}, and '{part}.{name}' {has}")
        if not weight.is_floating_point():
            raise ValueError(f"'{part}.{name}' is {weight.dtype}, expected floating point")
        if finite and not weight.isfinite().all():
            raise ValueError(f"'{part}.{name}' is not finite (NaN or infinite)")
        if (weight.masked_select(~alive) != 0).any():
            raise ValueError(f"'{part}.{name}' has a pruned weight that is not 0")
    for name, tensor in state.items():
        if tensor.is_complex():
            raise ValueError(f"'{part}.{name}' is {tensor.dtype}, expected real numbers")
        if finite and tensor.isnan().any():
            raise ValueError(f"'{part}.{name}' has NaN")


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def _refuse(path: Path, reason: str) -> UserError:
    short = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..."
    return UserError(f"{path}: cannot be read as a ticket that tombola saved: {short}")
