"""Time of a forward pass of a ticket, relative to dense PyTorch: python benchmarks/inference.py [NETWORK ...].

Prints, as the table of docs/your-loop.md, the milliseconds of dense PyTorch, and the times of `Ticket.sparse` and of
onnxruntime relative to it, for each network and batch size. One thread, and its processor time, so that other processes
disturb little. All are timed in turn, in an order that alternates; each figure is a median over the turns, for relative
times that of the quotients. Masks are random, with the same density in every layer. onnxruntime computes densely, so
that it is timed at one density.
"""

from __future__ import annotations

import argparse
import statistics
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


def median_times(passes: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median seconds of the pass "dense", and of each other the median of its time relative to that.

    They are timed in turn, for about this long, five times or more. A turn has as many passes in a row as last two
    milliseconds, and one before that is not timed: a network that computes again and again finds its weights in the
    caches of the processor.
    """
    counts = {name: 1 + int(0.002 / max(1e-6, _seconds_of(run, 1))) for name, run in passes.items()}
    times: dict[str, list[float]] = {name: [] for name in passes}
    began, rounds = time.thread_time(), 0
    while rounds < 5 or time.thread_time() - began < seconds:
        for name, run in list(passes.items())[:: -1 if rounds % 2 else 1]:
            if counts[name] > 1:
                run()
            times[name].append(_seconds_of(run, counts[name]))
        rounds += 1
    dense = times.pop("dense")
    relative = {name: [own / other for own, other in zip(each, dense, strict=True)] for name, each in times.items()}
    return {name: statistics.median(each) for name, each in {"dense": dense, **relative}.items()}


def _seconds_of(run: Callable[[], object], count: int) -> float:
    start = time.thread_time()
    for _ in range(count):
        run()
    return (time.thread_time() - start) / count


def measure(model: nn.Module, shape: tuple[int, ...], density: float, batch: int, seconds: float) -> dict[str, float]:
    """Return the times of a pass at one density and batch size: dense, sparse and, if installed, by onnxruntime."""
    inputs = torch.randn(batch, *shape)
    ticket = draw_ticket(model, density)
    fast = ticket.sparse(model, batch_size=batch, trained=False)
    ticket.apply(model)
    passes: dict[str, Callable[[], object]] = {"dense": partial(model, inputs), "sparse": partial(fast, inputs)}
    if density == DENSITIES[0] and (session := onnx_session(model, inputs)) is not None:
        passes["onnxruntime"] = session
    with torch.inference_mode():
        assert torch.allclose(fast(inputs), model(inputs), rtol=1e-3, atol=1e-4)
        for run in passes.values():
            run()
        return median_times(passes, seconds)


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", choices=[[], *NETWORKS], help="by default all")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (%(default)s)")
    options = parser.parse_args(arguments)
    print(
        f"| network | batch | dense, ms | {' | '.join(f'sparse, density {each}' for each in DENSITIES)} | onnxruntime |"
    )
    print("|---|--:|--:|" + "--:|" * (len(DENSITIES) + 1))
    for name in options.networks or NETWORKS:
        build, shape = NETWORKS[name]
        torch.manual_seed(0)
        model = build().eval()
        for batch in BATCHES:
            all_times = [measure(model, shape, density, batch, options.seconds) for density in DENSITIES]
            dense = statistics.median(times["dense"] for times in all_times)
            relative = [f"{times['sparse']:.2f}" for times in all_times]
            onnx = all_times[0].get("onnxruntime")
            relative.append("not installed" if onnx is None else f"{onnx:.2f}")
            print(f"| {name} | {batch} | {1e3 * dense:.3g} | {' | '.join(relative)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
