"""Golden bits: what small trainings gave when they were last known to be right, kept in `golden.json`.

    python tests/golden.py --why "torch 2.14 sums in another order"

computes the bits of this machine and writes them to the file, with the sentence; bits of other machines stay there.

What decides the bits of a training: the version of torch; the instructions that torch itself uses; the code that MKL
(linear layers) and oneDNN (convolutions, and linear layers of many weights) choose for the processor; and, for sparse
layers, the instruction set of the kernels. MKL and oneDNN are not used where all layers are sparse. All of these can be
limited to less than the processor has. The variables that limit torch's are read when it is loaded, so each setting is
computed in a process of its own.
The kernels for AVX-512 are there in two forms, one of which needs AVX2 alone (`avx512_in_halves`, see CMakeLists.txt):
both have the same bits, under one key, so that a processor without AVX-512 tests them too.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias
from unittest import mock

import torch

from processes import LONG
from tombola import kernels, train
from tombola.kernels import layers
from training_cases import AUGMENTED, CASES, IMAGES

FILE = Path(__file__).with_name("golden.json")

SETTINGS: dict[str, dict[str, str]] = {
    "own": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
}
"""The limits of torch, oneDNN and MKL: none, AVX2, or code that gives the same bits on all processors."""

KERNELS = ("plain", "avx2", "avx512")
NAMED = ("batch_norm", "batch_norm_gradient", "normalise_images")  # they take the name of an instruction set

Bits: TypeAlias = dict[str, Any]
"""`losses`: of each epoch, hexadecimal; `weights`: SHA-256 of the trained state."""


def compute(case: str) -> Bits:
    """Do a case's training and return its bits."""
    model, initial, mask = CASES[case].setting()
    fields: dict[str, Any] = {"schedule": "cosine", "warmup": 4, "augmentation": AUGMENTED}
    recipe = CASES[case].recipe(momentum=0.9, lr=0.05, weight_decay=1e-3, epochs=3, **fields)
    trained = train(model, initial, mask, IMAGES, recipe, seed=7)
    return {"losses": [loss.hex() for loss in trained.history.losses], "weights": trained.weights.hash}


def compute_all(setting: str) -> dict[str, Bits]:
    """Return the bits of all cases by key, in this process, which was started with the setting's limits."""
    torch.set_num_threads(1)
    bits = {key(case, setting): compute(case) for case in CASES if not CASES[case].sparse}
    for kernel_set in kernel_sets():
        for case in [case for case in CASES if CASES[case].sparse]:
            name = key(case, setting, kernel_set)
            with force_kernels(kernel_set):
                computed = compute(case)
            assert bits.setdefault(name, computed) == computed, f"{name}: {kernel_set} computes other bits"
    return bits


@contextmanager
def force_kernels(name: str) -> Iterator[None]:
    """Let sparse layers use this instruction set inside the block."""
    extension = layers.extension

    def make_layer(*arguments: Any) -> Any:
        *before, _, read = arguments
        return extension.Layer(*before, name, read)

    def force(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(*arguments[:-1], name)  # the last one is the instruction set

    packed = {each: force(vars(extension)[each]) for each in ("block", "PackedImages")}
    named = {each: functools.partial(vars(extension)[each], instruction_set=name) for each in NAMED}
    own = {"instruction_sets": lambda: [name], "Layer": make_layer}
    forced = ModuleType(extension.__name__)  # which can be hashed, as a namespace cannot
    vars(forced).update(vars(extension) | packed | named | own)
    with mock.patch.object(layers, "extension", forced):
        yield


def kernel_sets() -> list[str]:
    """Return the instruction sets of the kernels that this processor has, the fastest first, then the one in halves."""
    return list(layers.extension.instruction_sets()) if kernels.available() else []


def key(case: str, setting: str, kernel_set: str | None = None) -> str:
    """Name a case and all that decides its bits in this process."""
    version = ".".join(torch.__version__.split(".")[:2])
    capability = torch.backends.cpu.get_cpu_capability().replace("NO AVX", "DEFAULT")  # one thing, in old torch and new
    own = f"{case}: torch {version} {capability}"
    if kernel_set is None:
        limit = {"own": vendor(), "AVX2": f"{vendor()} up to AVX2", "portable": f"any {platform.machine()}"}
        return f"{own}, {limit[setting]}"
    return f"{own}, kernels {kernel_set.removesuffix('_in_halves')}"


@functools.cache
def vendor() -> str:
    """Return the processor's vendor as Linux names it, elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), platform.machine())


@functools.cache
def compute_apart(setting: str) -> dict[str, Bits]:
    """Return the bits of all cases by key, in a process that is started with the setting's limits."""
    limits = {name for each in SETTINGS.values() for name in each}
    environment = {name: value for name, value in os.environ.items() if name not in limits} | SETTINGS[setting]
    command = [sys.executable, __file__, "--print", setting]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=LONG)
    assert done.returncode == 0, done.stderr
    bits: dict[str, Bits] = json.loads(done.stdout)
    return bits


def read() -> dict[str, Any]:
    """Return the file's content: `bits` by key, and their `history`."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def write(why: str) -> list[str]:
    """Write the bits of this machine into the file; return the keys that are new or changed."""
    content = read() if FILE.exists() else {"history": [], "bits": {}}
    computed: dict[str, Bits] = {}
    for setting in SETTINGS:
        for name, bits in compute_apart(setting).items():
            assert computed.setdefault(name, bits) == bits, f"{name}: two settings of one key give different bits"
    changed = {name: bits for name, bits in computed.items() if content["bits"].get(name) != bits}
    if changed:
        before = content["bits"]
        added, replaced = (sorted(n for n in changed if (n in before) == known) for known in (False, True))
        content["history"].append({"why": why, "added": added, "replaced": replaced})
        content["bits"] = dict(sorted((before | changed).items()))
        FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return sorted(changed)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Write the golden bits of this machine into golden.json.")
    parser.add_argument("--why", help="a sentence that is kept with the bits: why they are added or change")
    parser.add_argument("--print", choices=SETTINGS, help="print the bits of this process, started with these limits")
    options = parser.parse_args()
    if options.print:
        print(json.dumps(compute_all(options.print)))
    elif not options.why or not options.why.strip():
        parser.error("give --why and a sentence that says why the bits are added or change")
    else:
        changed = write(options.why)
        print("\n".join(changed) if changed else "all bits of this machine are in the file already; nothing is changed")


if __name__ == "__main__":
    main()
