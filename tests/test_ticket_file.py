"""The files of tickets: what is changed, damaged or forged is refused, in one sentence."""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tombola import History, Mask, Ticket, Trained, UserError, Weights
from tombola.lottery.ticket_file import UnsealedTicketWarning, _compute_seal
from tombola.training.weights import apply_mask

About = dict[str, Any]
Tensors = dict[str, Tensor]


def make_ticket() -> Ticket:
    numbers = torch.Generator().manual_seed(0)
    state = {
        "a.weight": torch.randn(4, 5, generator=numbers),
        "a.bias": torch.randn(4, generator=numbers),
        "b.weight": torch.randn(3, 4, generator=numbers),
        "norm.steps": torch.tensor(7),
    }
    shapes = {"a.weight": (4, 5), "b.weight": (3, 4)}
    mask = Mask.from_tensors({name: torch.rand(shape, generator=numbers) < 0.5 for name, shape in shapes.items()})
    end = apply_mask({name: tensor + 1 for name, tensor in state.items()}, mask)
    history = History(losses=(0.9, 0.4), test_accuracy=0.8, test_loss=0.5)
    return Ticket(3, mask, Weights.of(state), Trained(Weights.of(end), history), {"importance": "l1", "seed": 0})


TICKET = make_ticket()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    TICKET.save(tmp_path / "t.safetensors", trained=True)
    return tmp_path / "t.safetensors"


def rewrite(path: Path, change: Callable[[About, Tensors], None]) -> None:
    """Change the document and the tensors of a file, and write it again with the old seal."""
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["tombola"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about, tensors)
    safetensors.torch.save_file(tensors, path, {"tombola": json.dumps(about, sort_keys=True)})


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        Ticket.load(path)
    text = str(error.value)
    start = f"{path}: cannot be read as a ticket that tombola saved: "
    assert text.startswith(start)
    assert len(text) - len(start) < 320
    return text.removeprefix(start)


def content(ticket: Ticket) -> list[object]:
    trained = ticket.trained
    states = [ticket.rewind.hash, trained and trained.weights.hash, trained and trained.history]
    return [ticket.level, ticket.mask.hash, list(ticket.mask), ticket.provenance, *states]


@functools.cache
def _save(path: Path) -> tuple[list[object], bytes]:
    """Write a ticket; return its content, and the bytes of its file."""
    TICKET.save(path, trained=True)
    return content(Ticket.load(path)), path.read_bytes()


@settings(max_examples=5 * settings.default.max_examples, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_changed_byte_never_gives_another_ticket(
    tmp_path_factory: pytest.TempPathFactory, place: float, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"mutated-{os.getpid()}.safetensors"
    expected, sound = _save(path)
    data = bytearray(sound)
    data[int(place * len(data))] ^= value
    path.write_bytes(data)
    found, message = expected, ""
    try:
        found = content(Ticket.load(path))
    except UserError as error:
        message = str(error)
    assert found == expected
    assert len(message) < 500


TYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
VALUES = [None, -1, 10**30, 0.5, "x", [], {}, True, math.nan, "\x1b[31m", "y" * 5000]
PARTS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "another's": lambda tensor, other, _: other.clone(),
    "zeros": lambda tensor, *_: torch.zeros_like(tensor),
    "ones": lambda tensor, *_: torch.ones_like(tensor),
    "type": lambda tensor, _, drawn: tensor.to(TYPES[drawn % len(TYPES)]),
    "shape": lambda tensor, *_: tensor.reshape(-1),
    "order": lambda tensor, *_: tensor.reshape(-1).flip(0).reshape(tensor.shape),
}


@given(
    part=st.sampled_from([*PARTS, "gone", "document"]),
    place=st.integers(0, 999),
    other=st.integers(0, 999),
    seal=st.sampled_from(["kept", "removed", "computed again"]),
)
def test_a_changed_part_gives_another_ticket_only_if_the_seal_is_computed_again(
    tmp_path_factory: pytest.TempPathFactory, part: str, place: int, other: int, seal: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"changed-{os.getpid()}.safetensors"
    expected, sound = _save(path)
    path.write_bytes(sound)

    def change(about: About, tensors: Tensors) -> None:
        names = sorted(tensors)
        name, value = names[place % len(names)], VALUES[other % len(VALUES)]
        if part == "document":
            inner = about if place % 2 else about["history" if place % 4 else "provenance"]
            inner[sorted(inner)[place % len(inner)]] = value
        elif part == "gone":
            del tensors[name]
        else:
            tensors[name] = PARTS[part](tensors[name], tensors[names[other % len(names)]], other)
        if seal != "kept":
            about.pop("seal")
        if seal == "computed again":
            about["seal"] = _compute_seal(about, tensors)

    rewrite(path, change)
    ticket, message = None, ""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            ticket = Ticket.load(path)
        except UserError as error:
            message = str(error)
    assert len(message) < 500
    if ticket is None:
        return
    if seal != "computed again" and not warned:
        assert content(ticket) == expected
    assert all(not ticket.rewound[name][~alive].any() for name, alive in ticket.mask.items())


def _swap(_: About, tensors: Tensors) -> None:
    tensors["rewind.a.bias"] = tensors["trained.a.bias"].clone()


def _clear_mask(about: About, tensors: Tensors) -> None:
    for kind in ("rewind", "trained"):
        tensors[f"{kind}.b.weight"] = torch.zeros(3, 4)
    tensors["mask.b.weight"] = torch.zeros(3, 4, dtype=torch.bool)
    about["alive"][1] = 0


def _rename(about: About, _: Tensors) -> None:
    about["provenance"]["importance"] = "l2"


def _level(about: About, _: Tensors) -> None:
    about["level"] = 4


@pytest.mark.parametrize("change", [_swap, _clear_mask, _rename, _level])
def test_a_change_that_fits_breaks_the_seal(path: Path, change: Callable[[About, Tensors], None]) -> None:
    rewrite(path, change)
    assert refusal(path) == "its content does not match its seal: it was changed or damaged; get it again"


def test_the_seal_does_not_depend_on_how_the_file_is_laid_out(path: Path) -> None:
    rewrite(path, lambda *_: None)
    assert content(Ticket.load(path))[1:4] == [TICKET.mask.hash, ["a.weight", "b.weight"], dict(TICKET.provenance)]


def test_a_ticket_without_a_seal_is_loaded_with_a_warning(path: Path) -> None:
    expected = content(Ticket.load(path))

    def as_before(about: About, _: Tensors) -> None:
        del about["seal"], about["alive"]

    rewrite(path, as_before)
    with pytest.warns(UnsealedTicketWarning, match="this ticket has no seal") as caught:
        found = content(Ticket.load(path))
    assert found == expected
    assert caught[0].filename == __file__


def _set(name: str, value: Tensor) -> Callable[[About, Tensors], None]:
    return lambda _, tensors: tensors.update({name: value})


def _tell(name: str, value: object) -> Callable[[About, Tensors], None]:
    return lambda about, _: about.update({name: value})


FULL = torch.ones(4, 5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("rewind.a.weight", FULL), "'rewind.a.weight' has a pruned weight that is not 0"),
        (_set("trained.a.weight", FULL), "'trained.a.weight' has a pruned weight that is not 0"),
        (_set("rewind.a.weight", FULL * torch.nan), "'rewind.a.weight' is not finite (NaN or infinite)"),
        (_set("trained.b.weight", torch.full((3, 4), torch.inf)), "'trained.b.weight' is not finite (NaN or infinite)"),
        (_set("rewind.a.weight", FULL.cfloat()), "'rewind.a.weight' is torch.complex64, expected floating point"),
        (_set("rewind.a.weight", FULL.long()), "'rewind.a.weight' is torch.int64, expected floating point"),
        (
            _set("rewind.a.weight", torch.ones(5, 4)),
            "its mask of 'a.weight' has shape (4, 5), and 'rewind.a.weight' has shape (5, 4)",
        ),
        (_set("mask.a.weight", FULL), "mask of layer 'a.weight': expected a bool tensor, got torch.float32"),
        (
            _set("mask.c.weight", FULL.bool()),
            "it has masks of a.weight, b.weight, c.weight, not of the layers that it names",
        ),
        (_set("rewind.a.bias", torch.ones(4) * torch.nan), "'rewind.a.bias' has NaN"),
        (_set("rewind.a.bias", torch.ones(4).cfloat()), "'rewind.a.bias' is torch.complex64, expected real numbers"),
        (_set("other.a", FULL), "its tensor 'other.a' belongs to no part of a ticket"),
        (_set("mask.a.weight", FULL.bool()), "the numbers of alive connections are not those of its masks"),
        (
            _set("trained.a.bias", torch.ones(4).double()),
            "its rewound and its trained state differ in the type or shape of 'a.bias'",
        ),
        (_set("trained.new", torch.ones(4)), "its rewound and its trained state differ in the type or shape of 'new'"),
        (_tell("level", 0), "it is of level 0, the dense network, and its masks have pruned connections"),
        (_tell("level", -1), "level: Input should be greater than or equal to 0"),
        (_tell("level", 20), "its masks have 14 of 32 connections alive, at level 20"),
        (_tell("level", "3"), "level: Input should be a valid integer"),
        (_tell("layers", ["a.weight"]), "it has masks of a.weight, b.weight, not of the layers that it names"),
        (_tell("more", 1), "more: Extra inputs are not permitted"),
        (_tell("history", {}), "history.losses: Field required"),
        (_tell("seal", "0" * 64), "its content does not match its seal: it was changed or damaged; get it again"),
    ],
)
def test_parts_that_do_not_fit(path: Path, change: Callable[[About, Tensors], None], reason: str) -> None:
    rewrite(path, change)
    assert refusal(path) == reason

    def without_seal(about: About, _: Tensors) -> None:
        del about["seal"], about["alive"]

    if "seal" not in reason and "numbers of alive" not in reason:
        rewrite(path, without_seal)
        assert refusal(path) == reason


def test_weights_that_diverged_may_be_infinite(path: Path) -> None:
    diverged = Trained(Weights.of({n: t * torch.inf for n, t in TICKET.rewound.items()}), History(diverged_at=5))
    state = apply_mask({name: torch.full_like(t, 2) for name, t in TICKET.rewound.items()}, TICKET.mask)
    state["a.weight"][TICKET.mask["a.weight"]] = torch.inf
    Ticket(3, TICKET.mask, TICKET.rewind, Trained(Weights.of(state), diverged.history)).save(path, trained=True)
    again = Ticket.load(path)
    assert again.trained is not None
    assert again.trained.history.diverged_at == 5


def test_a_document_nested_too_deeply_and_a_name_of_any_length(path: Path) -> None:
    tensors = {f"mask.{'n' * 5000}": torch.ones(2, dtype=torch.bool)}
    about = {"level": 1, "layers": [], "history": History().to_json(), "provenance": {}}
    safetensors.torch.save_file(tensors, path, {"tombola": json.dumps(about)})
    assert refusal(path).endswith("n...")
    safetensors.torch.save_file(tensors, path, {"tombola": "[" * 50_000 + "]" * 50_000})
    assert refusal(path)


def test_a_seal_that_was_removed_is_missed(path: Path) -> None:
    for remove in (lambda about, _: about.pop("seal"), lambda about, _: about.update(seal=None)):
        rewrite(path, remove)
        assert refusal(path) == "its seal is missing: it was changed; get it again"


def test_a_provenance_nested_deeply_and_a_path_that_is_too_long(path: Path) -> None:
    with safetensors.safe_open(path, "pt") as file:
        text = file.metadata()["tombola"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    nested = '{"in": ' * 980 + "1" + "}" * 980
    safetensors.torch.save_file(tensors, path, {"tombola": text.replace('"seed": 0', f'"seed": {nested}')})
    assert refusal(path)
    long = path.parent / ("x" * 300)
    with pytest.raises(UserError, match="cannot be read as a ticket that tombola saved"):
        Ticket.load(long)


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    state = {**TICKET.rewind.load(), "a.bias": torch.full((4,), torch.nan)}
    with pytest.raises(UserError, match=r"the ticket cannot be saved: 'rewind.a.bias' has NaN"):
        Ticket(3, TICKET.mask, Weights.of(state), None).save(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_states_that_share_memory_are_saved(tmp_path: Path) -> None:
    state = {**TICKET.rewind.load()}
    state["norm.more"] = state["norm.steps"]
    Ticket(3, TICKET.mask, Weights.of(state), Trained(Weights.of(state), History())).save(tmp_path / "t", trained=False)
    assert Ticket.load(tmp_path / "t").rewound["norm.more"] == 7


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        assert refusal(path) == "it is not a regular file"


def test_no_warning_for_a_sealed_ticket(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ticket.load(path)


@pytest.mark.parametrize("path", [None, 3, b"ticket", []])
def test_what_is_no_path_is_no_ticket(path: Any) -> None:
    with pytest.raises(UserError, match=r"^Ticket.load: expected a path, got "):
        Ticket.load(path)
