from collections.abc import Callable, Sequence

from torch import Tensor

class Layer:
    def __init__(
        self,
        alive: Tensor,
        outputs: int,
        inputs: int,
        kernel: tuple[int, int],
        image: tuple[int, int],
        stride: int,
        padding: tuple[int, int],
        instruction_set: str | None,
        read: Tensor,
    ) -> None: ...
    def forward(self, values: Tensor, bias: Tensor | None, source: Tensor, target: Tensor) -> None: ...
    def input_gradient(self, values: Tensor, delta: Tensor, target: Tensor) -> None: ...
    def weight_gradient(
        self, source: Tensor, delta: Tensor, gradient: Tensor, bias_gradient: Tensor | None
    ) -> None: ...
    @property
    def border(self) -> int: ...
    @property
    def delta_border(self) -> int: ...
    @property
    def block(self) -> int: ...
    def forward_images(
        self, values: Tensor, bias: Tensor | None, source: PackedImages, target: PackedImages, all: bool = True
    ) -> None: ...
    def input_gradient_images(
        self, values: Tensor, delta: PackedImages, target: PackedImages, add: bool, all: bool = True
    ) -> None: ...
    def weight_gradient_images(
        self, source: PackedImages, delta: PackedImages, gradient: Tensor, bias_gradient: Tensor | None
    ) -> None: ...
    def gradients_images(
        self,
        values: Tensor,
        source: PackedImages,
        delta: PackedImages,
        gradient: Tensor,
        bias_gradient: Tensor | None,
        target: PackedImages,
        add: bool,
        all: bool = True,
    ) -> None: ...

class FewSamples:
    def __init__(
        self,
        alive: Tensor,
        outputs: int,
        inputs: int,
        kernel: tuple[int, int],
        image: tuple[int, int],
        stride: int,
        padding: tuple[int, int],
        samples: int,
        instruction_set: str | None,
    ) -> None: ...
    def forward(self, values: Tensor, bias: Tensor | None, source: Tensor, target: Tensor) -> None: ...

class Chain:
    def __init__(self, layers: tuple[Layer, ...], relus: Sequence[bool]) -> None: ...
    @property
    def inputs(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    def floats(self, batch: int) -> int: ...
    def forward(self, weights: tuple[Tensor | None, ...], source: Tensor, target: Tensor, memory: Tensor) -> None: ...
    def backward(
        self,
        weights: tuple[Tensor | None, ...],
        delta: Tensor,
        memory: Tensor,
        gradients: tuple[Tensor | None, ...],
        target: Tensor | None,
    ) -> None: ...

def load_operators(path: str, onednn: bool) -> bool: ...

_Tensors = tuple[Tensor, ...]
_OrNone = tuple[Tensor | None, ...]

class Stretch:
    def __init__(
        self,
        inputs: Tensor,
        mean: Tensor | None,
        scale: Tensor | None,
        labels: Tensor,
        batch: int,
        layers: tuple[tuple[Chain | None, _OrNone, _OrNone, bool], ...],
    ) -> None: ...
    def multiply(self, gradients: _Tensors, masks: _Tensors) -> None: ...
    def sgd(
        self,
        parameters: _Tensors,
        gradients: _Tensors,
        momenta: _Tensors,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
    ) -> None: ...
    def adam(
        self,
        parameters: _Tensors,
        gradients: _Tensors,
        means: _Tensors,
        squares: _Tensors,
        steps: _Tensors,
        beta1: float,
        beta2: float,
        weight_decay: float,
        epsilon: float,
        decoupled: bool,
    ) -> None: ...
    def run(self, order: Tensor, rates: list[float], losses: Tensor, seconds: float) -> int: ...

def instruction_sets() -> list[str]: ...
def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    statistics: Tensor,
    y: Tensor,
    instruction_set: str | None = None,
) -> None: ...
def batch_norm_gradient(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    statistics: Tensor,
    gradient: Tensor,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    instruction_set: str | None = None,
) -> None: ...
def normalise_images(
    images: Tensor, indices: Tensor, mean: Tensor, scale: Tensor, target: Tensor, instruction_set: str | None = None
) -> None: ...
def augment_images(
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    crop: int,
    mean: Tensor,
    scale: Tensor,
    target: Tensor,
) -> None: ...
def add_bias(outputs: Tensor, bias: Tensor) -> None: ...
def gate(delta: Tensor, y: Tensor, target: Tensor) -> None: ...

_Size = tuple[int, int, int, int]
_Window = tuple[int, int, int, int, int, int]

class Calls:
    def __init__(self) -> None: ...
    def put(self, function: Callable[..., None], *arguments: object) -> None: ...
    def run(self) -> None: ...

class PackedImages:
    def __init__(self, size: _Size, border: int, instruction_set: str | None = None) -> None: ...
    @property
    def size(self) -> _Size: ...
    @property
    def border(self) -> int: ...

def block(instruction_set: str | None = None) -> int: ...
def pack_images(source: Tensor, target: PackedImages) -> None: ...
def unpack_images(source: PackedImages, target: Tensor) -> None: ...
def normalise_packed(
    x: PackedImages,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    statistics: Tensor,
    other: PackedImages | None,
    relu: bool,
    y: PackedImages,
    source: Layer | None = None,
    reader: Layer | None = None,
) -> None: ...
def update_statistics(
    x: PackedImages, statistics: Tensor, momentum: float, running_mean: Tensor, running_variance: Tensor
) -> None: ...
def normalise_gradient_packed(
    x: PackedImages,
    delta: PackedImages,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    relu: bool,
    y: PackedImages | None,
    gradient: PackedImages,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    source: Layer | None = None,
    reader: Layer | None = None,
) -> None: ...
def sum_packed(a: PackedImages, b: PackedImages | None, relu: bool, y: PackedImages) -> None: ...
def gate_packed(delta: PackedImages, y: PackedImages) -> None: ...
def max_pool_packed(window: _Window, x: PackedImages, y: PackedImages) -> None: ...
def max_pool_gradient_packed(
    window: _Window, x: PackedImages, y: PackedImages, delta: PackedImages, gradient: PackedImages
) -> None: ...
def average_packed(x: PackedImages, y: PackedImages) -> None: ...
def average_gradient_packed(delta: PackedImages, gradient: PackedImages) -> None: ...
