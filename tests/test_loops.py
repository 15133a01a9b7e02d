"""Loops of one's own: pruned weights stay 0.0 whatever trains them, and rewinding gives equal bits."""

from __future__ import annotations

import copy
import gc
import math
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from processes import LONG, from_fork_server
from tombola import Mask, Ticket, UserError, Weights, prune
from tombola.importance import find, l1, magnitude
from tombola.loops import Hold, Snapshot, hold, lightning_callback, release, rewind, snapshot, transformers_callback
from tombola.loops import prune as prune_model
from tombola.loops.callbacks import LightningHooks, TransformersHooks
from tombola.loops.shards import gather
from tombola.pruning.fit import find_weights, match_names

numbers = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(24, 6, generator=numbers), torch.randint(3, (24,), generator=numbers)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3))


def half(model: nn.Module, density: float = 0.5) -> Mask:
    return prune_model(model, Mask.ones_like(model), magnitude, 1 - density)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def step(model: nn.Module, optimizer: Optimizer, batch: int = 0) -> Tensor:
    """Take one step with the closure that some optimizers need."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(INPUTS[batch::3]), LABELS[batch::3])
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return closure()


def check_zeros(model: nn.Module, mask: Mask, optimizer: Optimizer | None = None) -> None:
    """Pruned weights are 0.0 and others are not; gradients and state of pruned weights are 0.0 too."""
    for name, weight in find_weights(model, mask).items():
        alive, whole = mask[name], gather(weight)
        assert (whole[~alive] == 0).all()
        assert (whole[alive] != 0).all()
        state = [] if optimizer is None else list(optimizer.state.get(weight, {}).values())
        for tensor in (weight.grad, *state):
            if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                assert (gather(tensor)[~alive] == 0).all()


def equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


# Any optimizer.

OPTIMIZERS = {
    name: each
    for name, each in vars(torch.optim).items()
    if isinstance(each, type) and issubclass(each, Optimizer) and name not in ("Optimizer", "SparseAdam")
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero_under_every_optimizer_of_torch(name: str) -> None:
    model = network()
    mask, parameters = half(model), list(model.parameters())
    if name == "Muon":  # for matrices only
        parameters = [parameter for parameter in parameters if parameter.ndim == 2]
    optimizer = OPTIMIZERS[name](parameters)  # type: ignore[call-arg]
    before = model[0].weight.detach().clone()
    with hold(model, mask, optimizer):
        for batch in range(3):
            step(model, optimizer, batch)
            check_zeros(model, mask, optimizer)
    assert not torch.equal(before * mask["0.weight"], model[0].weight)


def test_without_a_hold_pruned_weights_grow_again() -> None:
    model = network()
    mask = half(model)
    Ticket(1, mask, Weights.of(model.state_dict()), None).apply(model)
    optimizer = adamw(model)
    with hold(model, mask, optimizer):
        step(model, optimizer)
        check_zeros(model, mask)
    step(model, optimizer)
    assert (model[0].weight[~mask["0.weight"]] != 0).any()


def test_a_hold_begins_with_zeros_also_in_the_state_of_the_optimizer() -> None:
    model = network()
    optimizer = adamw(model)
    step(model, optimizer)
    mask = half(model)
    handle = hold(model, mask, optimizer)
    assert isinstance(handle, Hold)
    assert handle.mask == mask
    for name in mask:
        weight = model.get_parameter(name)
        assert (weight[~mask[name]] == 0).all()
        assert (optimizer.state[weight]["exp_avg"][~mask[name]] == 0).all()
    handle.remove()
    handle.remove()
    assert not model[0].weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def test_state_that_is_no_number_for_each_weight_is_left_alone() -> None:
    class Quantised(torch.optim.SGD):
        """An optimizer with codes as its state; code 0 need not mean 0.0."""

    model = network()
    optimizer = Quantised(model.parameters(), lr=0.1)
    codes = torch.full((10, 6), 7, dtype=torch.uint8)
    optimizer.state[model[0].weight] = {"codes": codes, "count": 3, "other": torch.ones(6)}
    with hold(model, half(model), optimizer):
        step(model, optimizer)
    assert (codes == 7).all()


def test_several_optimizers() -> None:
    model = network()
    mask = half(model)
    one, other = (torch.optim.Adam(layer.parameters(), lr=0.1) for layer in (model[0], model[3]))
    with pytest.raises(UserError, match=r"the optimizer does not have the model's weights '3\.weight'; make it from"):
        hold(model, mask, one)
    with hold(model, mask, one, other):
        for optimizer in (one, other):
            step(model, optimizer)
        check_zeros(model, mask)


def test_layers_that_are_not_trained_or_not_in_the_mask() -> None:
    model = network()
    mask = half(model)
    model[0].weight.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with hold(model, mask, torch.optim.SGD(trained, lr=0.1)) as held:
        step(model, torch.optim.SGD(trained, lr=0.1))
        assert held.mask is mask
    partial_mask = Mask.from_tensors({"3.weight": mask["3.weight"]})
    model, optimizer = network(), None
    optimizer = adamw(model)
    with hold(model, partial_mask, optimizer):
        step(model, optimizer)
    assert (model[0].weight != 0).all()
    check_zeros(model, partial_mask)


def test_a_held_model_can_be_collected() -> None:
    model = network()
    optimizer = adamw(model)
    hold(model, half(model), optimizer)
    step(model, optimizer)
    gone = weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_a_hold_ends_with_its_optimizer() -> None:
    model = network()
    optimizer = adamw(model)
    hold(model, half(model, 0.25), optimizer)
    del optimizer
    gc.collect()
    twin = network()
    mask = half(twin)
    for each in (model, twin):
        each.load_state_dict(network().state_dict())
        optimizer = adamw(each)
        with hold(each, mask, optimizer):
            train_plainly(each, optimizer)
    assert equal(model, twin)


# Every way of training: zeros are exact, and rewinding gives equal bits.


def train_plainly(model: nn.Module, optimizer: Optimizer) -> None:
    for batch in range(3):
        step(model, optimizer, batch)


def train_compiled(model: nn.Module, optimizer: Optimizer) -> None:
    train_plainly(torch.compile(model, backend="aot_eager"), optimizer)  # type: ignore[arg-type]


def train_with_a_compiled_step(model: nn.Module, optimizer: Optimizer) -> None:
    @torch.compile(backend="eager")
    def compiled() -> None:
        optimizer.step()

    for batch in range(3):
        optimizer.zero_grad()
        cross_entropy(model(INPUTS[batch::3]), LABELS[batch::3]).backward()
        compiled()


def train_with_autocast_and_scaler(model: nn.Module, optimizer: Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scales = []
    for number in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(INPUTS[number % 3 :: 3]), LABELS[number % 3 :: 3])
        scaler.scale(loss * (math.inf if number == 1 else 1)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**9]  # one step was not taken


def train_with_accumulation(model: nn.Module, optimizer: Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        for batch in range(3):
            cross_entropy(model(INPUTS[batch::3]), LABELS[batch::3]).backward()
        optimizer.step()


def train_with_a_schedule(model: nn.Module, optimizer: Optimizer) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for batch in range(3):
        step(model, optimizer, batch)
        schedule.step()


WAYS = [
    train_plainly,
    train_compiled,
    train_with_a_compiled_step,
    train_with_autocast_and_scaler,
    train_with_accumulation,
    train_with_a_schedule,
]


@pytest.mark.parametrize("train", WAYS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.*:UserWarning", "ignore::FutureWarning")
def test_zeros_are_exact_and_rewinding_gives_equal_bits(train: Callable[[nn.Module, Optimizer], None]) -> None:
    model = network()
    optimizer = adamw(model)
    train_plainly(model, optimizer)
    start = snapshot(model, optimizer)
    mask = half(model)
    ends = []
    for _ in range(2):
        rewind(model, start, mask, optimizer)
        check_zeros(model, mask, optimizer)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, start.state[name] * mask[name] if name in mask else start.state[name])
        with hold(model, mask, optimizer):
            train(model, optimizer)
        check_zeros(model, mask, optimizer)
        ends.append(copy.deepcopy(model))
    assert equal(*ends)
    assert not all(torch.equal(start.state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_hold_gives_the_bits_of_gradients_that_are_masked_by_hand() -> None:
    held, by_hand = network(), network()
    mask = half(held)
    for model in (held, by_hand):
        rewind(model, snapshot(model), mask)
    optimizers = [adamw(held), adamw(by_hand)]
    with hold(held, mask, optimizers[0]):
        for batch in range(3):
            for model, optimizer in zip((held, by_hand), optimizers, strict=True):
                optimizer.zero_grad()
                cross_entropy(model(INPUTS[batch::3]), LABELS[batch::3]).backward()
                if model is by_hand:
                    for name in mask:
                        gradient = model.get_parameter(name).grad
                        assert gradient is not None
                        gradient *= mask[name]
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
    assert equal(held, by_hand)


def test_gradients_that_autograd_does_not_compute() -> None:
    model = network()
    mask, optimizer = half(model), adamw(model)
    with hold(model, mask, optimizer):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, math.inf)
        for name in mask:
            model.get_parameter(name).grad = torch.where(mask[name], 1.0, math.inf)
        optimizer.step()
    check_zeros(model, mask, optimizer)


def test_a_copy_of_the_model_has_the_zeros_is_held_by_itself_and_is_rewound_to_equal_bits() -> None:
    model = network()
    mask, start = half(model), snapshot(model)
    with hold(model, mask, adamw(model)):
        twin = copy.deepcopy(model)
        check_zeros(twin, mask)
        optimizer = adamw(twin)
        with hold(twin, mask, optimizer):
            train_plainly(twin, optimizer)
            check_zeros(twin, mask, optimizer)
            rewind(twin, start, mask, optimizer)
        check_zeros(twin, mask)
    for name, value in twin.state_dict().items():
        assert value.equal(start.state[name] * mask[name] if name in mask else start.state[name]), name


@pytest.mark.parametrize("state", [False, True])
def test_the_optimizer_is_rewound_too(state: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if state:
        train_plainly(model, optimizer)
    start = snapshot(model, optimizer if state else None)
    kept = copy.deepcopy(start)
    dense = Mask.ones_like(model)
    for _ in range(2):
        train_plainly(model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.01
        rewind(model, start, dense, optimizer)
        assert optimizer.param_groups[0]["lr"] == (0.1 if state else 0.01)
        assert len(optimizer.state) == (6 if state else 0)
        for parameter, number in zip(model.parameters(), range(6), strict=True) if state else ():
            assert start.optimizer is not None
            assert kept.optimizer is not None
            before = kept.optimizer["state"][number]["momentum_buffer"]
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], before)
            assert torch.equal(start.optimizer["state"][number]["momentum_buffer"], before)
        assert all(torch.equal(kept.state[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_of_a_state_are_a_copy() -> None:
    model = network()
    weights = Weights.of(model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_plainly(model, adamw(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights.load().items())
    assert not weights.load()["0.weight"].requires_grad


# Pruning.


@pytest.mark.parametrize("importance", [magnitude, l1])
def test_pruning_a_model_is_pruning_its_weights(importance: Any) -> None:
    model = network()
    dense = Mask.ones_like(model)
    found = prune_model(nn.DataParallel(model), dense, importance, 0.3, keep_dense=["3"], seed=4)
    assert found == prune(model.state_dict(), dense, importance, 0.3, keep_dense=["3"], seed=4)
    assert found["3.weight"].all()


def test_pruning_a_model_by_how_far_its_weights_moved() -> None:
    model = network()
    start, dense = snapshot(nn.DataParallel(model)), Mask.ones_like(model)
    before = copy.deepcopy(model.state_dict())
    train_plainly(model, adamw(model))
    for options in ({"exclude": ["3"]}, {"selection": "uniform"}, {"selection": "shares", "shares": {"3.weight": 1.0}}):
        found = prune_model(model, dense, find("movement"), 0.3, rewound=start, **options)  # type: ignore[arg-type]
        assert found == prune(model.state_dict(), dense, find("movement"), 0.3, rewound=before, **options)  # type: ignore[arg-type]
        assert found != prune(model.state_dict(), dense, magnitude, 0.3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kinds", [(), ("parallel",), ("compile",), ("parallel", "compile")])
def test_pruning_a_model_by_a_score_of_the_whole_network(kinds: tuple[str, ...]) -> None:
    model = network()
    wrapped = wrap(model, *kinds)
    mask = half(wrapped, 0.8)
    twin = copy.deepcopy(model)
    rewind(twin, snapshot(twin), mask)  # pruned weights are 0.0
    model[0].weight.requires_grad_(False)
    batches = [(INPUTS[batch::3], LABELS[batch::3]) for batch in range(3)]
    before = snapshot(model)
    found = prune_model(wrapped, mask, find("taylor"), 0.3, loss=cross_entropy, batches=iter(batches), seed=4)
    assert all(torch.equal(before.state[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    for inputs, labels in batches:
        (cross_entropy(twin(inputs), labels) / 3).backward()
    scores = {
        name: (weight * weight.grad).abs()
        for name, weight in find_weights(twin, mask).items()
        if weight.grad is not None
    }
    assert found == prune(find_weights(twin, mask), mask, find("taylor"), 0.3, score_network=lambda *_: scores)
    assert found.counts != mask.counts


def test_mistakes_of_pruning() -> None:
    model = network()
    dense, batches = Mask.ones_like(model), [(INPUTS, LABELS)]
    refuse("importance 'taylor' scores the whole network: give the loss and some batches of examples",
           lambda: prune_model(model, dense, find("taylor"), 0.3, batches=batches))  # fmt: skip
    refuse("importance 'taylor' scores the whole network: give the loss and some batches of examples",
           lambda: prune_model(model, dense, find("taylor"), 0.3, loss=cross_entropy))  # fmt: skip
    refuse("importance 'movement', layer '0.weight': it needs the weights at the rewind point, which are not given",
           lambda: prune_model(model, dense, find("movement"), 0.3))  # fmt: skip
    refuse("rewound: expected what tombola.loops.snapshot returned, got OrderedDict",
           lambda: prune_model(model, dense, find("movement"), 0.3, rewound=model.state_dict()))  # type: ignore[arg-type] # fmt: skip
    refuse("no weights for layer '0.weight' of the mask",
           lambda: prune_model(model, dense, find("movement"), 0.3, rewound=snapshot(nn.Linear(2, 1))))  # fmt: skip


# Wrappers.


def wrap(model: nn.Module, *kinds: str) -> nn.Module:
    for kind in kinds:
        model = nn.DataParallel(model) if kind == "parallel" else torch.compile(model, backend="eager")  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("inner", [(), ("parallel",), ("compile",), ("compile", "parallel")])
@pytest.mark.parametrize("outer", [(), ("parallel",), ("parallel", "compile")])
def test_wrappers_do_not_matter(inner: tuple[str, ...], outer: tuple[str, ...]) -> None:
    model = network()
    one, other = wrap(model, *inner), wrap(model, *outer)
    mask, start = half(one), snapshot(one)
    ticket = Ticket(1, mask, Weights.of(one.state_dict()), None)
    optimizer = adamw(other)
    with hold(other, mask, optimizer):
        step(model, optimizer)
        check_zeros(other, mask, optimizer)
        rewind(other, start, mask, optimizer)
    rewound = copy.deepcopy(model)
    nn.init.ones_(model[0].weight)
    ticket.apply(other)
    assert equal(model, rewound)


def test_a_name_of_a_wrapper_that_is_the_models_own() -> None:
    assert match_names(["module.a", "a"], ["module.a", "a"]) == {"module.a": "module.a", "a": "a"}
    assert match_names(["a"], ["module.a", "_orig_mod.a"]) == {}


@given(st.lists(st.sampled_from(["module", "_orig_mod", "a", "b"]), min_size=1, max_size=5).map(".".join))
def test_a_name_matches_itself_first(name: str) -> None:
    assert match_names([name], [name, f"module.{name}"]) == {name: name}


# Several processes.


def train_together(rank: int, folder: Path) -> None:
    """Find tickets of a network of each kind on two processes, each with its own data; write the masks' hashes."""
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for kind in ("ddp", "fsdp2"):
        find_together(kind, rank, folder)
    distributed.destroy_process_group()


def find_together(kind: str, rank: int, folder: Path) -> None:
    bare = network()
    mask = Mask.ones_like(bare)
    if kind == "ddp":
        model: nn.Module = nn.parallel.DistributedDataParallel(bare)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(bare, mesh=init_device_mesh("cpu", (2,)))  # type: ignore[assignment]
    optimizer = adamw(model)
    start = snapshot(model)
    ends = []
    for level in (0, 1, 1):
        with hold(model, mask, optimizer):
            for batch in range(3):
                step(model, optimizer, (batch + rank) % 3)
        check_zeros(model, mask, optimizer)
        ends.append({name: gather(weight).clone() for name, weight in model.named_parameters()})
        mask = prune_model(model, mask, l1, 0.4) if level == 0 else mask
        rewind(model, start, mask, optimizer)
    assert all(torch.equal(ends[1][name], ends[2][name]) for name in ends[1])
    (folder / f"{kind}-{rank}").write_text(mask.hash)
    other = Mask.from_tensors({name: alive ^ (rank == 1) for name, alive in mask.items()})
    with pytest.raises(UserError, match="the masks of the processes differ: that of rank 1 is not that of rank 0"):
        hold(model, other, optimizer)


def test_two_processes_have_equal_masks_and_exact_zeros(tmp_path: Path) -> None:
    """With DDP and with FSDP2; in the same processes, whose start takes longer than all they do."""
    started = [from_fork_server(train_together, rank, tmp_path) for rank in range(2)]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(LONG)
        assert [process.exitcode for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    for kind in ("ddp", "fsdp2"):
        one, other = ((tmp_path / f"{kind}-{rank}").read_text() for rank in range(2))
        assert one == other


# Other libraries.


class FakeLoop:
    """A training loop that calls hooks as Lightning and transformers do."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.optimizers = model, [adamw(model)]

    def wrapped(self) -> Any:
        return SimpleNamespace(optimizer=SimpleNamespace(optimizer=self.optimizers[0]))


def test_the_hooks_of_lightning() -> None:
    model = network()
    mask = half(model)
    loop, hooks = FakeLoop(model), LightningHooks(mask)
    for end in (hooks.on_train_end, partial(hooks.on_exception, exception=KeyboardInterrupt())):
        hooks.on_train_start(loop, model)
        train_plainly(model, loop.optimizers[0])
        check_zeros(model, mask, loop.optimizers[0])
        end(loop, model)  # type: ignore[operator]
    hold(model, mask, loop.optimizers[0]).remove()
    loop.optimizers = []
    with pytest.raises(UserError, match="the training has no optimizer"):
        hooks.on_train_start(loop, model)


def test_the_hooks_of_transformers() -> None:
    model = network()
    mask = half(model)
    loop, hooks = FakeLoop(model), TransformersHooks(mask, model)
    for _ in range(2):  # the first training is interrupted, and its end is not told
        hooks.on_train_begin(None, None, None, model=nn.DataParallel(model), optimizer=loop.wrapped())
    train_plainly(model, loop.optimizers[0])
    check_zeros(model, mask, loop.optimizers[0])
    hooks.on_train_end(None, None, None)
    hold(model, mask, loop.optimizers[0]).remove()


@pytest.mark.parametrize(
    ("make", "library"), [(lightning_callback, "lightning"), (transformers_callback, "transformers")]
)
def test_a_library_that_is_not_installed(
    make: Callable[[Mask], Any], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"is not installed: pip install {library}"):
        make(half(network()))


@pytest.mark.parametrize(
    ("make", "library", "module", "base"),
    [
        (lightning_callback, "PyTorch Lightning", "lightning.pytorch", "Callback"),
        (transformers_callback, "transformers", "transformers", "TrainerCallback"),
    ],
)
def test_the_callbacks_are_those_of_a_library(
    make: Callable[[Mask], Any], library: str, module: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = type(base, (), {"on_train_start": None, "on_train_begin": None, "on_save": lambda self: "its own"})
    for name in {module.split(".")[0], module}:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{base: own}))
    mask = half(network())
    callback = make(mask)
    assert isinstance(callback, own)
    assert callback.mask == mask
    assert callback.on_save() == "its own"  # type: ignore[attr-defined]
    assert callback.on_train_end is not None


# Mistakes.


def refuse(pattern: str, call: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_mistakes_of_a_hold() -> None:
    model = network()
    mask, optimizer = half(model), adamw(model)
    other = half(nn.Sequential(nn.Linear(7, 10), nn.Linear(10, 3), nn.Linear(3, 2)))
    refuse(
        r"^the mask does not fit the model: it has layer '0.weight' of shape \(10, 7\), the model has one of shape "
        r"\(10, 6\); it has layer '1.weight' of shape \(3, 10\), the model has one of shape \(10,\); it has layer "
        r"'2.weight' of shape \(2, 3\), the model has no such weight$",
        lambda: hold(nn.DataParallel(model), other, optimizer),
    )
    refuse("the optimizer does not have the model's weights '0.weight', '3.weight'; make it from the parameters of",
           lambda: hold(model, mask, adamw(network())))  # fmt: skip
    circle = SimpleNamespace()
    circle.optimizer = circle
    refuse("expected an optimizer of torch.optim, .* got SimpleNamespace", lambda: hold(model, mask, circle))
    refuse("expected an optimizer of torch.optim, or one that derives from it, got SimpleNamespace",
           lambda: hold(model, mask, SimpleNamespace()))  # type: ignore[arg-type] # fmt: skip
    refuse("expected a tombola.Mask, got dict", lambda: hold(model, dict(mask), optimizer))  # type: ignore[arg-type]
    refuse("expected a model, which is a torch.nn.Module, got str", lambda: hold("net", mask, optimizer))  # type: ignore[arg-type]
    assert equal(model, network())
    hold(model, mask, optimizer)
    refuse("the model is held already: end the earlier hold first", lambda: hold(model, mask, adamw(model)))
    release(model)
    release(model)
    with hold(model, mask, optimizer):
        pass


def replace_layer(model: nn.Sequential) -> None:
    model[3] = nn.Linear(10, 3)


def replace_weight(model: nn.Sequential) -> None:
    model.get_submodule("3").weight = nn.Parameter(torch.randn(3, 10))


def replace_state(model: nn.Sequential) -> None:
    model.load_state_dict(network().state_dict(), assign=True)


@pytest.mark.parametrize("replace", [replace_layer, replace_weight, replace_state])
def test_a_weight_that_is_replaced_after_the_hold_is_told_at_the_next_step(
    replace: Callable[[nn.Sequential], None],
) -> None:
    model = network()
    optimizer = adamw(model)
    handle = hold(model, half(model), optimizer)
    replace(model)
    refuse(r"the model's weight '[03]\.weight' has been replaced by another parameter", optimizer.step)
    handle.remove()
    optimizer.step()


def test_mistakes_of_rewinding() -> None:
    model = network()
    mask, optimizer = half(model), adamw(model)
    start = snapshot(model)
    other = snapshot(nn.Sequential(nn.Linear(6, 11), nn.Linear(11, 3)))
    pattern = (
        r"^the snapshot does not fit the model: it has '0.weight' of shape \(11, 6\), the model has one of shape "
        r"\(10, 6\); it has '0.bias' .*; and 6 more differences$"
    )
    refuse(pattern, lambda: rewind(model, other, mask, optimizer))
    lacking = snapshot(nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.ReLU(), nn.Linear(10, 3)))
    refuse(r"it lacks '1\.running_mean', which the model has", lambda: rewind(model, lacking, mask))
    refuse("rewind: expected what tombola.loops.snapshot returned, got OrderedDict",
           lambda: rewind(model, model.state_dict(), mask))  # type: ignore[arg-type] # fmt: skip
    few = snapshot(model, torch.optim.SGD(model[0].parameters()))
    refuse("the snapshot does not fit the optimizer: .*group", lambda: rewind(model, few, mask, optimizer))
    groups = optimizer.state_dict()["param_groups"]
    for wrong in ({}, [], {"state": {0: "x"}, "param_groups": groups}):
        odd: Any = Snapshot(start.state, wrong)  # type: ignore[arg-type]
        refuse("the snapshot does not fit the optimizer: ", partial(rewind, model, odd, mask, optimizer))
    for state, said in [
        (None, "expected tensors by name, got NoneType"),
        ({1: torch.ones(2)}, "expected tensors by name, got dict"),
        ({name: entry.to(torch.complex64) for name, entry in start.state.items()}, "'0.weight' has complex numbers"),
    ]:
        odd = Snapshot(state)  # type: ignore[arg-type]
        refuse(f"the snapshot does not fit the model: {said}", partial(rewind, model, odd, mask))
    refuse("the model's '0.weight' is on the device 'meta'", lambda: rewind(network().to("meta"), start, mask))
    refuse("batches: expected pairs", lambda: prune_model(model, mask, l1, 0.2, batches=3))  # type: ignore[arg-type]
    assert equal(model, network())
    with hold(model, mask, optimizer):
        refuse("the model is held at another mask: end that hold first",
               lambda: rewind(model, start, half(model, 0.25)))  # fmt: skip
        rewind(model, start, mask, optimizer)


def test_a_lazy_model_gets_its_shapes_from_the_snapshot() -> None:
    model = network()
    start, mask = snapshot(model), half(model)
    model[0] = nn.LazyLinear(10)
    rewind(model, start, mask)
    assert model[0].weight.equal(start.state["0.weight"] * mask["0.weight"])


def test_a_mask_of_another_model_under_a_wrapper() -> None:
    refuse(r"the mask does not fit the model: it has layer 'module\.weight' of shape \(2, 3\), the model has no such",
           lambda: prune_model(network(), Mask.ones_like(nn.DataParallel(nn.Linear(3, 2))), l1, 0.2))  # fmt: skip
