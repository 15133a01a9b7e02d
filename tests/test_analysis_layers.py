"""Layers and paths: by hand, by construction, and by another way of following paths."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import NoReturn

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from processes import LONG
from tombola import Mask, UserError
from tombola.analysis import layers
from tombola.analysis.ends import Ends, find_ends
from tombola.analysis.gather import after
from tombola.analysis.paths import Paths


def apply_mask(model: nn.Module, **zeros: Tensor) -> Mask:
    """The dense mask with these layers in place of its own."""
    dense = Mask.ones_like(model)
    return Mask.from_tensors({name: zeros.get(name.replace(".", "_"), tensor).bool() for name, tensor in dense.items()})


def test_layers_by_hand() -> None:
    mask = Mask.from_tensors({"a": torch.tensor([[1, 1, 0, 0]]).bool(), "b": torch.tensor([1, 0, 0, 0, 0, 0]).bool()})
    table = layers.of_mask(mask)
    assert table["layer"].to_list() == ["a", "b", "(all)"]
    assert table["connections"].to_list() == [4, 6, 10]
    assert table["alive"].to_list() == [2, 1, 3]
    assert table["density"].to_list() == pytest.approx([0.5, 1 / 6, 0.3])
    assert table["ahead"].to_list() == pytest.approx([-0.2, 0.3 - 1 / 6, 0.0])
    assert table["collapsed"].to_list() == [False] * 3
    assert table["effective"].to_list() == [None] * 3


def test_seeds_in_which_a_layer_collapsed_are_counted() -> None:
    table = layers.of_mask(Mask.from_tensors({"a": torch.zeros(2).bool()}))
    seeds = pl.concat([after(table, level=1, importance="l1", seed=seed) for seed in (0, 1)])
    assert layers.summarise(seeds)["collapsed"].to_list() == [2, 2]


def test_a_dead_end_and_a_source_without_input_are_on_no_path() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    first = torch.tensor([[1, 0], [0, 0], [1, 1]])  # hidden unit 1 has no input
    second = torch.tensor([[1, 1, 0]])  # hidden unit 2 leads nowhere
    mask = apply_mask(model, **{"0_weight": first, "2_weight": second})
    effective = Paths(model, torch.ones(1, 2)).effective(mask)
    assert effective["0.weight"].tolist() == [[True, False], [False, False], [False, False]]
    assert effective["2.weight"].tolist() == [[True, False, False]]
    table = layers.of_mask(mask, Paths(model, torch.ones(1, 2)))
    assert table["effective"].to_list() == [1, 1, 2]
    assert table["effective_density"].to_list() == pytest.approx([1 / 6, 1 / 3, 2 / 9])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 100_000), st.lists(st.integers(1, 5), min_size=3, max_size=5))
def test_paths_of_a_multilayer_perceptron_one_by_one(seed: int, widths: list[int]) -> None:
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    draw = torch.Generator().manual_seed(seed)
    mask = Mask.from_tensors({n: torch.rand(t.shape, generator=draw) < 0.4 for n, t in Mask.ones_like(model).items()})
    matrices = [mask[f"{i}.weight"].tolist() for i in range(len(widths) - 1)]
    on_path: list[set[tuple[int, int]]] = [set() for _ in matrices]

    def follow(layer: int, unit: int, taken: list[tuple[int, int]]) -> None:
        if layer == len(matrices):
            for index, connection in enumerate(taken):
                on_path[index].add(connection)
            return
        for following in range(widths[layer + 1]):
            if matrices[layer][following][unit]:
                follow(layer + 1, following, [*taken, (following, unit)])

    for unit in range(widths[0]):
        follow(0, unit, [])
    effective = Paths(model, torch.ones(1, widths[0])).effective(mask)
    for index, expected in enumerate(on_path):
        assert {tuple(pair) for pair in effective[f"{index}.weight"].nonzero().tolist()} == expected


class Residual(nn.Module):
    def __init__(self, pooled: str = "max") -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.inner = nn.Conv2d(2, 2, 3, padding=1)
        self.short = nn.Conv2d(2, 2, 1)
        self.fc = nn.Linear(2, 3)
        self.pooled = pooled

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.relu(self.norm(self.stem(inputs)))
        hidden = torch.relu(self.inner(hidden) + self.short(hidden))
        if self.pooled == "max":
            hidden = functional.max_pool2d(hidden, 2)
        hidden = functional.adaptive_avg_pool2d(hidden, 1).flatten(1)
        logits: Tensor = self.fc(hidden)
        return logits


def test_a_shortcut_keeps_paths_alive_where_the_inner_layer_has_collapsed() -> None:
    model = Residual()
    paths = Paths(model, torch.ones(1, 1, 4, 4))
    dense = Mask.ones_like(model)
    assert paths.effective(dense) == dense
    inner_gone = apply_mask(model, inner_weight=torch.zeros(2, 2, 3, 3))
    assert paths.effective(inner_gone) == inner_gone
    both_gone = apply_mask(model, inner_weight=torch.zeros(2, 2, 3, 3), short_weight=torch.zeros(2, 2, 1, 1))
    assert paths.effective(both_gone).alive == 0


def test_a_channel_that_only_the_shortcut_reads_counts_through_it_alone() -> None:
    model = Residual()
    short = torch.zeros(2, 2, 1, 1)
    short[0, 1] = 1
    mask = apply_mask(model, inner_weight=torch.zeros(2, 2, 3, 3), short_weight=short)
    effective = Paths(model, torch.ones(1, 1, 4, 4)).effective(mask)
    assert effective.counts == {
        "stem.weight": 9,
        "inner.weight": 0,
        "short.weight": 1,
        "fc.weight": 3,
    }
    assert effective["stem.weight"][1].all()


def test_weights_that_only_ever_meet_padding_are_on_no_path() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(1, 2))
    effective = Paths(model, torch.ones(1, 1, 1, 1)).effective(Mask.ones_like(model))
    assert effective["0.weight"].sum() == 1
    assert effective["0.weight"][0, 0, 1, 1]


def test_every_place_of_a_pooling_window_counts() -> None:
    class OnePixel(nn.Module):
        """Its first layer's outputs are pooled by the largest, which every one of them may be."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.pool = nn.MaxPool2d(2)
            self.last = nn.Linear(1, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            pooled = self.pool(self.first(inputs).view(-1, 1, 2, 2)).flatten(1)
            logits: Tensor = self.last(pooled)
            return logits

    model = OnePixel()
    assert Paths(model, torch.ones(1, 4)).effective(Mask.ones_like(model)) == Mask.ones_like(model)


def test_layers_that_are_never_pruned_are_whole() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    mask = Mask.from_tensors({"0.weight": torch.tensor([[True, False], [False, False]])})
    assert Paths(model, torch.ones(1, 2)).effective(mask) == mask


def test_the_papers_networks_can_be_followed() -> None:
    from tombola import models

    model = models.MODELS["resnet20"]()
    paths = Paths(model, torch.ones(1, 3, 32, 32))
    dense = Mask.ones_like(model)
    assert paths.effective(dense).alive == dense.alive


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.sum() > 0 else self.fc(inputs)


class Gpt(nn.Module):
    """Tokens, places made in forward, causal attention by hand and by torch, a gate, and a head that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 4), nn.Parameter(torch.randn(5, 4))
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.gate, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.tokens(ids) + self.places[torch.arange(length)]
        q, k, v = self.qkv(self.norm(x)).split(4, dim=-1)
        masked = torch.ones(length, length).triu(1).bool()
        weights = (q @ k.transpose(1, 2) / 2).masked_fill(masked, -torch.inf).softmax(-1)
        x = x + self.out(weights @ v)
        y: Tensor = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=masked, need_weights=False)[0]
        x = functional.scaled_dot_product_attention(x, x, x) * torch.sigmoid(self.gate(x))
        logits: Tensor = self.head(x)
        return logits.transpose(1, 2)


def test_paths_of_a_model_with_attention() -> None:
    model = Gpt()
    dense = Mask.ones_like(model, prune=["default", "places"])
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    paths = Paths(model, ids, dense)
    whole = paths.effective(dense)
    assert whole == dense
    parts = {name: dense[name].clone() for name in dense}
    parts["qkv.weight"][8:] = False  # no value: what is left goes from queries and keys to the output
    parts["out.weight"][:, 0] = False
    found = paths.effective(Mask.from_tensors(parts))
    assert found["qkv.weight"].tolist() == [[True] * 4] * 8 + [[False] * 4] * 4
    assert found["out.weight"].tolist() == [[False, True, True, True]] * 4
    parts["out.weight"][:] = False
    found = paths.effective(Mask.from_tensors(parts))
    assert found.counts == {**dense.counts, "qkv.weight": 0, "out.weight": 0}
    parts["attention.in_proj_weight"][:] = False
    parts["attention.out_proj.weight"][1] = False
    assert not paths.effective(Mask.from_tensors(parts))["attention.out_proj.weight"].any()
    parts["tokens.weight"][:, 2] = False
    found = paths.effective(Mask.from_tensors(parts))
    assert found["tokens.weight"].sum() == 21
    assert found["places"].all(), "a gate passes on what reaches its other factor"


class LowRank(nn.Module):
    """A weight that is the sum of a frozen one and a product of two others, and one used in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.up, self.down = nn.Linear(3, 3), nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(1, 3))
        self.both = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.base.weight + self.up @ self.down)
        return functional.linear(functional.linear(x, self.both[:2]), self.both[2:, :2].T) @ self.both[:1, :2].T


def test_paths_along_weights_that_are_computed() -> None:
    parts = {
        "base.weight": torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 0]]),
        "up": torch.tensor([[0], [1], [0]]),
        "down": torch.tensor([[0, 0, 1]]),
        "both": torch.tensor([[1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]]),
    }
    mask = Mask.from_tensors({name: part.bool() for name, part in parts.items()})
    found = Paths(LowRank(), torch.ones(1, 3), mask).effective(mask)
    assert {name: found[name].int().tolist() for name in found} == {
        "base.weight": [[1, 0, 0], [0, 0, 0], [0, 0, 0]],
        "up": [[0], [1], [0]],
        "down": [[0, 0, 1]],
        "both": [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]],
    }


class Normed(nn.Module):
    """A weight that is divided by its norm, and an input that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        weight = self.last.weight
        return functional.linear(self.first(x), weight / weight.norm(dim=1, keepdim=True))


def test_a_weight_divided_by_its_norm_stays_pruned() -> None:
    model = Normed()
    mask = apply_mask(model, first_weight=torch.tensor([[1, 0], [0, 0]]), last_weight=torch.tensor([[0, 1]]))
    assert not any(alive.any() for alive in Paths(model, torch.ones(1, 2)).effective(mask).values())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.last = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        return self.last(x + self.inner(x))


def test_paths_begin_at_an_embedding_that_is_not_pruned() -> None:
    model = Tokens()
    mask = apply_mask(model, inner_weight=torch.zeros(3, 3))
    assert Paths(model, torch.zeros(1, dtype=torch.int64)).effective(mask)["last.weight"].all()


class Sorting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.fc(inputs)
        return hidden.sort().values


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Branching(), "the paths of Branching cannot be followed: it calls 'gt'"),
        (Sorting(), "the paths of Sorting cannot be followed: it calls 'sort'"),
    ],
)
def test_a_clear_word_where_paths_cannot_be_followed(model: nn.Module, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Paths(model, torch.ones(1, 2))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(2))
        self.fc1, self.fc2 = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.fc2(self.fc1(inputs * self.scale))
        return outputs


def test_inputs_that_are_scaled_by_a_constant_are_still_inputs() -> None:
    found = find_ends(Scaled(), torch.ones(1, 2), ["fc1.weight", "fc2.weight"])
    assert found == Ends(("fc1.weight",), ("fc2.weight",), "")


class Gated(Scaled):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.fc2(self.fc1(inputs) * inputs)
        return outputs


def test_a_layer_behind_a_product_of_inputs_and_a_layer_does_not_touch_the_inputs() -> None:
    model = Gated()
    model.fc1, model.fc2 = nn.Linear(2, 2), nn.Linear(2, 1)
    assert find_ends(model, torch.ones(1, 2), ["fc1.weight", "fc2.weight"]).inputs == ("fc1.weight",)


class Placed(Scaled):
    """Adds weights to its inputs, which it changes, and to its outputs; keeps hidden units by the signs of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
        self.fc1, self.fc2 = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs -= 0.5
        hidden = torch.where(inputs > 0, self.fc1(inputs + self.places), 0.0)
        outputs: torch.Tensor = self.fc2(hidden) + self.shift
        return outputs


def test_a_weight_that_is_added_does_not_stop_the_inputs_and_a_comparison_takes_none_on() -> None:
    inputs = torch.ones(1, 2)
    found = find_ends(Placed(), inputs, ["places", "shift", "fc1.weight", "fc2.weight"])
    assert found == Ends(("places", "fc1.weight"), ("shift", "fc2.weight"))
    assert inputs.eq(1).all(), "the inputs are a copy"


def test_ends_are_found_without_the_compiler_of_torch() -> None:
    code = (
        "import sys, torch; from tombola.analysis.ends import find_ends\n"
        "print(find_ends(torch.nn.Linear(2, 1), torch.ones(1, 2), ['weight']).fault, 'torch._dynamo' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LONG).stdout
    assert said == " False\n"


def test_compiled_layers_are_followed_as_they_are_written() -> None:
    def refuse(graph: object, examples: object) -> NoReturn:
        raise AssertionError("compiled")

    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model.compile(backend=refuse)
    assert find_ends(model, torch.ones(1, 2), ["0.weight", "1.weight"]) == Ends(("0.weight",), ("1.weight",))
