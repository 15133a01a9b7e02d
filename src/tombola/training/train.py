"""Training: a pure function of initial state, mask, data, recipe and seed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola.datasets.dataset import Dataset
from tombola.errors import (
    UserError,
    as_list,
    expect,
    expect_flags,
    expect_functions,
    expect_functions_or_none,
    expect_whole,
    kind_of,
    short,
)
from tombola.inputs import Forward, OwnStep, Tensors, call, convert, count_examples
from tombola.kernels import accelerate, are_packed, dense_names
from tombola.pruning.eligible import list_shared
from tombola.pruning.mask import Mask
from tombola.streams import ambient
from tombola.training.accumulation import accumulate, counts_positions
from tombola.training.batches import Batch, iterations
from tombola.training.convolutions import sound_convolutions
from tombola.training.determinism import deterministic_algorithms, flush_denormals, seed_random_layers
from tombola.training.evaluation import Loss, measure
from tombola.training.graphs import RecordedStep, can_be_recorded
from tombola.training.history import Checkpoint, History, OnEpoch, Trained, Watch
from tombola.training.loss_functions import count_positions, training_loss
from tombola.training.losses import Losses
from tombola.training.memory import keep_memory
from tombola.training.metrics import ACCURACY, LOSS, Metric
from tombola.training.optimizer import Optimizer, find_decayed
from tombola.training.own_optimizer import MakeOptimizer, OwnOptimizer
from tombola.training.recipe import Augmentation, Recipe, Schedule
from tombola.training.replaceable import (
    Kernels,
    OwnLayersWarning,
    choose_layers,
    find_fault,
    may_be_sparse,
    read_kernels,
)
from tombola.training.stretches import LONGEST, Stretches, are_stretches
from tombola.training.weights import State, Weights, apply_mask, copy_model, load_state, zero_pruned

MOST_ITERATIONS = 10**9
"""The longest training: the loss of every iteration is kept in memory, 4 bytes each."""


def initial_state(build: Callable[[], nn.Module], seed: int) -> State:
    """Return the state of the module that `build()` makes, with every random number drawn from `seed`.

    >>> initial_state(lambda: nn.Linear(2, 1), 0)["weight"].equal(initial_state(lambda: nn.Linear(2, 1), 0)["weight"])
    True
    """
    with ambient(seed, "initialisation"):
        return {name: tensor.detach().clone() for name, tensor in build().state_dict().items()}


def train(
    model: nn.Module,
    initial: State,
    mask: Mask,
    data: Dataset,
    recipe: Recipe,
    seed: int,
    *,
    begin: int = 0,
    end: int | None = None,
    loss: Loss = functional.cross_entropy,
    forward: Forward = call,
    step: OwnStep | None = None,
    optimizer: MakeOptimizer | None = None,
    schedule: Schedule | None = None,
    metrics: Sequence[Metric] = (ACCURACY,),
    device: str = "cpu",
    kernels: Kernels = "auto",
    packed: bool | None = None,
    resume: Checkpoint | None = None,
    watch: Watch | None = None,
    watch_every: float = 0.0,
    on_epoch: OnEpoch | None = None,
) -> Trained:
    """Train the alive connections from the state `initial`, for the iterations begin..end-1 of the recipe.

    The optimizer starts without state. Learning rate and data order are those of the iterations from `begin` on. A
    pruned weight is exactly 0.0 after every iteration. Equal arguments give equal bits on machines of one kind with
    the same number of threads.

    Args:
        model: the network to train; it is copied, and its own weights are ignored.
        initial: the state to start from.
        mask: the connections that are alive.
        data: the data set to train and test on.
        recipe: the hyperparameters of the training.
        seed: the seed of the data order, the augmentation and random layers such as dropout.
        begin, end: the range of iterations, begin..end-1; by default the complete training.
        loss: a function of outputs and labels that returns the mean over the batch.
        forward: a function (model, inputs) -> outputs; by default the model is called, see `tombola.inputs.call`.
        step: a function (model, inputs, labels) -> loss, which training uses instead of `forward` and `loss`.
        optimizer, schedule: the functions that the recipe names, if it names some of the user (`module:function`); by
            default they are found by their names.
        metrics: the metrics to compute at the end, on the test set and on the validation set if there is one.
        device: the device to train on, "cpu" or "cuda"; the data set is copied to a GPU too.
        kernels: which layers sparse ones replace on the CPU: "auto" for those that are faster, unless the network
            reaches into its own layers, see `tombola.training.replaceable`; "off" for none; or the names of weights
            among which to choose, as an earlier try-out allows.
        packed: whether activations stay packed between sparse convolutions, as the name of the training says; None
            decides, see `tombola.kernels.are_packed`.
        resume: the checkpoint to resume from; a training that is stopped and resumed ends with the same bits.
        watch: a function that is called after every iteration, for progress and checkpoints; see `Watch`.
        watch_every: seconds, 0 or more: iterations that take less together may be followed by one call of `watch`, so
            that a perceptron can do them in one call, which is faster.
        on_epoch: a function that is called after every epoch with its losses; see `OnEpoch`.

    Raises:
        UserError: if the recipe does not fit the data, or if the state or the mask does not fit the model.

    Warns:
        OwnLayersWarning: if the network reaches into its own layers, so that none is replaced.

    >>> from tombola import datasets, models
    >>> digits = datasets.load("digits", None)
    >>> model = models.lenet_300_100(inputs=64)
    >>> mask = Mask.ones_like(model)
    >>> trained = train(model, model.state_dict(), mask, digits, Recipe(epochs=2), seed=0)
    >>> trained.history.test_accuracy > 0.5
    True
    """
    metrics = as_list(metrics, "metrics", "tombola.training.metrics.Metric")
    _check_types(model, data, recipe, seed, metrics, resume, watch_every, packed)
    expect_functions(loss=loss, forward=forward)
    expect_functions_or_none(step=step, optimizer=optimizer, schedule=schedule, watch=watch, on_epoch=on_epoch)
    check_device(device)
    check_recipe_fits(recipe, data)
    check_own_functions(recipe, optimizer=optimizer, schedule=schedule)
    optimizer, schedule = optimizer or recipe.load_own("optimizer"), schedule or recipe.load_own("schedule")
    examples = data.train_examples
    end = recipe.total_iterations(examples) if end is None else end
    expect_whole(begin, "begin")
    expect_whole(end, "end", begin)
    start = resume or Checkpoint(begin, initial)
    data = move_data(data, device)
    model = load_model(model, start.state, mask, device)
    kernels = read_kernels(kernels)
    if packed is None:
        traced = forward is call and step is None and may_be_sparse(recipe, device, kernels)
        packed = traced and are_packed(model, mask, mask)
    among: Collection[str] | None = []
    if step is None:
        among = _list_replaceable(model, initial, mask, data, recipe, loss, forward, device, kernels, packed)
    fast = accelerate(
        model,
        mask,
        batch_size=recipe.batch_size,
        precision=recipe.precision,
        device=device,
        loss=training_loss(recipe, loss, step),
        forward=forward,
        step=step,
        among=among,
        packed=packed,
        stacklevel=2,
    )
    plain = forward is call and step is None and not recipe.label_smoothing
    recorded = device == "cuda" and plain and can_be_recorded(model, loss)
    positions = counts_positions(recipe, data, loss, step)
    losses = Losses(begin, end, recipe.iterations_per_epoch(examples), device)
    losses.resume(start.iteration, start.batch_losses)
    updater = _make_updater(model, recipe, optimizer, start.optimizer)
    masked = _dense_masks(model, mask)
    lr_at = functools.partial(recipe.lr_at, examples=examples, schedule=schedule)
    update = functools.partial(
        _update,
        compute=RecordedStep(fast, recipe.batch_size) if recorded else fast,
        count=functools.partial(count_positions, loss) if positions else count_examples,
        updater=updater,
        masked=masked,
        recipe=recipe,
        lr_at=lr_at,
    )
    in_stretches = are_stretches(fast, data, recipe)
    longest = LONGEST if watch is None else min(watch_every, LONGEST)
    draws = ":" in recipe.optimizer or fast.draws_random_numbers
    diverged = False

    def steps() -> Iterator[Tensor]:
        """Do the iterations; yield the loss of each, or the losses of several at a time."""
        for several in iterations(data, recipe, seed, start.iteration, end):
            if draws:
                seed_random_layers(seed, losses.iteration, device)
            yield update(several, losses.iteration)
            if in_stretches:
                break
        if in_stretches:
            assert isinstance(updater, Optimizer)
            stretches = Stretches(fast, data, recipe, seed, updater, masked, lr_at)
            while losses.iteration < end:
                yield stretches.run(losses.iteration, losses.next_check, longest)

    def checkpoint() -> Checkpoint:
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in fast.state().items()}
        return Checkpoint(losses.iteration, state, updater.tensors(), losses.values().to("cpu", copy=True))

    model.train()
    with (
        ambient(seed),
        flush_denormals(),
        deterministic_algorithms(device),
        sound_convolutions(model, device),
        keep_memory(),
    ):
        for computed in steps():
            losses.append(computed)
            if diverged := losses.have_diverged():
                break
            if on_epoch is not None and losses.end_an_epoch:
                on_epoch(losses.iteration, losses.epoch_means())
            if watch is not None:
                watch(losses.iteration, checkpoint)
        state = apply_mask(fast.state(), mask)
        diverged = diverged or not _is_finite(state, model, initial)
        with fast.autocast:
            history = History() if diverged else _summarise(evaluate_splits(model, data, loss, metrics, forward))
    diverged_at = losses.iteration - 1 if diverged else None
    history = replace(history, losses=losses.epoch_means(), diverged_at=diverged_at)
    weights = Weights.of({name: tensor.cpu().contiguous() for name, tensor in state.items()})
    return Trained(weights, history, losses.values().cpu())


def _update(
    batches: Sequence[Batch],
    iteration: int,
    *,
    compute: Callable[[Tensors, Tensors], Tensor],
    count: Callable[[Tensors], int],
    updater: Optimizer | OwnOptimizer,
    masked: Sequence[tuple[nn.Parameter, Tensor]],
    recipe: Recipe,
    lr_at: Callable[[int], float],
) -> Tensor:
    """Do an iteration: update the alive weights by the gradients of its batches; return the mean loss."""
    updater.zero_grad()
    loss = accumulate(compute, updater.parameters, batches, count)
    _mask_gradients(masked)
    if recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(updater.parameters, recipe.clip_norm)
    updater.step(lr_at(iteration))
    if ":" in recipe.optimizer:
        _mask_weights(masked)
    return loss


def _check_types(
    model: object,
    data: object,
    recipe: object,
    seed: object,
    metrics: Sequence[object],
    resume: object,
    watch_every: object,
    packed: object,
) -> None:
    """Raise `UserError` unless these arguments of `train` have the types that it takes."""
    expect(model, nn.Module, "model", "a torch.nn.Module")
    expect(data, Dataset, "data", "a tombola.Dataset")
    expect(recipe, Recipe, "recipe", "a tombola.Recipe")
    expect(resume, Checkpoint | None, "resume", "a tombola.Checkpoint")
    expect(seed, Integral, "seed", "a whole number")
    for metric in metrics:
        expect(metric, Metric, "metrics", "a list of tombola.training.metrics.Metric")
    if not isinstance(watch_every, Real) or not float(watch_every) >= 0:
        raise UserError(f"watch_every: expected a number of seconds, 0 or more, got {kind_of(watch_every)}")
    if packed is not None:
        expect_flags(packed=packed)


def _list_replaceable(
    model: nn.Module,
    initial: State,
    mask: Mask,
    data: Dataset,
    recipe: Recipe,
    loss: Loss,
    forward: Forward,
    device: str,
    kernels: Kernels,
    packed: bool,
) -> Collection[str] | None:
    """Return the weights whose layers may be replaced by sparse ones; None for all.

    Warns:
        OwnLayersWarning: in the name of the caller of `train`, if the network reaches into its own layers.
    """
    if kernels == "off" or ":" in recipe.optimizer:
        return []
    if kernels != "auto":
        return kernels
    if choose_layers(model, mask, recipe, device, kernels, packed=packed):
        network = copy_model(model)
        load_state(network, initial, "the state")
        if fault := find_fault(network, data, recipe, loss, device, forward=forward):
            warnings.warn(fault, OwnLayersWarning, stacklevel=3)
            return []
    return None


def _make_updater(
    model: nn.Module, recipe: Recipe, optimizer: MakeOptimizer | None, state: State
) -> Optimizer | OwnOptimizer:
    """Return what updates the parameters of a model: an optimizer of the recipe, or one of the user."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = dense_names(model)
    decayed = find_decayed([names[name] for name in parameters], recipe.no_decay, list_shared(model))
    if ":" not in recipe.optimizer:
        return Optimizer(recipe, list(parameters.values()), state, decayed)
    assert optimizer is not None
    return OwnOptimizer(
        optimizer, recipe.lr, list(parameters.values()), state, f"recipe.optimizer {recipe.optimizer!r}"
    )


def evaluate_state(
    model: nn.Module,
    state: State,
    data: Dataset,
    loss: Loss,
    metrics: Sequence[Metric],
    *,
    forward: Forward = call,
    device: str = "cpu",
    precision: str = "float32",
) -> dict[str, dict[str, float | None]]:
    """Return the metrics of a network in a trained state, by split and by key, see `evaluate_splits`.

    Args:
        model: the network; it is copied, and its own weights are ignored.
        state: the trained state.
        data, loss, metrics, forward, device: as for `train`.
        precision: the precision of activations, as in the recipe.
    """
    model = load_model(model, state, Mask({}, {}), device)
    autocast = torch.autocast(device, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    with ambient(0), flush_denormals(), deterministic_algorithms(device), autocast:
        return evaluate_splits(model, move_data(data, device), loss, metrics, forward)


def evaluate_splits(
    model: nn.Module, data: Dataset, loss: Loss, metrics: Sequence[Metric], forward: Forward = call
) -> dict[str, dict[str, float | None]]:
    """Return metrics and loss on the test set, and on the validation set if there is one, by split and by key."""
    found = {}
    for split in data.splits[1:]:
        values, mean = measure(model, data, loss, metrics, split, forward)
        found[split] = values | {LOSS.key: mean}
    return found


def _summarise(found: dict[str, dict[str, float | None]]) -> History:
    """Return the history with these metrics: accuracy and loss of the test set have fields of their own."""
    accuracy, loss = (found["test"].pop(key, None) for key in (ACCURACY.key, LOSS.key))
    metrics = {split: values for split, values in found.items() if values}
    return History(test_accuracy=accuracy, test_loss=loss, metrics=metrics)


def check_recipe_fits(recipe: Recipe, data: Dataset) -> None:
    """Raise `UserError` if a recipe does not fit a data set: its batches, its rewind point or its augmentation."""
    examples = data.train_examples
    total = recipe.total_iterations(examples)
    if total > MOST_ITERATIONS:
        raise UserError(f"recipe: a training would have {total} iterations; at most {MOST_ITERATIONS} are possible")
    if data.drawn is not None and recipe.batch_size != data.drawn.batch_size:
        raise UserError(
            f"recipe.batch_size: it is {short(recipe.batch_size)}, and the batches of {data.name!r} have "
            f"{data.drawn.batch_size} examples; set recipe.batch_size = {data.drawn.batch_size}"
        )
    if recipe.batch_size > examples:
        raise UserError(
            f"recipe.batch_size: {short(recipe.batch_size)} is more than the {examples} training examples of "
            f"{data.name!r}"
        )
    if recipe.batch_size * recipe.accumulate > examples:
        raise UserError(
            f"recipe.accumulate: {short(recipe.accumulate)} batches of {recipe.batch_size} are more than the "
            f"{examples} training examples of {data.name!r}"
        )
    if recipe.rewind >= total:
        raise UserError(
            f"recipe.rewind: iteration {short(recipe.rewind)} is not within the training, which has {short(total)}"
        )
    if recipe.augmentation != Augmentation() and not data.has_images:
        raise UserError(f"recipe.augmentation: it needs images (uint8), but {data.name!r} has other inputs")
    if (crop := recipe.augmentation.crop) and crop > (side := min(data.input_shape[1:])):
        raise UserError(
            f"recipe.augmentation.crop: {short(crop)} is more than the {side} pixels of a side of the images of "
            f"{data.name!r}"
        )


def check_own_functions(recipe: Recipe, **functions: object) -> None:
    """Raise `UserError` if a function is given for a field of the recipe that names none: it would not be used."""
    for field, function in functions.items():
        if function is not None and field not in recipe.own_code:
            raise UserError(
                f"{field}: a function is used if recipe.{field} names one, and it is {getattr(recipe, field)!r}; give "
                f"the function to the recipe, Recipe({field}=...), or leave it out"
            )


def check_device(device: str) -> None:
    """Raise `UserError` if this machine does not have a device, "cpu" or "cuda"."""
    if not isinstance(device, str) or device not in ("cpu", "cuda"):
        raise UserError(f"device: expected 'cpu' or 'cuda', got {kind_of(device)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' was asked for, and torch finds no GPU here; use 'cpu'")


def load_model(model: nn.Module, state: State, mask: Mask, device: str) -> nn.Module:
    """Return a copy of the model on the device, in this state, with pruned weights set to 0.0.

    Convolutional networks are stored channels-last, which is the faster layout on CPUs and GPUs.
    """
    model = copy_model(model).to(device)
    load_state(model, state, "the state")
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    zero_pruned(model, mask)
    return model


def _dense_masks(model: nn.Module, mask: Mask) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each dense parameter that has pruned weights, with its mask as 0.0 and 1.0 in the same layout."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [
        (parameters[name], torch.empty_like(parameters[name], requires_grad=False).copy_(mask[name]))
        for name in mask
        if name in parameters and not mask[name].all()
    ]


def _mask_gradients(masked: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Set the gradients of pruned weights to 0.0.

    A weight that starts at 0.0 and whose gradients are 0.0 stays at 0.0, also under momentum and weight decay.
    """
    pairs = [(weight.grad, mask) for weight, mask in masked if weight.grad is not None]
    if pairs:
        torch._foreach_mul_([gradient for gradient, _ in pairs], [mask for _, mask in pairs])


@torch.no_grad()
def _mask_weights(masked: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Set pruned weights to 0.0, which an optimizer of the user may have changed though their gradients are 0.0."""
    if masked:
        torch._foreach_mul_([weight for weight, _ in masked], [mask for _, mask in masked])


def _is_finite(state: State, model: nn.Module, initial: State) -> bool:
    """Return whether a state is finite, except for buffers that were not finite at initialisation."""
    buffers = {
        name
        for name, _ in model.named_buffers(remove_duplicate=False)
        if name in initial and not _all_finite(initial[name])
    }
    return all(_all_finite(tensor) for name, tensor in state.items() if name not in buffers)


def _all_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite."""
    # If a sum is finite, so are its numbers, and it takes a tenth of the time. The sum of finite numbers may overflow.
    quick = tensor.dtype == torch.float32 and bool(tensor.sum().isfinite())
    return quick or bool(tensor.isfinite().all())


def move_data(data: Dataset, device: str) -> Dataset:
    """Return the data set with its tensors on the device."""
    return data if device == "cpu" else _copy_data(data, device)


@functools.lru_cache(maxsize=1)
def _copy_data(data: Dataset, device: str) -> Dataset:
    """Copy a data set to a GPU; keep the last copy, since many trainings use the same data."""
    parts = [f"{split}_{part}" for split in data.splits for part in ("inputs", "labels")]
    moved: dict[str, Any] = {name: convert(lambda each: each.to(device), getattr(data, name)) for name in parts}
    return replace(data, **moved)
