"""The callbacks in the loops of the libraries themselves, where these are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from libraries import needs
from tombola import Mask
from tombola.importance import magnitude
from tombola.loops import hold, lightning_callback, prune, rewind, snapshot, transformers_callback

numbers = torch.Generator().manual_seed(1)
INPUTS, LABELS = torch.randn(64, 8, generator=numbers), torch.randint(4, (64,), generator=numbers)


class Network(nn.Module):
    """A network that returns its loss, as transformers wants it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": cross_entropy(self.layers(inputs), labels)}


def fit_with_lightning(model: nn.Module, mask: Mask, folder: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return self.network(*batch)["loss"]  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)

    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        callbacks=[lightning_callback(mask, model)],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(INPUTS, LABELS), batch_size=16))


def fit_with_transformers(model: nn.Module, mask: Mask, folder: Path) -> None:
    import transformers

    options = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    examples = [{"inputs": one, "labels": label} for one, label in zip(INPUTS, LABELS, strict=True)]
    callbacks = [transformers_callback(mask)]
    transformers.Trainer(model=model, args=options, train_dataset=examples, callbacks=callbacks).train()


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.usefixtures("importable_torchvision")
@pytest.mark.parametrize(
    "fit",
    [
        pytest.param(fit_with_lightning, marks=needs("lightning")),
        pytest.param(fit_with_transformers, marks=needs("transformers", "accelerate")),
    ],
)
def test_zeros_are_exact_and_rewinding_gives_equal_bits(fit: Any, tmp_path: Path) -> None:
    model = Network()
    start, dense = snapshot(model), Mask.ones_like(model)
    fit(model, dense, tmp_path)
    mask = prune(model, dense, magnitude, 0.5)
    ends = []
    for _ in range(2):
        rewind(model, start, mask)
        fit(model, mask, tmp_path)
        ends.append(snapshot(model).state)
        assert {name: int((ends[-1][name] != 0).sum()) for name in mask} == mask.counts
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    hold(model, mask, torch.optim.SGD(model.parameters())).remove()  # the callback has ended its own
