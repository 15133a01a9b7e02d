"""Training: a pure function of initial state, mask, data, recipe and seed."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola import kernels
from tombola.datasets.dataset import Dataset
from tombola.errors import UserError
from tombola.pruning.mask import Mask
from tombola.streams import ambient, derive
from tombola.training.batches import batches
from tombola.training.evaluation import Loss, evaluate
from tombola.training.history import Checkpoint, History, Trained, Watch
from tombola.training.optimizer import Optimizer
from tombola.training.recipe import Augmentation, Recipe
from tombola.training.weights import State, Weights, apply_mask, zero_pruned

_LOOKED_AT_EVERY = 50  # iterations after which a training looks whether it has diverged


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
    device: str = "cpu",
    resume: Checkpoint | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train the connections that are alive from the state `initial`, iterations begin..end-1 of the recipe.

    The optimizer starts fresh; learning rate and data order are those of iteration `begin` and on. A pruned weight is
    exactly 0.0 after every iteration. Equal arguments give equal bits on one kind of machine with one number of
    threads.

    Args:
        model: says how outputs are computed; it is copied, and its own weights do not matter.
        initial: the state to start from.
        mask: the connections that are alive.
        data: what to train and test on.
        recipe: how.
        seed: of data order, augmentation and random layers such as dropout.
        begin, end: iterations; by default the whole training.
        loss: of outputs and labels, mean over the batch.
        device: where to train, "cpu" or "cuda"; on a GPU the data set lives there too.
        resume: where to go on; a training that is stopped and resumed ends with the same bits.
        watch: see `Watch`; for progress and checkpoints.

    Raises:
        UserError: where recipe and data do not fit together, or the state does not fit the model.

    >>> from tombola import datasets, models
    >>> digits = datasets.load("digits", None)
    >>> model = models.lenet_300_100(inputs=64)
    >>> mask = Mask.ones_like(model)
    >>> trained = train(model, model.state_dict(), mask, digits, Recipe(epochs=2), seed=0)
    >>> trained.history.test_accuracy > 0.5
    True
    """
    examples = len(data.train_inputs)
    end = recipe.total_iterations(examples) if end is None else end
    check(recipe, data)
    model = copy.deepcopy(model).to(device)
    data = _on(data, device)
    at = resume or Checkpoint(begin, initial)
    try:
        model.load_state_dict(at.state)
    except RuntimeError as error:
        raise UserError(f"the state does not fit the model: {' '.join(str(error).split())}") from error
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # the fast one on CPU and GPU
    zero_pruned(model, mask)
    weights = {name for name, _ in model.named_parameters()}
    infinite = {name for name, t in initial.items() if name not in weights and not t.isfinite().all()}  # by design
    if device == "cpu" and mask.alive < mask.total:
        kernels.warn_if_missing()
    if sparse_layers(model, mask, recipe, device):
        kernels.sparsify(model, mask, recipe.batch_size)
    usual = device == "cpu" and recipe.precision == "float32" and loss is functional.cross_entropy
    perceptron = kernels.Perceptron.of(model) if usual else None
    parameters = dict(model.named_parameters())
    alive = [
        (parameters[name], torch.empty_like(parameters[name], requires_grad=False).copy_(mask[name]))
        for name in mask
        if name in parameters and not mask[name].all()
    ]
    optimizer = Optimizer(recipe, [p for p in model.parameters() if p.requires_grad], at.optimizer)
    per_epoch = recipe.iterations_per_epoch(examples)
    iteration = at.iteration
    batch_losses = torch.empty(end - begin, device=device)
    batch_losses[: iteration - begin] = at.batch_losses
    latest: list[Tensor] = []
    diverged_at = None

    def note_losses() -> None:
        if latest:
            done = iteration - begin
            batch_losses[done - len(latest) : done] = torch.stack(latest)
            latest.clear()

    def checkpoint() -> Checkpoint:
        note_losses()
        state = {name: t.detach().to("cpu", copy=True) for name, t in kernels.dense_state(model).items()}
        return Checkpoint(iteration, state, optimizer.tensors(), batch_losses[: iteration - begin].to("cpu", copy=True))

    model.train()
    autocast = torch.autocast(device, torch.bfloat16) if recipe.precision == "bfloat16" else nullcontext()
    with ambient(seed), _flushed_denormals(), _deterministic(device):
        for inputs, labels in batches(data, recipe, seed, iteration, end):
            optimizer.zero_grad()
            if perceptron is not None and perceptron.takes(inputs, labels):
                batch_loss = perceptron.cross_entropy(inputs, labels)
            else:
                _seed_random_layers(device, derive(seed, "random layers", iteration))
                with autocast:
                    batch_loss = loss(model(inputs), labels)
                batch_loss.backward()  # type: ignore[no-untyped-call]
            for weight, ones in alive:
                if weight.grad is not None:
                    # With no gradient ever, a weight that starts at 0 stays at 0 under momentum and weight decay too.
                    weight.grad.mul_(ones)
            optimizer.step(recipe.lr_at(iteration, examples))
            latest.append(batch_loss.detach().reshape(()))
            iteration += 1
            if iteration % per_epoch == 0 or iteration == end or iteration % _LOOKED_AT_EVERY == 0:
                note_losses()
                if not batch_losses[: iteration - begin].isfinite().all():
                    diverged_at = iteration - 1
                    break
            if watch is not None:
                watch(iteration, checkpoint)
        state = apply_mask(kernels.dense_state(model), mask)
        if diverged_at is None and not all(t.isfinite().all() for n, t in state.items() if n not in infinite):
            diverged_at = iteration - 1
        with autocast:
            accuracy, test_loss = evaluate(model, data, loss) if diverged_at is None else (None, None)
    state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    batch_losses = batch_losses[: iteration - begin].cpu()
    losses = tuple(_epoch_means(batch_losses.tolist(), begin, end, per_epoch))
    return Trained(Weights.of(state), History(losses, accuracy, test_loss, diverged_at), batch_losses)


def _epoch_means(batch_losses: list[float], begin: int, end: int, per_epoch: int) -> Iterator[float]:
    """Yield the mean loss of each epoch between `begin` and `end`, up to one that was not finished or diverged."""
    first = begin
    while first < end:
        after = min((first // per_epoch + 1) * per_epoch, end)
        epoch = batch_losses[first - begin : after - begin]
        if len(epoch) < after - first or not all(map(math.isfinite, epoch)):
            return
        yield sum(epoch) / len(epoch)
        first = after


def sparse_layers(model: nn.Module, mask: Mask, recipe: Recipe, device: str = "cpu") -> list[str]:
    """Return the weights whose layers are trained by the sparse kernels: a part of a training's name.

    They sum in another order than dense layers do. Which they are follows from shapes, density and batch size, see
    `tombola.kernels.choose`; none on a GPU, in bfloat16, or where the package was built without its kernels.
    """
    if device != "cpu" or recipe.precision != "float32":
        return []
    chosen = kernels.choices(model, mask, recipe.batch_size)
    return [name for name, choice in chosen.items() if choice == "sparse"]


def check(recipe: Recipe, data: Dataset) -> None:
    """Raise `UserError` where a recipe and a data set do not fit together."""
    examples = len(data.train_inputs)
    total = recipe.total_iterations(examples)
    if recipe.batch_size > examples:
        raise UserError(
            f"recipe.batch_size: {recipe.batch_size} is more than the {examples} training examples of {data.name!r}"
        )
    if recipe.rewind >= total:
        raise UserError(f"recipe.rewind: iteration {recipe.rewind} is not within the training, which has {total}")
    if recipe.augmentation != Augmentation() and data.train_inputs.dtype != torch.uint8:
        raise UserError(f"recipe.augmentation: it is for images (uint8), and {data.name!r} holds other inputs")


@contextmanager
def _flushed_denormals() -> Iterator[None]:
    """Take numbers below the normal range as 0 inside the block: they are slow, and no training needs them."""
    before = float(torch.tensor(1e-40) * 1.0) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _on(data: Dataset, device: str) -> Dataset:
    return data if device == "cpu" else _moved(data, device)


@functools.lru_cache(maxsize=1)
def _moved(data: Dataset, device: str) -> Dataset:
    tensors = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    return replace(data, **{name: getattr(data, name).to(device) for name in tensors})


def _seed_random_layers(device: str, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if device == "cuda":
        torch.cuda.manual_seed(seed)


@contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """On a GPU, let only such algorithms be used inside the block as give equal bits each time, in full float32.

    cuBLAS takes its workspace from the environment when it is first used: see `tombola/__init__.py`.
    """
    if device != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = False, False, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before[:3]
        torch.use_deterministic_algorithms(before[3])
