"""Time of a forward pass of a ticket, relative to dense PyTorch: python benchmarks/inference.py [NETWORK ...].

Prints, for each network, density and batch size, the milliseconds of dense PyTorch, and the times of `Ticket.sparse`
and of onnxruntime relative to it. One thread. Each time is the least of repetitions whose order alternates, in
processor time of the thread, so that other processes disturb it little. Masks are random, with the same density in
every layer.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from tombola import Mask, Ticket, Weights, models

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet-300-100": (models.lenet_300_100, (1, 28, 28)),
    "ResNet-20": (models.resnet20, (3, 32, 32)),
    "VGG-16": (models.vgg16, (3, 32, 32)),
}
DENSITIES = (0.2, 0.1, 0.02)
BATCHES = (1, 8, 128)


def draw_ticket(model: nn.Module, density: float) -> Ticket:
    numbers = torch.Generator().manual_seed(0)
    dense = Mask.ones_like(model)
    alive = {name: torch.rand(shape, generator=numbers) < density for name, shape in dense.shapes.items()}
    return Ticket(1, Mask.from_tensors(alive), Weights.of(model.state_dict()), trained=None)


def onnx_session(model: nn.Module, inputs: Tensor) -> Callable[[], object] | None:
    """Return a forward pass by onnxruntime; None if it is not installed."""
    if find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder) / "ticket.onnx")
        torch.onnx.export(model, (inputs,), path, input_names=["inputs"], dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {"inputs": inputs.numpy()}
    return lambda: session.run(None, given)


def least_times(passes: dict[str, Callable[[], object]], seconds: float = 0.7) -> dict[str, float]:
    """Return the least seconds of each pass; they are repeated in turn, for about this long, four times or more."""
    least = dict.fromkeys(passes, float("inf"))
    began, rounds = time.thread_time(), 0
    while rounds < 4 or time.thread_time() - began < seconds:
        for name, run in list(passes.items())[:: -1 if rounds % 2 else 1]:
            start = time.thread_time()
            run()
            least[name] = min(least[name], time.thread_time() - start)
        rounds += 1
    return least


def measure(model: nn.Module, shape: tuple[int, ...], density: float, batch: int) -> str:
    """Return a line with the times of one density and batch size."""
    inputs = torch.randn(batch, *shape)
    ticket = draw_ticket(model, density)
    fast = ticket.sparse(model, batch_size=batch, trained=False)
    ticket.apply(model)
    passes: dict[str, Callable[[], object]] = {"dense": partial(model, inputs), "sparse": partial(fast, inputs)}
    if (session := onnx_session(model, inputs)) is not None:
        passes["onnxruntime"] = session
    with torch.inference_mode():
        assert torch.allclose(fast(inputs), model(inputs), rtol=1e-3, atol=1e-4)
        times = least_times(passes)
    relative = [f"{key} {each / times['dense']:.2f}" for key, each in times.items() if key != "dense"]
    return (
        f"density {density}, batch {batch}: dense {1e3 * times['dense']:.3f} ms; relative to it: {', '.join(relative)}"
    )


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or NETWORKS:
        build, shape = NETWORKS[name]
        torch.manual_seed(0)
        model = build().eval()
        for density in DENSITIES:
            for batch in BATCHES:
                print(f"{name}, {measure(model, shape, density, batch)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
