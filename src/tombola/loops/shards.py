"""Shards: parameters and masks of models that several processes train together (`torch.distributed`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tombola.errors import UserError
from tombola.pruning.mask import Mask


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which each process has a part, as in FSDP2."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process has; it shares the memory of the tensor."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def gather(tensor: Tensor) -> Tensor:
    """Return the whole tensor; for a sharded one, every process has to call this."""
    if not is_sharded(tensor):
        return tensor.detach()
    whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole.detach()


def pruned_part(weight: Tensor, alive: Tensor) -> Tensor:
    """Return which connections are pruned, in the part and on the device of a weight that this process has.

    Args:
        weight: a parameter; for a sharded one, every process has to call this.
        alive: its mask, a bool tensor of the whole weight's shape.
    """
    pruned = ~alive.to(weight.device)
    if not is_sharded(weight):
        return pruned
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    return own_part(distribute_tensor(pruned.to(torch.uint8), mesh, placements)).bool()


def check_equal_masks(model: nn.Module, mask: Mask) -> None:
    """Check that the processes that train a model together have equal masks; each of them has to call this.

    Raises:
        UserError: if they have not; every process raises it.
    """
    group = _process_group(model)
    if group is None:
        return
    from torch import distributed

    own = torch.tensor(list(bytes.fromhex(mask.hash)), dtype=torch.uint8, device=next(model.parameters()).device)
    found = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(found, own, group=group)
    if differing := [rank for rank, each in enumerate(found) if not each.equal(found[0])]:
        raise UserError(
            f"the masks of the processes differ: that of rank {differing[0]} is not that of rank 0; compute the mask "
            "from weights that are equal everywhere, with the same seed"
        )


def _process_group(model: nn.Module) -> Any:
    """Return the processes that train a model together; None if it is neither DistributedDataParallel nor sharded."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.process_group
    for parameter in model.parameters():
        if is_sharded(parameter):
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            return mesh.get_group() if mesh.ndim == 1 else None
    return None
