"""Matching: the overlap of tickets after the hidden units of one network are put into the order of the other's.

Hidden units carry no names, see `tombola.analysis.units`: two tickets that share few connections may be the same ticket
with its units in another order. Units are matched by weights or by activations, both of Ainsworth et al. (Git Re-Basin,
ICLR 2023, arXiv 2209.04836). Adnan et al. (arXiv 2505.05143) train a mask that was matched to another initialisation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt
import polars as pl
import scipy  # loads scipy.optimize when it is first used
import torch
from scipy import special
from torch import Tensor, nn

from tombola.analysis import overlap
from tombola.analysis.defaults import DRAWS
from tombola.analysis.gather import ALL, NO_PAIRS, PRUNABLE, SEEDS, after, choose_levels, pairs
from tombola.analysis.networks import Copies
from tombola.analysis.units import Axis, Orders, Units, find_units
from tombola.errors import UserError, did_you_mean
from tombola.lottery.ticket import Ticket
from tombola.pruning.mask import Mask
from tombola.streams import ambient, generator
from tombola.study.chains import select_chains
from tombola.study.planner import Planner
from tombola.study.tickets import Tickets
from tombola.threads import check_stopped, map_in_threads
from tombola.training.batches import normalisation
from tombola.training.weights import State

By: TypeAlias = Literal["weights", "activations"]
"""By what units are matched."""

EXAMPLES = 256
"""The number of test examples whose activations are compared."""

_AT_ONCE = 64
_SWEEPS = 100  # looks at each group; about ten are enough
_GAIN = 1e-6  # by which the sum of products has to grow, relative: more than its rounding
_TOLERANCE = 1e-6  # of the outputs of the permuted network, relative to the largest, in float64


def of_study(
    tickets: Tickets,
    importances: Sequence[str] | None = None,
    levels: Collection[int] | None = None,
    by: By = "weights",
    draws: int = DRAWS,
) -> pl.DataFrame:
    """Return the overlap of each two tickets, as they are and after matching their hidden units.

    These columns come before those of `of_pair`:

    - level, seed: of the tickets; seed is null if they have different seeds.
    - kind: what differs between the tickets: "importances", "data order" (the noise floor) or "seeds" (tickets of one
      importance from different initialisations; they are called `l1, seed 0`).
    - by: what the units are matched by.
    - tickets: names of the two. The units of the second are put into the order of the first's.

    Units are matched in the trained networks, whose pruned weights are 0. Each permuted network is evaluated, in
    float64, and has to give the same outputs.

    Args:
        tickets: tickets of the study.
        importances: the importances to compare; by default all. One is enough where the study has several seeds.
        levels: the levels; by default the last that all have.
        by: "weights" or "activations".
        draws: the number of pairs of random tickets that are matched for each pair of tickets, 1 or more.

    Raises:
        UserError: if importances or levels are not in the study, if the units of the network cannot be matched, if a
            training diverged, or if there are no two tickets to compare.
        NothingStoredError: if they are not stored yet.
    """
    if by not in get_args(By):
        raise UserError(f"by: expected weights or activations, got {by!r}; {did_you_mean(str(by), get_args(By))}")
    if draws < 1:
        raise UserError(f"draws: expected 1 or more, got {draws}")
    chains = select_chains(tickets.study, importances)
    wanted = choose_levels(tickets, chains, levels)
    network = _Network(tickets.planner)

    def compare(found: tuple[dict[str, Any], tuple[Ticket, Ticket]]) -> pl.DataFrame:
        where, (one, other) = found
        names = where.pop("tickets")
        table = network.compare(one, other, by, draws, names)
        return after(table.select(pl.Series("tickets", [names] * len(table)), pl.all()), **where, by=by)

    tables = map_in_threads(compare, pairs(tickets, importances, wanted))
    if not tables:
        raise UserError(f"there are no two tickets to match: {NO_PAIRS}")
    return pl.concat([table.with_columns(pl.col("seed").cast(pl.Int64)) for table in tables])


def of_pair(
    masks: tuple[Mask, Mask],
    orders: Orders,
    units: Units,
    chance: Sequence[tuple[tuple[Mask, Mask], Orders]] = (),
    kept_dense: Collection[str] = (),
) -> pl.DataFrame:
    """Return the overlap of two masks, as they are and with the units of the second in another order.

    One row for each layer and total, with the columns

    - layer, connections: as in `tombola.analysis.overlap.of_masks`. alive: connections alive in a mask (mean of both).
    - shared, jaccard: connections alive in both masks as they are, and shared / alive in any, in 0..1.
    - layers_expected, layers_jaccard: what chance gives without matching.
    - matched_shared, matched_jaccard: the same after matching.
    - chance_shared, chance_jaccard, chance_sd: what chance gives after matching: the mean of pairs of random tickets
      that are matched in the same way, and the standard deviation (n - 1) of their Jaccard index; null without draws,
      or with one. Matching looks for weights that coincide, so it raises the overlap of random tickets, too.
    - moved: the share of all units that change their place, the same in every row.

    Args:
        masks: the two masks.
        orders: the orders of the second's units.
        units: of the network.
        chance: masks and orders of random tickets, see `shuffle`.
        kept_dense: the layers that are counted and never pruned, by parameter name.

    >>> import torch
    >>> units = find_units(nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)), (1,))
    >>> a = Mask.from_tensors({"0.weight": torch.tensor([[1], [0]]) > 0, "2.weight": torch.tensor([[1, 0]]) > 0})
    >>> b = Mask.from_tensors({"0.weight": torch.tensor([[0], [1]]) > 0, "2.weight": torch.tensor([[0, 1]]) > 0})
    >>> of_pair((a, b), {0: np.array([1, 0])}, units)["jaccard", "matched_jaccard"].row(-1)
    (0.0, 1.0)
    """

    def compare(one: Mask, other: Mask, order: Orders) -> pl.DataFrame:
        permuted = Mask.from_tensors(units.permute({name: other[name] for name in other}, order))
        return overlap.of_masks({"one": one, "other": permuted}, kept_dense)

    columns = ("layer", "connections", "alive", "shared", "jaccard", "layers_expected", "layers_jaccard")
    raw, matched = compare(*masks, {}), compare(*masks, orders)
    drawn = [compare(*random, order) for random, order in chance]
    shared = _stack(each["shared"] for each in drawn)
    jaccard = _stack(each["jaccard"] for each in drawn)
    total = sum(units.sizes.values())
    moved = sum(int((order != np.arange(len(order))).sum()) for order in orders.values())
    return (
        raw.select(columns)
        .with_columns(
            matched["shared"].alias("matched_shared"),
            matched["jaccard"].alias("matched_jaccard"),
            pl.Series("chance_shared", shared.mean(0) if len(drawn) else [None] * len(raw), pl.Float64),
            pl.Series("chance_jaccard", jaccard.mean(0) if len(drawn) else [None] * len(raw), pl.Float64),
            pl.Series("chance_sd", jaccard.std(0, ddof=1) if len(drawn) > 1 else [None] * len(raw), pl.Float64),
            draws=pl.lit(len(drawn)).cast(pl.Int64),
            moved=pl.lit(moved / total if total else 0.0),
        )
        .fill_nan(None)
    )


def summarise(table: pl.DataFrame, *by: str) -> pl.DataFrame:
    """Return the means over seeds of a table of `of_study`, over all layers: one row for each value of `by`.

    Layers that are kept dense are left out, because they have the same connections in every ticket. The columns, after
    those of `by`: pairs (how many were averaged), the means of jaccard, layers_jaccard, matched_jaccard,
    chance_jaccard, chance_sd and moved, and

    - chance_low, chance_high: the range in which the mean of matched_jaccard lies in 95 % of cases if tickets are like
      random ones; null if fewer than two pairs of random tickets were drawn for each pair. For P pairs with n draws
      each, of standard deviations s, it is chance_jaccard -+ t sqrt((1 + 1 / n) sum(s^2)) / P, cut off at 0 and 1,
      where t is the 97.5 % point of Student's t with P (n - 1) degrees of freedom. Pairs are taken as independent, and
      as equally variable.

    Args:
        table: of `of_study`, or a part of it.
        by: the columns whose values are kept apart, of level, kind, by and tickets (of two seeds: their importance); by
            default these four.
    """
    total = PRUNABLE if (table["layer"] == PRUNABLE).any() else ALL
    together = pl.col("tickets").list.join(" & ")
    of_one = pl.col("tickets").list.first().str.replace(r", seed -?\d+$", "")
    figures = ("jaccard", "layers_jaccard", "matched_jaccard", "chance_jaccard", "chance_sd", "moved")
    names, draws = by or ("level", "kind", "by", "tickets"), pl.col("draws")
    means = (
        table.filter(pl.col("layer") == total)
        .with_columns(tickets=pl.when(pl.col("kind") == SEEDS).then(of_one).otherwise(together))
        .group_by(names, maintain_order=True)
        .agg(
            pl.len().cast(pl.Int64).alias("pairs"),
            pl.col(*figures).mean(),
            ((1 + 1 / draws) * pl.col("chance_sd") ** 2).sum().sqrt().alias("spread") / pl.len(),
            (draws - 1).sum().alias("freedom"),
        )
    )
    student = pl.lit(pl.Series(special.stdtrit(means["freedom"].to_numpy(), 0.975)))
    half = pl.when(pl.col("chance_sd").is_not_null()).then(student * pl.col("spread"))
    return (
        means.with_columns(
            chance_low=(pl.col("chance_jaccard") - half).clip(0.0, 1.0),
            chance_high=(pl.col("chance_jaccard") + half).clip(0.0, 1.0),
        )
        .drop("spread", "freedom")
        .sort([name for name in names if name in ("level", "kind")], maintain_order=True)
    )


def _stack(columns: Iterator[pl.Series]) -> npt.NDArray[np.float64]:
    return np.array([column.cast(pl.Float64).to_numpy() for column in columns])


def match_weights(units: Units, first: State, second: State) -> dict[int, npt.NDArray[np.int64]]:
    """Return the order of the second network's units that brings its weights nearest to the first's.

    It maximises the sum over all parameters of <w_1, P(w_2)>, which minimises the squared distance, by coordinate
    ascent: one group of units after another is assigned optimally, the others given, until nothing changes (Git
    Re-Basin, algorithm 1). It begins with the units as they are, and changes a group only if the sum grows, so it ends;
    the optimum is local.

    Args:
        units: of the network.
        first, second: the parameters of two networks by name; others than those of `units.axes` have no influence.

    >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> one = {"0.weight": torch.tensor([[1.0], [2.0]]), "2.weight": torch.tensor([[3.0, 4.0]])}
    >>> other = {"0.weight": torch.tensor([[2.0], [1.0]]), "2.weight": torch.tensor([[4.0, 3.0]])}
    >>> match_weights(find_units(model, (1,)), one, other)
    {0: array([1, 0])}
    """
    shared = [name for name in units.axes if name in first and name in second and first[name].is_floating_point()]
    one, other = ({name: state[name].float() for name in shared} for state in (first, second))
    orders = {group: np.arange(size) for group, size in units.sizes.items()}
    members = {
        group: [name for name in shared if any(axis and axis.group == group for axis in units.axes[name])]
        for group in orders
    }
    waiting = dict.fromkeys(orders)  # groups that may change, in the order in which they are looked at
    for _ in range(_SWEEPS * len(orders)):
        if not waiting:
            break
        check_stopped()
        group = next(iter(waiting))
        del waiting[group]
        beside = {each: order for each, order in orders.items() if each != group}
        found = _assign(units, group, {name: one[name] for name in members[group]}, other, beside, orders[group])
        if found is not None:
            orders[group] = found
            waiting |= dict.fromkeys(axis.group for name in members[group] for axis in units.axes[name] if axis)
    return orders


def _assign(
    units: Units, group: int, first: State, second: State, others: Orders, now: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64] | None:
    """Return the best order of one group's units; None if it is no better than the present one."""
    size = units.sizes[group]
    gains = np.zeros((size, size))
    several = False
    for name, weights in first.items():
        own = [number for number, axis in enumerate(units.axes[name]) if axis is not None and axis.group == group]
        several = several or len(own) > 1
        for number in own:  # of a tensor with several such axes, the others stay as they are now
            beside = _reorder(second[name], units.axes[name], {**others, group: now}, number)
            gains += (_rows(weights, number, size) @ _rows(beside, number, size).T).numpy()
    found = scipy.optimize.linear_sum_assignment(gains, maximize=True)[1]
    if several:  # the sum of products is quadratic in the order, and has to be computed

        def total(order: npt.NDArray[np.int64]) -> float:
            moved = units.permute({name: second[name] for name in first}, {**others, group: order})
            return sum(float((weights * moved[name]).sum()) for name, weights in first.items())

        before, best = total(now), total(found)
    else:
        before, best = gains[np.arange(size), now].sum(), gains[np.arange(size), found].sum()
    return found if best - before > _GAIN * abs(best) else None


def _reorder(tensor: Tensor, axes: Sequence[Axis | None], orders: Orders, but: int) -> Tensor:
    """Return a tensor with the units of all axes but one in another order."""
    kept = tuple(None if number == but else axis for number, axis in enumerate(axes))
    return Units({}, {"": kept}, {}).permute({"": tensor}, orders)[""]


def _rows(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Return a tensor as one row for each unit along an axis."""
    return tensor.movedim(axis, 0).reshape(size, -1)


def match_activations(
    units: Units, first: nn.Module, second: nn.Module, inputs: Tensor
) -> dict[int, npt.NDArray[np.int64]]:
    """Return the order of the second network's units that brings its activations nearest to the first's.

    For each group it maximises the sum of <z_1, P(z_2)> over examples and positions, where z are the values that enter
    the linear and convolution layers (Git Re-Basin, section 3.1). Groups do not depend on each other.

    Args:
        units: of both networks.
        first, second: the networks, which are put into evaluation mode.
        inputs: shape (n, ...), as the networks take them.

    >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> match_activations(find_units(model, (1,)), model, model, torch.ones(4, 1))
    {0: array([0, 1])}
    """
    gains = {group: np.zeros((size, size)) for group, size in units.sizes.items()}
    with torch.inference_mode():
        for part in torch.split(inputs, _AT_ONCE):
            check_stopped()
            entered = [_watch(units, network, part) for network in (first, second)]
            for name, (axis, _) in units.inputs.items():
                for one, other in zip(*(each[name] for each in entered), strict=True):
                    gains[axis.group] += (one @ other.T).double().numpy()
    orders = {}
    for group, gain in gains.items():
        same = np.arange(len(gain))
        found = scipy.optimize.linear_sum_assignment(gain, maximize=True)[1]
        better = gain[same, found].sum() > gain[same, same].sum()
        orders[group] = found if better else same
    return orders


def _watch(units: Units, network: nn.Module, inputs: Tensor) -> dict[str, list[Tensor]]:
    """Return the values that enter each layer at each of its calls, one row for each unit."""
    found: dict[str, list[Tensor]] = {name: [] for name in units.inputs}
    hooks = []
    for name, (axis, number) in units.inputs.items():

        def note(
            _: nn.Module, given: tuple[Tensor, ...], name: str = name, axis: Axis = axis, number: int = number
        ) -> None:
            found[name].append(_rows(given[0], number, units.sizes[axis.group]).clone())

        hooks.append(network.get_submodule(name).register_forward_pre_hook(note))
    try:
        network.eval()(inputs.clone())  # the first layer of a model may change its inputs in place
    finally:
        for hook in hooks:
            hook.remove()
    return found


def shuffle(state: State, mask: Mask, seed: int, *names: str | int) -> tuple[State, Mask]:
    """Return a random ticket with the same alive connections in each layer, and the same values of their weights.

    In each layer of the mask, all connections change places at random, alive and pruned ones, each with its weight.

    Args:
        state: the network's state.
        mask: its mask.
        seed, names: the identity of the random stream, see `tombola.streams`.

    >>> mask = Mask.from_tensors({"w": torch.tensor([True, False, False])})
    >>> state, other = shuffle({"w": torch.tensor([5.0, 0.0, 0.0])}, mask, 0)
    >>> state["w"].sum(), other.counts, bool((state["w"] > 0).equal(other["w"]))
    (tensor(5.), {'w': 1}, True)
    """
    shuffled, alive = dict(state), {}
    for name in mask:
        order = torch.randperm(mask.sizes[name], generator=generator(seed, "matching", *names, name))
        shuffled[name] = state[name].flatten()[order].view_as(state[name])
        alive[name] = mask[name].flatten()[order].view_as(mask[name])
    return shuffled, Mask.from_tensors(alive)


class _Network:
    """The network of a study, into whose copies states are loaded, and its units."""

    def __init__(self, planner: Planner) -> None:
        data = planner.problem.data
        if not isinstance(data.test_inputs, Tensor) or not data.test_inputs.is_floating_point() | data.has_images:
            raise UserError(
                f"units can be matched for networks with one input of floating point, or images; the inputs of "
                f"{data.name!r} are others; its tickets can be compared without matching, by their overlap"
            )
        with ambient(0):
            model = planner.problem.build()
        self._units = find_units(model, data.input_shape)
        self._name = type(model).__name__
        if not self._units.sizes:
            raise UserError(
                f"the units of {self._name} cannot be matched: it has no hidden unit that may change its place; "
                "its tickets can be compared without matching, by their overlap"
            )
        self._parameters = {name for name, _ in model.named_parameters()}
        self._copies = Copies(model)
        self._inputs = cast(Tensor, normalisation(data)(data.test_inputs[:EXAMPLES].clone()))
        self._kept_dense = planner.kept_dense

    def compare(self, one: Ticket, other: Ticket, by: By, draws: int, names: Sequence[str]) -> pl.DataFrame:
        """Return the table of `of_pair` of two tickets, whose names decide on the random ones.

        Raises:
            UserError: if one of them diverged, or if a network computes something else with its units in another order.
        """
        for name, ticket in zip(names, (one, other), strict=True):
            if ticket.trained is not None and ticket.trained.history.diverged_at is not None:
                raise UserError(
                    f"the units of {name} cannot be matched: its training of level {ticket.level} diverged; choose "
                    "other importances or levels"
                )
        states, masks = (one.load_trained(), other.load_trained()), (one.mask, other.mask)
        orders = self._match(states, by)
        self._check(states[1], orders)

        def match_random(draw: int) -> tuple[tuple[Mask, Mask], Orders]:
            (first, a), (second, b) = (
                shuffle(state, mask, draw, *names, number)
                for number, (state, mask) in enumerate(zip(states, masks, strict=True))
            )
            return (a, b), self._match((first, second), by)

        # Draws are made side by side if this is the only pair; several pairs are.
        chance = map_in_threads(match_random, range(draws))
        return of_pair(masks, orders, self._units, chance, self._kept_dense)

    def _match(self, states: tuple[State, State], by: By) -> dict[int, npt.NDArray[np.int64]]:
        if by == "weights":
            return match_weights(self._units, *({n: state[n] for n in self._parameters} for state in states))
        with self._copies.lending() as one, self._copies.lending() as other:
            for model, state in zip((one, other), states, strict=True):
                model.float().load_state_dict(state)
            return match_activations(self._units, one, other, self._inputs)

    def _check(self, state: State, orders: Mapping[int, npt.NDArray[np.int64]]) -> None:
        """Check that a network computes the same when its units are in another order.

        Raises:
            UserError: if it does not.
        """
        outputs = []
        for loaded in (state, self._units.permute(state, orders)):
            with self._copies.lending() as model:
                model.load_state_dict(loaded)
                with torch.inference_mode():
                    outputs.append(model.double().eval()(self._inputs[:8].double()))
                model.float()
        expected, found = outputs
        if not torch.allclose(expected, found, rtol=0, atol=_TOLERANCE * float(expected.abs().max())):
            raise UserError(
                f"the units of {self._name} cannot be matched: with its units in another order it "
                "computes something else; its tickets can be compared without matching, by their overlap"
            )
