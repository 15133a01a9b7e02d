"""Training loops of your own: keep a mask while any optimizer trains, prune, and rewind.

    mask, start = Mask.ones_like(model), snapshot(model)
    for level in range(10):
        optimizer = torch.optim.AdamW(model.parameters())
        with hold(model, mask, optimizer):
            ...  # your training loop
        mask = prune(model, mask, l1, 0.2)
        rewind(model, start, mask)

- `hold` keeps pruned weights at exactly 0.0 through every step of an optimizer; `release` ends this.
- `snapshot` copies a model's weights and buffers, and the state of its optimizer; `rewind` restores them.
- `prune` does one round of pruning on the weights that a model has now.
- `lightning_callback` and `transformers_callback` hold a mask in PyTorch Lightning and in Hugging Face's `Trainer`.

The model may be wrapped by `torch.compile`, `DataParallel`, `DistributedDataParallel` or FSDP: a mask or a snapshot of
the bare model fits the wrapped one, and vice versa.
"""

from tombola.loops.callbacks import lightning_callback, transformers_callback
from tombola.loops.hold import Hold, hold, release
from tombola.loops.rewind import Snapshot, prune, rewind, snapshot

__all__ = [
    "Hold",
    "Snapshot",
    "hold",
    "lightning_callback",
    "prune",
    "release",
    "rewind",
    "snapshot",
    "transformers_callback",
]
