"""Training on a GPU: the same bits each time, from the start or from a checkpoint, in full float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tombola import Augmentation, Checkpoint, Dataset, Mask, Recipe, Trained, prune, train
from tombola.importance import magnitude
from tombola.training.train import initial_state

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no GPU; to run: on a machine with one"
)

RECIPE = Recipe(
    momentum=0.9,
    lr=0.05,
    weight_decay=1e-4,
    epochs=2,
    batch_size=16,
    augmentation=Augmentation(flip=True, crop=2),
)


def model(dropout: float = 0.2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.Flatten(),
        nn.Linear(16 * 49, 4),
    )


def data() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 4
    images = torch.randint(100, (128, 3, 16, 16), generator=draw) + 30 * labels.view(-1, 1, 1, 1)
    images = images.to(torch.uint8)
    return Dataset("images", images, labels, images[:32], labels[:32], ("a", "b", "c", "d"), (0.4,) * 3, (0.2,) * 3)


def train_small(recipe: Recipe = RECIPE, device: str = "cuda", dropout: float = 0.2, **arguments: object) -> Trained:
    network = model(dropout)
    initial = initial_state(model, 0)
    mask = prune(initial, Mask.ones_like(network), magnitude, 0.5)
    return train(network, initial, mask, data(), recipe, 0, device=device, **arguments)  # type: ignore[arg-type]


def test_equal_arguments_give_equal_bits() -> None:
    one, other = train_small(), train_small()
    assert one.weights.hash == other.weights.hash
    assert torch.equal(one.batch_losses, other.batch_losses)
    assert one.history == other.history


def test_resuming_gives_equal_bits() -> None:
    taken: dict[int, Checkpoint] = {}

    def watch(iteration: int, checkpoint: object) -> None:
        taken[iteration] = checkpoint()  # type: ignore[operator]

    whole = train_small(watch=watch)
    assert train_small(resume=taken[5]).weights.hash == whole.weights.hash


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_recorded_step_gives_equal_bits(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws the same numbers too; 128 images in batches of 24 end with a batch of 8."""
    recipe = RECIPE.model_copy(update={"precision": precision, "batch_size": 24})
    replayed = count_replays(monkeypatch)
    recorded = train_small(recipe)
    assert len(replayed) == 2 * 5 - 3, "the first three steps are computed without a graph, as are both batches of 8"
    monkeypatch.setattr("tombola.training.train.can_be_recorded", lambda *_: False)
    stepwise = train_small(recipe)
    assert len(replayed) == 2 * 5 - 3
    assert torch.equal(recorded.batch_losses, stepwise.batch_losses)
    assert recorded.weights.hash == stepwise.weights.hash


def test_memory_is_free_again() -> None:
    """A recorded step keeps all tensors of a step, as long as the training lasts."""
    used = []
    for _ in range(4):
        train_small()
        used.append(torch.cuda.memory_allocated())
    assert used[3] == used[1]


def count_replays(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that grows by one with each replay of a graph."""
    replays: list[None] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(None)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return replays


def test_it_computes_what_the_processor_computes() -> None:
    gpu, cpu = train_small(dropout=0.0), train_small(dropout=0.0, device="cpu")
    assert torch.allclose(gpu.batch_losses[:3], cpu.batch_losses[:3], rtol=1e-3)
    assert gpu.weights.load().keys() == cpu.weights.load().keys()
    assert all(tensor.is_cpu for tensor in gpu.weights.load().values())
    layer = "0.weight"
    assert torch.equal(gpu.weights.load()[layer] == 0, cpu.weights.load()[layer] == 0), "pruned ones are exactly 0"


def test_settings_are_as_they_were() -> None:
    before = torch.get_deterministic_debug_mode(), torch.backends.cuda.matmul.allow_tf32
    train_small()
    assert (torch.get_deterministic_debug_mode(), torch.backends.cuda.matmul.allow_tf32) == before


def test_bfloat16_learns() -> None:
    recipe = RECIPE.model_copy(update={"precision": "bfloat16", "epochs": 6, "lr": 0.005})
    losses = train_small(recipe).history.losses
    assert losses[-1] < losses[0]
