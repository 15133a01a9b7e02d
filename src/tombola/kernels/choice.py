"""The choice of the layers that train faster with only their surviving weights: one rule for all machines."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from tombola.kernels import layers
from tombola.kernels.layers import is_plain

MISSING = (
    "tombola was installed without its compiled kernels (a C++ compiler is needed to build them); "
    "sparse networks train at dense speed"
)


class NoKernelsWarning(UserWarning):
    """Sparse networks train at dense speed, because the package was installed without its compiled kernels."""


def available() -> bool:
    """Return whether the package was installed with its compiled kernels."""
    return layers.extension is not None


def warn_if_missing(stacklevel: int = 3) -> None:
    """Warn if the package was installed without its compiled kernels.

    Args:
        stacklevel: the stack level of the code that the warning names; 3 is the caller of the caller. Python shows the
            warning once for each such place.

    """
    if not available():
        warnings.warn(MISSING, NoKernelsWarning, stacklevel=stacklevel)


def instruction_set() -> str | None:
    """Return the instruction set that the kernels use on this machine; None without kernels."""
    if layers.extension is None:
        return None
    fastest: str = layers.extension.instruction_sets()[0]
    return fastest


def choose(
    shape: Sequence[int], density: float, batch_size: int = 128, *, beside: bool = False, packed: bool = False
) -> bool:
    """Return whether a layer of this weight shape and density trains faster sparse, by one rule for all machines.

    Args:
        shape: the shape of the weight, (outputs, inputs) or (outputs, inputs, height, width).
        density: alive / all connections of the layer, in 0..1.
        batch_size: the number of examples in a training step.
        beside: whether the previous or the next layer among those that the kernels support is sparse.
        packed: whether activations may stay packed between sparse convolutions, see `tombola.kernels.can_pack`.

    """
    # Time of the forward pass and of both gradients relative to a dense layer, by density. Each is the minimum of
    # interleaved repetitions on one thread with AVX2. Linear layers were measured in the middle of a `Perceptron`
    # (dense: MKL), convolutions alone (dense: oneDNN, channels-last):
    #
    #   layer              batch    .1    .3    .4    .5    .6    .8
    #   100 -> 100            32   .46   .50   .52   .54   .56   .59
    #   300 -> 100           128   .34   .51   .58   .65   .73   .85
    #   784 -> 300           128   .29   .57   .67   .84   .97  1.19
    #   784 -> 300          1000   .29   .58   .68   .82   .97  1.21
    #   784 -> 300            32   .36   .63   .76   .88  1.02  1.25
    #   784 -> 300            16   .43   .73   .87  1.05  1.17  1.46
    #   512 -> 512           128   .27   .58   .76   .87   .98  1.18
    #   1000 -> 1000         128   .27   .69   .84   .93  1.13  1.45
    #   2000 -> 2000         128   .37   .89  1.11  1.27  1.40  1.82
    #   16 -> 16, 32 x 32    128   .67   .95  1.03  1.22  1.40
    #   32 -> 32, 16 x 16    128   .41   .63   .89   .87  1.02
    #   64 -> 64, 8 x 8      128   .45   .77   .48   .72  1.00
    #   256 -> 256, 8 x 8    128   .23   .55   .59   .73  1.07
    #
    # Linear layers after both became faster: dense ones use oneDNN, and sparse ones read in order. A whole step of a
    # perceptron with one hidden layer, relative to one with a dense first layer, on another processor. A block of
    # AVX-512 has 128 samples; if a quarter of it is empty, dense layers are ahead from density .5 on.
    #
    #   layer              batch   AVX2   .4    .5    .6    .7   AVX-512   .4    .5    .6    .7
    #   784 -> 300            16         .64   .76   .88                  .99  1.11  1.33
    #   784 -> 300            32         .54   .66   .78   .92            .84   .94  1.11  1.22
    #   784 -> 300            96               .67   .81                       1.02  1.16
    #   784 -> 300           128                     .74   .86                        .91  1.00
    #   512 -> 512           128                     .71   .83                        .85   .94
    #   1000 -> 1000          32         .58   .71                        .99  1.23
    #   1000 -> 1000         128               .61   .74                        .81   .91
    #   2000 -> 2000         128         .50   .62   .71                  .61   .76   .85
    #
    # A sparse convolution beside a sparse neighbour also saves the change of layout. The first layer and the shortcuts
    # of ResNet-20 are small and stay the densest; with these sparse too, a step at density .1 took .7 of the time. A
    # step of VGG-16 took .85 of the time with all layers up to density .4 sparse instead of up to .3.
    #
    # Packed convolutions, without the changes of layout at both ends of a packed part, on the processor with AVX-512:
    #
    #   layer                        AVX2  .6   .65    .7   .75    .8   .85  AVX-512  .6   .65    .7   .75    .8   .85
    #   16 -> 16, 32 x 32                .58   .72   .75   .84   .89   .94         .44   .56   .61   .60   .70   .71
    #   32 -> 32, 16 x 16                .76   .77   .83   .88   .93   .99         .63   .68   .69   .78   .84   .93
    #   32 -> 64, 16 x 16, stride 2      .63   .72   .75   .81   .83   .88         .54   .64   .60   .64   .62   .71
    #   64 -> 64, 8 x 8                  .72   .79   .82   .89   .96  1.02         .80   .86   .90   .97   .94  1.05
    #   64 -> 64, 32 x 32                .72   .76   .82   .89   .94  1.00         .69   .72   .77   .82   .86   .91
    #   128 -> 128, 16 x 16              .76   .84   .91   .96  1.03  1.08         .75   .82   .87   .94   .98  1.05
    #   256 -> 256, 8 x 8                .87   .93  1.01  1.07  1.13  1.20         .88   .93  1.00  1.06  1.13  1.20
    #   512 -> 512, 4 x 4                .96  1.03  1.12  1.18  1.23  1.29         .95  1.00  1.04  1.13  1.19  1.22
    #   512 -> 512, 2 x 2                .82   .83   .90   .99   .98  1.03         .65   .65   .71   .73   .80   .83
    #   64 -> 128, 1 x 1, stride 2       .51   .51   .55   .55   .59   .62         .46   .37   .49   .44   .43   .46
    #   64 -> 64, 1 x 1, 8 x 8           .81   .84   .89   .93   .97  1.06         .71   .73   .83   .87   .88   .90
    #   128 -> 128, 1 x 1, 16 x 16       .64   .76   .80   .86   .91   .97         .54   .68   .74   .76   .83   .84
    #   3 -> 16, 32 x 32                 .33   .43   .46   .48   .52   .55         .21   .24   .24   .27   .29   .30
    #
    # Small layers are dense at lower densities than those at which both take the same time, because a dense convolution
    # between packed ones needs copies (see below): if all layers of up to 2^14 weights are sparse up to .85 instead of
    # .75, a step of ResNet-20 at density .8 takes 1.07 of the time. Large ones are sparse up to .65 even with 4 x 4
    # pixels, since a network with such layers has others of 8 x 8 or 2 x 2.
    #
    # Batch norm and ReLU between packed convolutions also take a fifth to two thirds of their time between dense ones.
    #
    # A dense convolution between packed ones reads and writes another layout: PyTorch copies 64 channels of 16 x 16
    # pixels in 130 us for an image, the inputs and the gradient of the outputs. A shortcut, 64 -> 128, 1 x 1 with
    # stride 2, at density .9 takes 53 us sparse and 42 us dense (67 and 51 us with AVX2). With two shortcuts sparse, a
    # step of ResNet-18 at density .1 took .85 of the time (AVX-512).
    #
    # A step of ResNet-20 with all convolutions packed, relative to a dense one (channels-last). With AVX-512, a block
    # has 32 samples, and what is beyond the last sample is computed, too:
    #
    #   batch     AVX2   .1    .3    .5   AVX-512   .1    .3    .5
    #      16           .42   .62   .72           1.04  1.42  1.69
    #      24                                      .78  1.05  1.25
    #      32           .34   .54   .69            .46   .66   .82
    #      40                                      .74  1.05  1.28
    #      48                                      .65   .91  1.11
    if batch_size < 16:
        return False
    if len(shape) == 2:
        limits = _LINEAR_OF_FULL_BATCHES if _filled(batch_size, 128) >= 0.9 else _LINEAR
        return density < 1 and density <= next(most for size, most in limits if math.prod(shape) <= size)
    used = _filled(batch_size, 32) if packed else 1.0
    if batch_size < (32 if packed else 64) or used < 0.75:
        return density <= 0.1
    if batch_size < 64 and used < 0.8:
        return density <= 0.3
    small = beside and math.prod(shape) <= (2**15 if packed and math.prod(shape[2:]) == 1 else 2**11)
    if packed:
        return small or density <= next(most for size, most in _PACKED if math.prod(shape) <= size)
    return density <= (0.85 if small else 0.4)


def _filled(batch_size: int, block: int) -> float:
    """Return the part of the blocks of so many samples that a batch fills, in 0..1."""
    return batch_size / (block * math.ceil(batch_size / block))


# (number of weights up to which the limit holds, highest density of a sparse linear layer)
_LINEAR = ((2**12, 1.0), (2**15, 0.75), (2**18, 0.55), (2**20, 0.45), (math.inf, 0.3))

# The same for batches that fill nine tenths of blocks of 128 samples.
_LINEAR_OF_FULL_BATCHES = ((2**12, 1.0), (2**15, 0.75), (2**18, 0.65), (2**20, 0.6), (math.inf, 0.45))

# The same for a sparse convolution in a network whose activations may stay packed.
_PACKED = ((2**16, 0.75), (2**18, 0.7), (math.inf, 0.65))


def choose_to_infer(shape: Sequence[int], density: float, batch_size: int) -> bool:
    """Return whether the forward pass of a layer of this weight shape and density is faster sparse.

    Args:
        shape: the shape of the weight, (outputs, inputs) or (outputs, inputs, height, width).
        density: alive / all connections of the layer, in 0..1.
        batch_size: the number of examples of a pass.

    """
    # Time of a pass without gradients relative to a dense layer, by density; least of interleaved repetitions on one
    # thread with AVX2 (dense: MKL, oneDNN).
    #
    #   layer              batch   .05    .1   .15    .2    .3    .5
    #   100 -> 10           1-16  1.2
    #   300 -> 100             1  1.09  1.13  1.19  1.20  1.26  1.46
    #   300 -> 100             4   .96   .96   .93   .99  1.05  1.17
    #   784 -> 300             1   .70   .83  1.01  1.15  1.58  2.13
    #   784 -> 300             2   .49   .60   .69   .80  1.02  1.43
    #   784 -> 300             8   .40   .52   .51   .57   .75   .74
    #   784 -> 300            16   .39   .43   .49   .58   .75  1.11
    #   3 -> 64, 32 x 32       1         .95              1.04  1.19
    #   16 -> 16, 32 x 32      1         .32               .46   .55
    #   16 -> 16, 32 x 32    128         .43               .57   .71
    #   128 -> 128, 16 x 16    1         .30               .61   .94
    #   128 -> 128, 16 x 16  128         .34               .71  1.08
    #   512 -> 512, 2 x 2      1         .12               .25   .37
    #   512 -> 512, 2 x 2    128         .61              1.61  1.32
    #   64 -> 256, 1 x 1, 14 x 14    1   .71              1.05  1.64
    #
    # With one example, 784 -> 300 alone is faster up to a density between .1 and .15. Within LeNet-300-100 it gains
    # less: about a tenth at .1. The limit for one example is therefore .1, the last of these densities at which it is
    # faster in both.
    if len(shape) == 4:
        return density <= (0.25 if math.prod(shape[2:]) > 1 else 0.2)
    if batch_size > MOST_FEW:
        return choose(shape, density, batch_size)
    if math.prod(shape) < 2**16:
        return batch_size >= 4 and density <= 0.25 and math.prod(shape) >= 2**13
    return density <= (0.1 if batch_size == 1 else 0.25 if batch_size < 4 else 0.35)


MOST_FEW = 16
"""The most examples for which linear layers have kernels of their own without gradients."""


def _eligible(module: nn.Module) -> bool:
    """Return whether a sparse layer can compute exactly what this module does."""
    if not is_plain(module):
        return False
    if type(module) is nn.Conv2d:
        if (
            module.groups != 1
            or module.dilation != (1, 1)
            or module.stride[0] != module.stride[1]
            or module.padding_mode != "zeros"
            or isinstance(module.padding, str)
        ):
            return False
    elif type(module) is not nn.Linear:
        return False
    return all(p.dtype == torch.float32 and p.device.type == "cpu" for p in module.parameters(recurse=False))


def list_eligible(model: nn.Module, names: Collection[str]) -> list[str]:
    """Return those parameter names that are weights of layers in whose place a sparse layer can compute."""
    if not available():
        return []
    modules = dict(model.named_modules())
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found = []
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = modules.get(path)
        if (
            attribute == "weight"
            and module is not None
            and module is not model  # a model that is one layer has no parent to hold the new one
            and _eligible(module)
            and module.get_parameter("weight").numel()
            and all(uses[id(p)] == 1 for p in module.parameters(recurse=False))
        ):
            found.append(name)
    return found


def choices(
    model: nn.Module, mask: Mapping[str, Tensor], batch_size: int = 128, *, packed: bool = False
) -> dict[str, str]:
    """Return parameter name -> "dense" or "sparse" for each layer of `mask`: the layers that `sparsify` will replace.

    The choice affects rounding, so it is a part of the identity of a training. It depends only on the arguments and on
    whether the kernels are installed. `packed` says whether activations may stay packed, see `can_pack`.
    """
    densities = {name: float(mask[name].count_nonzero()) / mask[name].numel() for name in list_eligible(model, mask)}
    alone = [choose(mask[name].shape, density, batch_size, packed=packed) for name, density in densities.items()]
    chosen = dict.fromkeys(mask, "dense")
    for number, (name, density) in enumerate(densities.items()):
        beside = any(alone[max(0, number - 1) : number + 2])
        if choose(mask[name].shape, density, batch_size, beside=beside, packed=packed):
            chosen[name] = "sparse"
    return chosen
