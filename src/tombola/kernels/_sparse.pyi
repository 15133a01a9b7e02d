from collections.abc import Sequence
from typing import Any

class Layer:
    def __init__(
        self,
        alive: Any,
        outputs: int,
        inputs: int,
        kernel: tuple[int, int],
        picture: tuple[int, int],
        stride: int,
        padding: tuple[int, int],
        instruction_set: str,
        read: Any,
    ) -> None: ...
    def forward(self, values: int, bias: int, source: Sequence[int], batch: int, target: int) -> None: ...
    def input_gradient(self, values: int, delta: Sequence[int], batch: int, target: int) -> None: ...
    def weight_gradient(
        self, source: Sequence[int], delta: Sequence[int], batch: int, gradient: int, bias_gradient: int
    ) -> None: ...

class Chain:
    def __init__(self, layers: tuple[Layer, ...], relus: Sequence[bool]) -> None: ...
    @property
    def inputs(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    def floats(self, batch: int) -> int: ...
    def scratch_floats(self, batch: int) -> int: ...
    def forward(
        self, parameters: Sequence[int], source: Sequence[int], batch: int, target: Sequence[int], memory: int
    ) -> None: ...
    def backward(
        self,
        parameters: Sequence[int],
        delta: Sequence[int],
        batch: int,
        memory: int,
        scratch: int,
        gradients: Sequence[int],
        target: Sequence[int],
    ) -> None: ...

def instruction_sets() -> list[str]: ...
def normalize(
    x: int, channels: int, count: int, weight: int, bias: int, epsilon: float, statistics: int, y: int
) -> None: ...
def normalize_gradient(
    x: int,
    delta: int,
    channels: int,
    count: int,
    weight: int,
    statistics: int,
    gradient: int,
    weight_gradient: int,
    bias_gradient: int,
) -> None: ...
def normalized_images(
    images: int, chosen: int, count: int, channels: int, pixels: int, mean: int, scale: int, target: int
) -> None: ...
