"""Scores that need the whole network: its gradients, its curvature, or the inputs of its layers.

Such a score is a `NetworkScore`. Its function receives a `Network` and returns a tensor of the weight's shape for each
layer. A higher score means a more important connection. The values of pruned connections are ignored.

Below, L is the mean loss over all examples, g its gradient, H its Hessian, and * multiplies element by element. The
weights of pruned connections are 0, so every score depends on the surviving connections alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tombola.errors import ImportanceError, expect_whole
from tombola.inputs import Forward, OwnStep, Tensors, call, convert, count_examples, list_tensors

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

_TEMPERATURE = 200.0
_CONCRETE_TEMPERATURE = 2 / 3
_PASSES, _LEARNING_RATE = 20, 0.3  # of learning a mask
_STRENGTH = 4.0  # how much the relative distance from the density counts
_EXAMPLES_AT_ONCE = 8  # the gradients of so many examples are in memory at the same time
_FEW_POSITIONS = 4  # of a convolution's outputs, up to which examples are summed over pairs of positions


@dataclass(frozen=True)
class Network:
    """A network at the point at which it is scored, and the examples that a score sees.

    Batch norm normalises each batch by its own mean and variance, as in a training step, and keeps its running
    statistics. Dropout is off.

    Args:
        model: the network, with the weights to score; the weights of pruned connections are 0.
        alive: layer -> a bool tensor of the weight's shape, True if the connection is alive.
        batches: pairs (inputs, labels), as the network receives them. Inputs may be several tensors, see
            `tombola.inputs`.
        loss: a function (outputs, labels) -> scalar, the mean over the batch.
        generator: the random stream of this round of pruning.
        forward: a function (model, inputs) -> outputs.
        step: a function (model, inputs, labels) -> loss, instead of `forward` and `loss`; None for these.
        prunable: the layers whose connections may be removed; None for all.
        removed: the number of connections that are removed by these scores.
    """

    model: nn.Module
    alive: Mapping[str, Tensor]
    batches: Sequence[tuple[Any, Any]]
    loss: Callable[[Tensor, Any], Tensor]
    generator: torch.Generator
    forward: Forward = call
    step: OwnStep | None = None
    prunable: Collection[str] | None = None
    removed: int = 0

    def outputs(self, inputs: Tensors) -> Tensor:
        """Return the outputs for the inputs of a batch."""
        return self.forward(self.model, inputs)

    def loss_of(self, inputs: Tensors, labels: Tensors) -> Tensor:
        """Return the mean loss over a batch, a scalar, by the step or else by the loss of the outputs."""
        if self.step is not None:
            return self.step(self.model, inputs, labels)
        return self.loss(self.outputs(inputs), labels)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights of the scored layers, by parameter name."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.alive}

    @property
    def examples(self) -> int:
        """The number of examples in all batches."""
        return sum(count_examples(inputs) for inputs, _ in self.batches)


@dataclass(frozen=True)
class NetworkScore:
    """A score of all connections of a network at once.

    Args:
        function: a function network -> {layer: scores of the weight's shape}. It must not change the network.
        steps: the number of steps in which a round of pruning removes its connections; the score is computed again
            before each step.
        passes: how often each computation passes over the examples to learn. Such passes count as training, see
            `tombola.study.planner.Planner.learning_length`; those of scores that learn nothing do not.

    Raises:
        UserError: if `steps` is no whole number from 1 on, or `passes` none from 0 on.

    >>> def taylor_squared(network):
    ...     return {layer: scores**2 for layer, scores in taylor(network).items()}
    >>> NetworkScore(taylor_squared).steps
    1
    """

    function: Callable[[Network], Mapping[str, Tensor]]
    steps: int = 1
    passes: int = 0

    def __post_init__(self) -> None:
        """Raise `UserError` unless the numbers are whole and possible."""
        expect_whole(self.steps, "steps", 1)
        expect_whole(self.passes, "passes")

    def __call__(self, network: Network) -> Mapping[str, Tensor]:
        """Return the scores of each layer, of the weight's shape."""
        return self.function(network)


def taylor(network: Network) -> dict[str, Tensor]:
    """Return |w * g|, the first-order estimate of how the loss changes without the connection.

    Source: Molchanov et al., arXiv 1906.10771.

    >>> network = _example()  # one weight for each of two inputs, w = (3, -1); the loss is the mean output, 2 x
    >>> taylor(network)["weight"]
    tensor([[6., 2.]])
    """
    gradients = _gradients(network)
    return {layer: (weight.detach() * gradients[layer]).abs() for layer, weight in network.weights.items()}


def snip(network: Network) -> dict[str, Tensor]:
    """Return |dL/dm| for the mask m, which multiplies the weights (Lee et al., arXiv 1810.02340).

    Source: SNIP divides the scores by their sum over the whole network, which changes no order, so it is left out. With
    weights w * m and m = 1, dL/dm = w * g, so SNIP equals `taylor` except for rounding. With a forward or a step of
    the user, which may read the weights, it is computed as w * g.

    >>> snip(_example())["weight"]
    tensor([[6., 2.]])
    """
    if network.forward is not call or network.step is not None:
        return taylor(network)
    masks = {layer: alive.to(network.weights[layer].dtype) for layer, alive in network.alive.items()}
    masks = {layer: mask.requires_grad_() for layer, mask in masks.items()}

    def model(*inputs: Tensor, **named: Tensor) -> Tensor:
        masked = {layer: weight.detach() * masks[layer] for layer, weight in network.weights.items()}
        outputs: Tensor = functional_call(network.model, masked, inputs, named)
        return outputs

    def loss_of(inputs: Tensors, labels: Tensors) -> Tensor:
        return network.loss(call(model, inputs), labels)

    return {layer: gradient.abs() for layer, gradient in _gradients(network, loss_of, masks).items()}


def grasp(network: Network) -> dict[str, Tensor]:
    """Return w * H g, how much of the gradient's norm would be lost without the connection; it may be negative.

    Source: Wang et al., arXiv 2002.07376, who remove the connections with the largest -w * H g. As in their code, the
    outputs are divided by 200 before the loss. Without this, a network that is certain of its predictions has its
    largest gradients where it is wrong, and the connections that make it right would be removed.

    >>> curved = _example(loss=lambda outputs, labels: 200**2 * (outputs**2).mean() / 2)
    >>> grasp(curved)["weight"].round()  # outputs 4, x = (2, 2): H = x x^T, g = 4 x, H g = 64 and 64 halves
    tensor([[192., -64.]])
    """
    if network.step is not None:
        raise ImportanceError("it divides the outputs before the loss, and a step of your own gives only the loss")
    tempered = replace(network, loss=lambda outputs, labels: network.loss(outputs / _TEMPERATURE, labels))
    gradients = {layer: gradient * network.alive[layer] for layer, gradient in _gradients(tempered).items()}
    total = _sum((products for _, products in _hessian_products(tempered, lambda: gradients)), network.weights)
    return {layer: weight.detach() * total[layer] for layer, weight in network.weights.items()}


def hessian(network: Network) -> dict[str, Tensor]:
    """Return w^2 * |diag(H)| / 2, Optimal Brain Damage's estimate of how much the loss changes.

    Source: LeCun, Denker and Solla, NIPS 1989. The diagonal is Hutchinson's estimate, the mean of v * H v with random
    signs v, which are drawn anew for each batch. As in AdaHessian (Yao et al., arXiv 2006.00719), its absolute value is
    taken: the estimate is noisy, and a large weight with a negative value would be removed first.

    >>> curved = _example(loss=lambda outputs, labels: (outputs**2).mean() / 2)
    >>> hessian(curved)["weight"].shape
    torch.Size([1, 2])
    """
    weights = network.weights

    def draw_signs() -> dict[str, Tensor]:
        draw = partial(torch.randint, 2, generator=network.generator)
        signs = {layer: draw(weight.shape).to(weight).mul_(2).sub_(1) for layer, weight in weights.items()}
        return {layer: sign * network.alive[layer] for layer, sign in signs.items()}

    found = _hessian_products(network, draw_signs)
    diagonal = _sum(
        ({layer: signs[layer] * products[layer] for layer in weights} for signs, products in found), weights
    )
    return {layer: weight.detach().square() * diagonal[layer].abs() / 2 for layer, weight in weights.items()}


def fisher(network: Network) -> dict[str, Tensor]:
    """Return w^2 * E[g_i^2], with the gradient g_i of the loss of one example: Optimal Brain Damage's empirical Fisher.

    Source: LeCun, Denker and Solla, NIPS 1989; Theis et al., arXiv 1801.05787. The layers have to be linear or
    convolution layers that the network uses once. With batch norm, g_i is the part of the batch's gradient that passes
    through example i.

    >>> fisher(_example())["weight"]  # the gradient of every example is (2, 2)
    tensor([[36.,  4.]])
    """
    squares = {layer: torch.zeros_like(weight) for layer, weight in network.weights.items()}
    calls = dict.fromkeys(squares, 0)

    def add(layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor) -> None:
        calls[layer] += 1
        squares[layer] += _sum_of_squares(module, inputs, gradients).view_as(squares[layer])

    with _observe_gradients(network, add):
        for inputs, labels in network.batches:
            # The sum of the examples' losses, so that each example adds its own gradient.
            loss = _finite(network.loss_of(inputs, labels)) * count_examples(inputs)
            loss.backward()  # type: ignore[no-untyped-call]
    if wrong := [layer for layer, count in calls.items() if count != len(network.batches)]:
        raise ImportanceError(f"it rates only layers that the network calls once, and not {wrong[0]!r}")
    count = network.examples
    return {
        layer: weight.detach().square().mul_(squares[layer]).div_(count) for layer, weight in network.weights.items()
    }


def wanda(network: Network) -> dict[str, Tensor]:
    """Return |w| * ||x||, with the norm of the connection's input over all examples and positions.

    Source: Sun et al., arXiv 2306.11695. The layers have to be linear or convolution layers.

    >>> wanda(_example())["weight"]  # three examples, each with inputs (2, 2)
    tensor([[10.3923,  3.4641]])
    """
    squares: dict[str, Tensor] = {}

    def add(layer: str, module: nn.Module, inputs: Tensor) -> None:
        found = _input_squares(module, inputs)
        squares[layer] = squares[layer] + found if layer in squares else found

    with _observe_inputs(network, add), torch.no_grad():
        for inputs, _ in network.batches:
            network.outputs(inputs)
    if unused := sorted(network.alive.keys() - squares.keys()):
        raise ImportanceError(f"it rates only layers that the network calls, and not {unused[0]!r}")
    return {layer: weight.detach().abs() * squares[layer].sqrt() for layer, weight in network.weights.items()}


def synflow(network: Network) -> dict[str, Tensor]:
    """Return |w| * dR/d|w|, with R the sum of the outputs for inputs 1 and absolute parameters; in float64.

    Source: SynFlow (Tanaka et al., arXiv 2006.05467). It sees no data. As SynFlow prunes in many small steps, a round
    of pruning removes its connections in five steps. All parameters and running statistics are replaced by their
    absolute values, and batch norm uses its running statistics.

    >>> synflow(_example())["weight"]
    tensor([[3., 1.]], dtype=torch.float64)
    """
    inputs, _ = network.batches[0]
    for name, tensor in list_tensors(inputs).items():
        if not tensor.is_floating_point():
            raise ImportanceError(
                f"it gives the network the inputs 1, and this network takes inputs{name} of {tensor.dtype}"
            )
    model = copy.deepcopy(network.model).double().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.abs_()
    ones = convert(lambda tensor: torch.ones_like(tensor[:1], dtype=torch.float64), inputs)
    weights = {layer: model.get_parameter(layer).requires_grad_() for layer in network.alive}
    total = _finite(network.forward(model, ones).sum())
    gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return {
        layer: torch.zeros_like(weight) if gradient is None else weight.detach() * gradient
        for (layer, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def concrete(network: Network) -> dict[str, Tensor]:
    """Return the probability to keep each connection, learned for all of them together, in 0..1; in float64.

    Source: Concrete Ticket Search (Arora and Teuscher, arXiv 2512.07142). The weights stay as they are, and Adam learns
    a number a for each connection. In each step, the weight is multiplied by a sample of the Concrete distribution
    (Maddison et al., arXiv 1611.00712): sigmoid((a + log u - log(1 - u)) / T), with u uniform in (0, 1) and T = 2/3.
    Two things are minimised: the loss, and the distance of the mean of sigmoid(a) from the density that the round of
    pruning leaves in the layers that it prunes. The gradient of this mean is scaled to the norm of the loss's gradient,
    times four times the relative distance (1 at most), so that no factor has to be chosen. The source balances
    gradients too; its best objective is not the loss, but the divergence from the outputs of the dense network.

    Learning passes over the examples 20 times. Layers that the round does not prune are left as they are, and have 1.

    >>> network = _example(loss=lambda outputs, labels: (outputs - 6).square().mean())
    >>> scores = concrete(replace(network, removed=1))["weight"]
    >>> scores[0, 0] > scores[0, 1]  # the outputs, 6 m_1 - 2 m_2, are 6 if the mask m is (1, 0)
    tensor(True)
    """
    layers = [layer for layer in network.alive if network.prunable is None or layer in network.prunable]
    weights = {layer: network.weights[layer].detach() for layer in layers}
    alive = {layer: network.alive[layer].float() for layer in layers}
    total = int(sum(each.sum() for each in alive.values()))
    if not 0 < network.removed < total:
        raise ImportanceError(f"it learns which of {total} connections to keep, and {network.removed} are removed")
    density = 1 - network.removed / total
    logits = {layer: torch.full_like(alive[layer], math.log(density / (1 - density))) for layer in layers}
    logits = {layer: each.requires_grad_() for layer, each in logits.items()}
    optimizer = torch.optim.Adam(logits.values(), lr=_LEARNING_RATE)
    loss_of = _LossOf(network)
    for inputs, labels in _PASSES * tuple(network.batches):
        samples = {layer: _sample(logits[layer], network.generator) for layer in layers}
        masked = {f"model.{layer}": weights[layer] * samples[layer].to(weights[layer].dtype) for layer in layers}
        slopes = _gradient_of(_finite(functional_call(loss_of, masked, (inputs, labels))), logits)
        kept = {layer: logits[layer].detach().sigmoid() for layer in layers}
        towards = {layer: kept[layer] * (1 - kept[layer]) * alive[layer] / total for layer in layers}
        mean = float(_sum_all(kept[layer] * alive[layer] for layer in layers)) / total
        distance = max(-1.0, min(1.0, _STRENGTH * (mean / density - 1)))
        factor = distance * _norm(slopes) / _norm(towards).clamp_min(torch.finfo(torch.float32).tiny)
        for layer in layers:
            logits[layer].grad = slopes[layer] + factor * towards[layer]
        optimizer.step()
    others = {layer: torch.ones_like(each, dtype=torch.float64) for layer, each in network.alive.items()}
    return others | {layer: each.detach().double().sigmoid() for layer, each in logits.items()}


NETWORK_SCORES: dict[str, NetworkScore] = {
    **{each.__name__: NetworkScore(each) for each in (taylor, snip, grasp, hessian, fisher, wanda)},
    "concrete": NetworkScore(concrete, passes=_PASSES),
    "synflow": NetworkScore(synflow, steps=5),
}
"""The scores of whole networks by name."""


class _LossOf(nn.Module):
    """The mean loss over a batch as a module, whose weights can be replaced during a call."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.model = network.model
        self._loss_of = network.loss_of

    def forward(self, inputs: Tensors, labels: Tensors) -> Tensor:
        """Return the loss."""
        return self._loss_of(inputs, labels)


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a sample of the Concrete distribution, in 0..1, for each logit."""
    uniform = torch.rand(logits.shape, generator=generator).clamp_(1e-6, 1 - 1e-6).to(logits.device)
    return ((logits + uniform.logit()) / _CONCRETE_TEMPERATURE).sigmoid()


def _sum_all(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of all numbers of the tensors."""
    return torch.stack([tensor.sum() for tensor in tensors]).sum()


def _norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the Euclidean norm of all numbers of the tensors."""
    return _sum_all(tensor.square() for tensor in tensors.values()).sqrt()


def _gradients(
    network: Network,
    loss_of: Callable[[Tensors, Tensors], Tensor] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over all examples, by default with respect to the weights."""
    tensors = network.weights if tensors is None else tensors
    return _sum((_gradient_of(loss, tensors) for loss in _losses(network, loss_of or network.loss_of)), tensors)


def _hessian_products(
    network: Network, direction: Callable[[], Mapping[str, Tensor]]
) -> Iterator[tuple[Mapping[str, Tensor], dict[str, Tensor]]]:
    """Yield a direction v and the part of the product H v that each batch adds; the parts sum to H v."""
    weights = network.weights
    with sdpa_kernel(SDPBackend.MATH):  # the other implementations of attention have no second derivative
        for loss in _losses(network, network.loss_of):
            slopes, along = _gradient_of(loss, weights, create_graph=True), direction()
            slope = torch.stack([(slopes[layer] * along[layer]).sum() for layer in weights]).sum()
            if slope.requires_grad:  # the loss is not linear in the weights
                yield along, _gradient_of(slope, weights)


def _sum(parts: Iterable[Mapping[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum of the parts layer by layer; without parts, zeros of these shapes."""
    total = {layer: torch.zeros_like(tensor) for layer, tensor in like.items()}
    for part in parts:
        for layer, tensor in part.items():
            total[layer] += tensor
    return total


def _losses(network: Network, loss_of: Callable[[Tensors, Tensors], Tensor]) -> Iterator[Tensor]:
    """Yield the loss of each batch, weighted by its share of the examples: their sum is the mean over all examples."""
    for inputs, labels in network.batches:
        yield _finite(loss_of(inputs, labels)) * (count_examples(inputs) / network.examples)


def _gradient_of(value: Tensor, tensors: Mapping[str, Tensor], *, create_graph: bool = False) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(value, list(tensors.values()), allow_unused=True, create_graph=create_graph)
    return {
        layer: torch.zeros_like(tensor) if gradient is None else gradient
        for (layer, tensor), gradient in zip(tensors.items(), gradients, strict=True)
    }


def _finite(value: Tensor) -> Tensor:
    """Return a loss; raise `ImportanceError` if it is no finite number that depends on the weights."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ImportanceError(f"expected one number as the loss, the mean over the batch, got {got}")
    if not value.isfinite():
        raise ImportanceError(f"the loss is {value.item()} at the weights that are scored")
    if not value.requires_grad:
        raise ImportanceError("the loss does not depend on the weights that are scored: it has no gradient")
    return value


@contextmanager
def _observe_inputs(network: Network, tell: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Tell the inputs of each scored layer, whenever the network computes, as `tell(layer, module, inputs)`."""

    def hook(layer: str, module: nn.Module, arguments: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        tell(layer, module, _input_of(arguments, named).detach())

    with ExitStack() as stack:
        for layer, module in _modules(network):
            stack.enter_context(module.register_forward_pre_hook(partial(hook, layer), with_kwargs=True))
        yield


@contextmanager
def _observe_gradients(network: Network, tell: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Tell the inputs of each scored layer and the gradients of its outputs, as `tell(layer, module, x, dL/dy)`.

    Inside the block, no parameter requires a gradient, since those of the outputs are enough.
    """

    def hook(
        layer: str, module: nn.Module, arguments: tuple[Tensor, ...], named: Mapping[str, Tensor], outputs: Tensor
    ) -> Tensor:
        inputs = _input_of(arguments, named).detach()
        if not torch.is_grad_enabled():
            raise ImportanceError(f"it rates no layers that the network calls without gradients (no_grad): {layer!r}")
        if not outputs.requires_grad:
            outputs = outputs.requires_grad_().clone()  # a copy may be changed in place
        outputs.register_hook(  # type: ignore[no-untyped-call]
            lambda gradients: tell(layer, module, inputs, gradients.detach())
        )
        return outputs

    with ExitStack() as stack:
        for layer, module in _modules(network):
            stack.enter_context(module.register_forward_hook(partial(hook, layer), with_kwargs=True))
        for parameter in network.model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        yield


def _input_of(arguments: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> Tensor:
    """Return the input of a layer, which the network may also give by its name."""
    return arguments[0] if arguments else named["input"]


def _modules(network: Network) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module that computes with a scored weight, with the weight's name.

    Raises:
        ImportanceError: if a scored weight belongs to another layer than a linear or a convolution layer.
    """
    names = {id(weight): layer for layer, weight in network.weights.items()}
    for path, module in network.model.named_modules():
        for field, parameter in module.named_parameters(recurse=False):
            layer = names.get(id(parameter))
            if layer is None:
                continue
            if field != "weight" or not isinstance(module, nn.Linear | Convolution):
                name = f"{path}.{field}".removeprefix(".")
                raise ImportanceError(
                    f"it rates only weights of linear and convolution layers, and {name!r} is of a "
                    f"{type(module).__name__}; keep it out of what may be pruned, or take another importance"
                )
            yield layer, module


def _sum_of_squares(module: nn.Module, inputs: Tensor, gradients: Tensor) -> Tensor:
    """Return the sum over the examples of the squared gradient of the weight, as many numbers as the weight has."""
    if isinstance(module, nn.Linear) and inputs.dim() == 2:
        return gradients.square().T @ inputs.square()
    if isinstance(module, Convolution) and gradients.shape[2:].numel() <= _FEW_POSITIONS:
        return _sum_over_pairs(module, inputs, gradients)
    parts = (torch.split(each, _EXAMPLES_AT_ONCE) for each in (inputs, gradients))
    squares = (_example_gradients(module, *part).square_().sum(0) for part in zip(*parts, strict=True))
    return sum(squares, torch.zeros((), device=inputs.device))


def _example_gradients(module: nn.Module, inputs: Tensor, gradients: Tensor) -> Tensor:
    """Return the gradient of the weight for each example, with the examples first."""
    if isinstance(module, nn.Linear):
        return torch.bmm(gradients.flatten(1, -2).transpose(1, 2), inputs.flatten(1, -2))
    assert isinstance(module, Convolution)
    slopes, patches = _by_group(module, gradients), _patches(module, inputs)
    return slopes @ patches.transpose(2, 3)


def _sum_over_pairs(module: Convolution, inputs: Tensor, gradients: Tensor) -> Tensor:
    """Return the sum over the examples of the squared gradient of the weight, as one product for all examples.

    With the slope s and the patch x at each position, (sum_p s_p x_p)^2 is the sum over pairs of positions (p, q) of
    s_p s_q x_p x_q. If there are few, this is faster than a gradient for each example, which is as large as the weight.
    """
    first, second = torch.triu_indices(*[gradients.shape[2:].numel()] * 2, device=gradients.device)
    slopes, patches = (
        parts[..., first] * parts[..., second] for parts in (_by_group(module, gradients), _patches(module, inputs))
    )
    slopes *= 1 + (first != second).to(slopes.dtype)  # each pair of different positions counts twice
    # Both become (groups, ..., examples * pairs).
    left, right = (parts.permute(1, 2, 0, 3).flatten(2) for parts in (slopes, patches))
    return left @ right.transpose(1, 2)


def _by_group(module: Convolution, gradients: Tensor) -> Tensor:
    """Return the gradients of the outputs, of shape (examples, groups, outputs per group, positions)."""
    return gradients.reshape(len(gradients), module.groups, module.out_channels // module.groups, -1)


def _input_squares(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the sum of squares of each connection's input over examples and positions; it broadcasts to the weight."""
    if isinstance(module, nn.Linear):
        return inputs.flatten(0, -2).square().sum(0, keepdim=True)
    assert isinstance(module, Convolution)
    summed = inputs.square().sum(0, keepdim=True)
    by_group = _patches(module, summed).sum((0, 3))  # (groups, inputs per group * taps)
    per_group = module.out_channels // module.groups
    return by_group.repeat_interleave(per_group, 0).view_as(module.weight)


def _patches(module: Convolution, inputs: Tensor) -> Tensor:
    """Return the inputs of each position, of shape (examples, groups, inputs per group * taps, positions)."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    patches = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    geometry = zip(module.kernel_size, module.dilation, module.stride, strict=True)
    for dim, (size, dilation, stride) in enumerate(geometry, start=2):
        patches = patches.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    dims = len(module.kernel_size)
    # From (examples, channels, positions..., taps...): the copy that reshape makes is what the product reads.
    patches = patches.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    positions = patches.shape[2 + dims :].numel()
    return patches.reshape(len(inputs), module.groups, -1, positions)


def _example(loss: Callable[[Tensor, Tensor], Tensor] = lambda outputs, _: outputs.mean()) -> Network:
    """Return the network of the examples above: outputs 3 x_1 - x_2, for three examples with inputs (2, 2)."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -1.0]]))
    alive = {"weight": torch.ones(1, 2, dtype=torch.bool)}
    return Network(model, alive, [(torch.full((3, 2), 2.0), torch.zeros(3))], loss, torch.Generator().manual_seed(0))
