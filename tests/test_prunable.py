"""Which weights are pruned: layers of every kind, patterns, shared weights, masked starts; what density counts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Lock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import weight_norm

from tombola import (
    Mask,
    Planner,
    Recipe,
    Store,
    Study,
    Task,
    Ticket,
    UserError,
    Weights,
    find_tickets,
    interchange,
    layers,
    load_problem,
    loops,
    prunable,
    prune,
    read_ticket,
    reinit,
    run,
    train,
)
from tombola.analysis.ends import Ends, find_ends
from tombola.analysis.paths import Paths
from tombola.cli.run import print_coverage
from tombola.datasets.dataset import Dataset
from tombola.importance import IMPORTANCES, find, magnitude
from tombola.lottery import ticket_file
from tombola.lottery.ticket_file import Content
from tombola.pruning.coverage import cover
from tombola.pruning.eligible import list_shared, resolve_layers
from tombola.pruning.mask import resolve_kept_dense
from tombola.pruning.start import check_start, check_step
from tombola.reporting import tables
from tombola.study.reinitialisation import plan
from tombola.study.tickets import Tickets
from tombola.training.history import History
from tombola.training.replaceable import OwnLayersWarning, choose_layers, find_fault, read_kernels


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Reader(nn.Module):
    """An LSTM classifier of sequences of four steps with three numbers each."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(3, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(self.rnn(x)[0][:, -1]))
        return logits


class Gpt(nn.Module):
    """A transformer over four tokens of five kinds, whose head is the embedding, applied to one-hot inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 8)
        self.wpe = nn.Parameter(0.1 * torch.randn(4, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.wte(x.argmax(-1)) + self.wpe
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        logits: Tensor = self.head(self.block(embedded, src_mask=mask, is_causal=True)[:, -1])
        return logits


class Vit(nn.Module):
    """A vision transformer over the four quarters of an image of 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, 2)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.norm(torch.cat([self.token.expand(len(x), -1, -1), patches], 1))
        logits: Tensor = self.head((tokens + self.attention(tokens, tokens, tokens)[0])[:, 0])
        return logits


NETWORKS = {"lstm": (Reader, (4, 3)), "gpt": (Gpt, (4, 5)), "vit": (Vit, (1, 4, 4))}
EVERYTHING = ["*"]


def build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[name][0]()


def examples(name: str) -> Dataset:
    inputs = draw(24, *NETWORKS[name][1])
    labels = (inputs.flatten(1).sum(1) > 0).long()
    return Dataset("examples", inputs[:16], labels[:16], inputs[16:], labels[16:], ("no", "yes"))


# Which weights.


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.GRU(2, 3, 2, bidirectional=True), [
            "weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse",
            "weight_ih_l1", "weight_hh_l1", "weight_ih_l1_reverse", "weight_hh_l1_reverse",
        ]),
        (nn.LSTM(2, 3, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (nn.Sequential(nn.LSTMCell(2, 3), nn.RNN(2, 2)),
         ["0.weight_ih", "0.weight_hh", "1.weight_ih_l0", "1.weight_hh_l0"]),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
         ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]),
        (nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Bilinear(2, 3, 4)), ["0.weight", "1.weight"]),
        (Gpt(), ["wte.weight", "block.self_attn.in_proj_weight", "block.self_attn.out_proj.weight",
                 "block.linear1.weight", "block.linear2.weight"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_the_weight_matrices_of_layers_are_prunable(model: nn.Module, expected: list[str]) -> None:
    assert list(prunable(model)) == expected
    assert list(Mask.ones_like(model)) == expected


def test_a_weight_that_a_parametrization_gives_is_not_prunable_even_if_it_is_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert list(prunable(model)) == ["1.weight"]


def test_the_conv1d_of_huggingface_is_recognised_without_its_library() -> None:
    kind = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
    layer, other = kind(), type("Conv1D", (nn.Module,), {})()
    for each in (layer, other):
        each.weight, each.bias = nn.Parameter(draw(2, 3)), nn.Parameter(draw(3))
    assert list(prunable(nn.Sequential(layer, other))) == ["0.weight"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.weight", "!*norm*"], ["fc.weight"]),
        (["!fc"], ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        (["default", "norm"], ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "norm.weight", "fc.weight"]),
        (["rnn.*", "!rnn.bias*", "rnn.bias_hh_l0"], ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_hh_l0"]),
        (["*", "!*.weight", "norm"],
         ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0",
          "norm.weight", "norm.bias", "fc.bias"]),
    ],
)  # fmt: skip
def test_patterns_choose_in_order(patterns: list[str], expected: list[str]) -> None:
    assert list(prunable(Reader(), patterns)) == expected


def test_a_shared_weight_is_chosen_by_any_of_its_names_and_counted_once() -> None:
    assert list(prunable(Gpt(), ["head"])) == list(prunable(Gpt(), ["wte.*"])) == ["wte.weight"]
    assert "wte.weight" not in prunable(Gpt(), ["!head.weight"])
    assert cover(Gpt(), Mask.ones_like(Gpt())).total == sum(p.numel() for p in Gpt().parameters())


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        (["nothing.*"], "prune: 'nothing.*' is no parameter of the model; choose from "),
        (["!fcc"], "prune: 'fcc' is no parameter of the model; did you mean 'fc'?"),
        (["fc", "!fc"], "prune: 'fc', '!fc' leave no parameter of Reader to prune"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(patterns: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        Mask.ones_like(Reader(), prune=patterns)
    assert sentence in str(raised.value)


def test_layers_that_are_left_out_or_kept_dense_have_their_full_names() -> None:
    assert list(Mask.ones_like(Reader(), ["rnn.weight_hh_l0", "fc"])) == ["rnn.weight_ih_l0"]
    with pytest.raises(UserError, match="exclude: 'rnn' is no prunable layer"):
        Mask.ones_like(Reader(), ["rnn"])


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("lstm", Ends(("rnn.weight_ih_l0", "rnn.weight_hh_l0"), ("fc.weight",))),
        ("gpt", Ends(("wte.weight",), ("wte.weight",))),
        ("vit", Ends(("patches.weight",), ("head.weight",))),
    ],
)
def test_the_layers_at_the_ends_are_those_that_touch_inputs_and_outputs(name: str, ends: Ends) -> None:
    model, inputs = build(name), examples(name).test_inputs
    layers = tuple(prunable(model))
    assert find_ends(model, inputs, layers) == ends

    def hide(model: nn.Module, inputs: Tensor) -> Tensor:
        return torch.from_numpy(model(inputs).detach().numpy().copy())

    found = find_ends(model, inputs, layers, hide)  # type: ignore[arg-type]
    assert (found.inputs, found.outputs) == (ends.inputs, layers[-1:])
    assert found.fault == "No layer was found that touches the outputs: the last layer by order stands for it."


def test_skips_and_writes_into_a_part_of_a_tensor_are_followed() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)])

    def forward(model: Callable[..., Tensor], x: Tensor) -> Tensor:
        first, second, last = layers
        outputs = torch.zeros(len(x), 2)
        outputs[:] = last(second(first(x).relu()) + x * (x > 0))
        return outputs

    names = ["0.weight", "1.weight", "2.weight"]
    assert find_ends(layers, draw(2, 4), names, forward) == Ends(("0.weight", "2.weight"), ("2.weight",))  # type: ignore[arg-type]


class Padded(nn.Module):
    """Reads tokens and a mask of padding, and takes the mean over those that the mask leaves, beside a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.skip, self.head = nn.Embedding(5, 4), nn.Linear(1, 4), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        kept = (~padding).float().unsqueeze(-1) if padding.dtype == torch.bool else padding.unsqueeze(-1)
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=padding if padding.dtype == torch.bool else None)
        mean = (hidden * kept).sum(1) / kept.sum(1)
        return self.head(torch.cat([mean, self.skip(tokens[:, :1].float())], 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_that_are_inputs_make_no_input_layers(kind: torch.dtype) -> None:
    model, tokens = Padded(), torch.arange(6).reshape(2, 3) % 5
    padding = torch.tensor([[False, False, True], [False, False, False]])
    mask = padding if kind == torch.bool else (~padding).float()
    found = find_ends(model, (tokens, mask), tuple(prunable(model)))
    assert found == Ends(("embed.weight", "skip.weight"), ("head.weight",))


def test_a_network_that_fails_is_judged_by_order_and_the_error_is_named() -> None:
    model, names = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ("0.weight", "1.weight")
    found = find_ends(model, draw(2, 3), names)
    assert (found.inputs, found.outputs) == (("0.weight",), ("1.weight",))
    assert "cannot be followed (RuntimeError): its first and its last layer by order" in found.fault


# Rounds of pruning and trainings.


@pytest.mark.parametrize(
    ("importance", "selection"),
    [*((each, "global") for each in ("magnitude", "l1", "l2", "softmax", "min_max")), ("l1", "uniform"), ("l1", "erk")],
)
def test_weights_of_any_shape_are_pruned(importance: str, selection: str) -> None:
    model = nn.Sequential(nn.Bilinear(2, 3, 4), nn.Conv3d(2, 2, 2), nn.LayerNorm(5), nn.Embedding(4, 3))
    model.register_parameter("scale", nn.Parameter(draw(1)[0]))
    dense = Mask.ones_like(model, prune=EVERYTHING)
    assert () in dense.shapes.values()
    numbers = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=numbers) for name, shape in dense.shapes.items()}
    mask = prune(weights, dense, IMPORTANCES[importance], 0.5, selection=selection)
    assert mask.alive == dense.total - round(dense.total / 2)


@pytest.mark.parametrize("patterns", [[], EVERYTHING], ids=["default", "everything"])
@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_weights_stay_zero_under_all_names(name: str, patterns: list[str], tmp_path: Path) -> None:
    model = build(name)
    found = list(find_tickets(
        model, examples(name), Recipe(epochs=2, batch_size=8, optimizer="adamw", lr=0.01), magnitude,
        levels=1, fraction=0.6, prune=patterns, progress=False,
    ))  # fmt: skip
    ticket = found[1]
    ticket.save(tmp_path / "ticket", trained=True)
    again = Ticket.load(tmp_path / "ticket")
    assert again.shared == ticket.shared == ({"wte.weight": ("head.weight",)} if name == "gpt" else {})
    for each in (ticket, again):
        for state, trained in ((each.rewound, False), (each.load_trained(), True)):
            assert state.keys() == model.state_dict().keys()
            loaded, applied = copy.deepcopy(model), copy.deepcopy(model)
            loaded.load_state_dict(state)
            each.apply(applied, trained=trained)
            for one in (loaded, applied):
                assert interchange.from_zeros(one, list(ticket.mask)) == ticket.mask
            inputs = examples(name).test_inputs
            assert each.sparse(model, trained=trained)(inputs).allclose(loaded(inputs), atol=1e-5)
    assert found[0].trained is not None
    assert ticket.trained is not None
    assert ticket.trained.history.losses != found[0].trained.history.losses


@pytest.mark.parametrize("name", NETWORKS)
def test_a_mask_is_held_in_a_loop_and_goes_to_torch_and_back(name: str) -> None:
    model, data = build(name), examples(name)
    mask = loops.prune(model, Mask.ones_like(model), magnitude, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with loops.hold(model, mask, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train_inputs), data.train_labels).backward()
            optimizer.step()
    assert interchange.from_zeros(model) == mask
    expected = model(data.test_inputs)
    interchange.to_torch_prune(model, mask)
    assert interchange.from_torch_prune(model) == mask
    assert model(data.test_inputs).equal(expected)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("score", ["taylor", "snip", "grasp", "hessian", "synflow"])
def test_scores_of_the_network_rate_every_prunable_weight(score: str, name: str) -> None:
    model, data = build(name), examples(name)
    mask = loops.prune(
        model, Mask.ones_like(model), find(score), 0.5, loss=nn.functional.cross_entropy,
        batches=[(data.train_inputs, data.train_labels)],
    )  # fmt: skip
    assert mask.alive == mask.total - round(mask.total / 2)
    if score == "snip":
        assert mask == loops.prune(
            model, Mask.ones_like(model), find("taylor"), 0.5, loss=nn.functional.cross_entropy,
            batches=[(data.train_inputs, data.train_labels)],
        )  # fmt: skip


@pytest.mark.parametrize("score", ["fisher", "wanda"])
@pytest.mark.parametrize(
    ("name", "layer"), [("lstm", "rnn.weight_ih_l0"), ("gpt", "wte.weight"), ("vit", "attention.in_proj_weight")]
)
def test_scores_of_inputs_refuse_other_layers(score: str, name: str, layer: str) -> None:
    model, data = build(name), examples(name)
    with pytest.raises(UserError, match=f"rates only .* layers, and {layer!r}"):
        loops.prune(
            model, Mask.ones_like(model), find(score), 0.5, loss=nn.functional.cross_entropy,
            batches=[(data.train_inputs, data.train_labels)],
        )  # fmt: skip


def test_a_mask_by_a_later_name_of_a_shared_weight_is_trained_too() -> None:
    model, data = build("gpt"), examples("gpt")
    half = Mask.from_tensors({"head.weight": draw(5, 8) > 0})
    state = train(model, model.state_dict(), half, data, Recipe(epochs=1, batch_size=8), 0).weights.load()
    assert (state["wte.weight"] == 0).equal(~half["head.weight"])


# Files of tickets.


def tied() -> tuple[Content, dict[str, tuple[str, ...]]]:
    model = build("gpt")
    mask = loops.prune(model, Mask.ones_like(model), magnitude, 0.5)
    return Content(
        1, mask, Ticket(1, mask, Weights.of(model.state_dict()), None).rewound, None, History()
    ), list_shared(model)


def test_a_shared_weight_is_written_once() -> None:
    old, shared = tied()
    rewound = old.rewound | {"head.weight": old.rewound["wte.weight"]}
    new = Content(old.level, old.mask, rewound, None, History(), {}, shared)
    assert len(ticket_file.encode(old)) - len(ticket_file.encode(new)) > 100


def test_a_file_that_does_not_name_shared_weights_is_pruned_under_all_names(tmp_path: Path) -> None:
    old, shared = tied()
    assert (old.rewound["head.weight"] != 0).all()
    (tmp_path / "old").write_bytes(ticket_file.encode(old))
    found = Ticket.load(tmp_path / "old")
    assert found.shared == shared
    assert found.rewound["head.weight"].equal(found.rewound["wte.weight"])


def test_weights_that_are_only_equal_are_not_taken_as_shared(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 1))
    mask = Mask.from_tensors({"0.weight": torch.arange(4) > 1})
    Ticket(1, mask, Weights.of(model.state_dict()), None).save(tmp_path / "ticket")
    assert Ticket.load(tmp_path / "ticket").rewound["1.weight"].all()


def test_torch_prune_of_a_shared_weight() -> None:
    layer = nn.Linear(2, 2)
    torch_prune.l1_unstructured(layer, "weight", amount=2)
    assert interchange.from_torch_prune(layer).alive == 2


# Networks that reach into their own layers.


class Own(nn.Module):
    """Two linear layers and one of several habits that a network may have."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.habit = habit
        self.fc1, self.fc2, self.dropout = nn.Linear(4, 40), nn.Linear(40, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.habit == "clips":
            self.fc1.weight.data.clamp_(-2, 2)
        if self.habit == "counts":
            x = x * len([layer for layer in self.modules() if isinstance(layer, nn.Linear)])
        if self.habit == "replaces":
            self.fc1.weight = nn.Parameter(self.fc1.weight.detach())
        if self.habit == "hooks":
            self.fc1.weight.register_hook(lambda gradient: 2 * gradient)
        if self.habit == "stops":
            return torch.as_tensor(self.fc2(self.fc1(x).relu() + self.fc1.weight.detach().sum() * 0))
        hidden = self.fc1(x).relu()
        if self.habit == "reads":
            hidden = hidden + self.fc1.weight.sum()
        if self.habit == "drops":
            hidden = nn.functional.dropout(self.dropout(hidden), 0.5)
        logits: Tensor = self.fc2(hidden)
        return logits


def vectors() -> Dataset:
    inputs = draw(96, 4)
    labels = (inputs.sum(1) > 0).long()
    return Dataset("vectors", inputs[:64], labels[:64], inputs[64:], labels[64:], ("no", "yes"))


HALF = {"batch_size": 32, "epochs": 1, "lr": 0.1}


@pytest.mark.parametrize(
    ("habit", "said"),
    [("clips", "it changes its 'fc1.weight' itself"), ("counts", "its loss is another one"), ("replaces", "it "),
     ("hooks", "the gradient of 'fc1.weight' is another one"),
     ("none", None), ("reads", None), ("drops", None), ("stops", None)],
)  # fmt: skip
def test_a_network_that_reaches_into_its_layers_is_found(habit: str, said: str | None) -> None:
    torch.manual_seed(0)
    fault = find_fault(Own(habit), vectors(), Recipe(**HALF), nn.functional.cross_entropy)
    assert (fault is None) == (said is None)
    assert said is None or (fault is not None and said in fault)


def test_such_a_network_is_trained_with_its_own_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data, recipe = Own("counts"), vectors(), Recipe(**HALF)
    mask = loops.prune(model, Mask.ones_like(model), magnitude, 0.9)
    with pytest.warns(
        OwnLayersWarning, match="Own is trained with its own layers, at dense speed, because it does not"
    ) as said:
        found = train(model, model.state_dict(), mask, data, recipe, 0)
    assert said[0].filename == __file__
    dense = train(model, model.state_dict(), mask, data, recipe, 0, kernels="off")
    assert found.weights.hash == dense.weights.hash
    with pytest.warns(OwnLayersWarning):
        tickets = list(find_tickets(model, data, recipe, magnitude, levels=1, fraction=0.9, progress=False))
    for kernels in ("auto", "off"):
        study = Study(
            task=Task(dataset=data, model=partial(Own, "counts")), recipe=recipe, importances=("magnitude",),
            seeds=(0,), levels=1, fraction=0.9, kernels=kernels,
        )  # fmt: skip
        planner = Planner(study, load_problem(study.task), Store(tmp_path / "store"))
        assert (planner.kernel_fault is None) == (kernels == "off")
        assert planner.training(0, planner.initial(0), tickets[1].mask, 0, 2).identity["sparse"] == []


def test_layers_are_replaced_in_a_network_that_does_not() -> None:
    torch.manual_seed(0)
    model, data, recipe = Own("none"), vectors(), Recipe(**HALF)
    mask = loops.prune(model, Mask.ones_like(model), magnitude, 0.9)
    names = choose_layers(model, mask, recipe, "cpu", "auto", packed=False)
    assert names == ["fc1.weight", "fc2.weight"]
    found = [train(model, model.state_dict(), mask, data, recipe, 0, kernels=each) for each in ("auto", names, "off")]
    assert found[0].weights.hash == found[1].weights.hash
    with pytest.raises(UserError, match="kernels: expected 'auto' or 'off', got 'on'"):
        find_tickets(model, data, recipe, magnitude, levels=1, kernels="on")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="kernels: expected 'auto' or 'off', got list"):
        find_tickets(model, data, recipe, magnitude, levels=1, kernels=names)  # type: ignore[arg-type]


# Starts.


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 2))


def sparsify(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].weight[:, 1:] = 0


def to_type(dtype: torch.dtype) -> Callable[[nn.Sequential], object]:
    return lambda model: model.to(dtype)


def make_complex(model: nn.Sequential) -> None:
    model[0] = nn.Linear(4, 20, dtype=torch.complex64)


def add_integers(model: nn.Sequential) -> None:
    model.steps = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "patterns", "sentence"),
    [
        (sparsify, [], "model: 60 of the 80 initial weights of '0.weight' are exactly 0, as in a network"),
        (lambda model: torch_prune.l1_unstructured(model[0], "weight", 9), [],
         "model: its '0.weight' has a mask of torch.nn.utils.prune, which level 0 would not keep; make"),
        (lambda model: torch_prune.l1_unstructured(model[0], "weight", 9), ["default"],
         "model: its '0.weight' has a mask of torch.nn.utils.prune, which level 0 would not keep; make"),
        (lambda model: weight_norm(model[0]), [], "model: its '0.weight' is computed from other parameters, as by"),
        (lambda model: weight_norm(model[0]), ["*"], "model: its '0.weight' is computed from other parameters, as by"),
        (lambda model: weight_norm(model[0]), ["*.original1"], "its '0.weight' is computed from other parameters, as"),
        (lambda model: [weight_norm(model[0]), weight_norm(model[2])], [], "; its '0.weight' is computed from other"),
        (make_complex, [], "model: its '0.weight' is complex64; expected float32, as model.float() gives"),
        (to_type(torch.bfloat16), [], "model: its '0.weight' is bfloat16; expected float32, as model.float() gives"),
        (to_type(torch.float16), [], "model: its '0.weight' is float16; expected float32, as model.float() gives"),
        (lambda model: model.to("meta"), [], "model: its '0.weight' is on the device 'meta', where it has no values"),
        (lambda model: model.insert(0, nn.LazyLinear(4)), [], "layer '0.weight' is lazy and has no shape yet"),
        (add_integers, ["*"], "model: its 'steps' is int64, and only floating-point weights can be pruned"),
        (lambda _: None, ["3.*"], "prune: '3.*' is no parameter of the model"),
        (lambda model: setattr(model, "lock", Lock()), [], "copying it, as copy.deepcopy does, raised TypeError"),
        (lambda model: setattr(model, "train", lambda mode: 1 / mode), [], "it raised ZeroDivisionError"),
        (lambda model: setattr(model, "more", [nn.Linear(2, 2)]), [], "model: its 'more' is a list of layers, whose"),
        (lambda model: model._modules.update({"x.y": nn.Linear(2, 2)}), [], "torch does not find its layer 'x.y'"),
    ],
)  # fmt: skip
def test_networks_that_cannot_start_dense_are_refused(
    change: Callable[[nn.Sequential], object], patterns: list[str], sentence: str
) -> None:
    model = two_layers()
    change(model)
    with pytest.raises(UserError) as raised:
        find_tickets(model, vectors(), Recipe(**HALF), magnitude, levels=1, prune=patterns)
    assert sentence in str(raised.value)


def test_a_study_of_a_masked_network_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    def masked() -> nn.Module:
        model = two_layers()
        torch_prune.l1_unstructured(model[2], "weight", 9)
        return model

    study = Study(
        task=Task(dataset=vectors(), model=masked), recipe=Recipe(**HALF), importances=("l1",), seeds=(0,), levels=1
    )
    with pytest.raises(UserError, match=r"its '2\.weight' has a mask of torch.nn.utils.prune"):
        run(study, store=tmp_path / "store", progress=False)


def test_zeros_of_an_initialisation_are_no_mask() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), nn.Embedding(5, 20, padding_idx=1), nn.Linear(9, 9))
    nn.init.zeros_(model[0].weight)
    nn.init.eye_(model[1].weight)
    with torch.no_grad():
        model[3].weight.view(-1)[:16] = 0  # as many as are no mask yet
    check_start(model, Mask.ones_like(model, prune=["*.weight"]), ["*.weight"], "model")


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_that_count_only_where_they_are_large_are_not_masked(sign: int) -> None:
    model, kept = nn.Linear(20, 10), torch.arange(200).reshape(10, 20) % 2
    model.register_buffer("kept", kept)

    def outputs() -> Tensor:
        large = (sign * model.weight - 1).relu()  # above all initial weights
        return nn.functional.linear(torch.ones(1, 20), model.weight * kept + large * (1 - kept))

    outputs().sum().backward()
    check_step(model, Mask.ones_like(model), {"weight": model.weight.detach().clone()}, outputs, "model")


def refuse_large(weight: Tensor) -> Tensor:
    if weight.abs().max() > 1:
        raise UserError("a weight is too large")
    return weight


@pytest.mark.parametrize(
    "use",
    [
        lambda weight, kept: weight + (weight * kept - weight).detach(),  # the gradient of all weights
        lambda weight, _: 0 * weight,  # the gradient is 0 for all
        lambda weight, kept: refuse_large(weight) * kept,
    ],
    ids=["a gradient reaches all", "a gradient reaches none", "the network refuses large weights"],
)
def test_weights_that_a_pass_could_use_are_not_masked(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, kept = nn.Linear(20, 10), torch.arange(200).reshape(10, 20) % 2
    model.register_buffer("kept", kept)
    start = {"weight": model.weight.detach().clone()}

    def outputs() -> Tensor:
        return nn.functional.linear(torch.ones(1, 20), use(model.weight, kept))

    outputs().sum().backward()
    check_step(model, Mask.ones_like(model), start, outputs, "model")
    assert model.weight.equal(start["weight"])


def test_a_limit_of_weights_at_zero_is_no_mask() -> None:
    model = nn.Linear(20, 10)
    start = {"weight": model.weight.detach().clone()}
    with torch.no_grad():
        model.weight.clamp_(min=0)
    check_step(model, Mask.ones_like(model), start, lambda: model.weight, "model")
    with torch.no_grad():
        model.weight[0] = 0
    with pytest.raises(UserError, match=r"a step sets \d+ of the 200 weights of 'weight' to 0"):
        check_step(model, Mask.ones_like(model), start, lambda: model.weight, "model")


def test_a_sparse_gradient_says_nothing_about_a_mask() -> None:
    model = nn.Embedding(20, 10, sparse=True)
    model.register_buffer("kept", torch.arange(200).reshape(20, 10) % 2)
    start = {"weight": model.weight.detach().clone()}
    model(torch.arange(20)).sum().backward()
    check_step(model, Mask.ones_like(model, prune=["*"]), start, lambda: model(torch.arange(20)), "model")


def test_a_layer_with_weight_norm_is_left_out_by_a_pattern() -> None:
    model = two_layers()
    weight_norm(model[0])
    found = list(find_tickets(model, vectors(), Recipe(**HALF), magnitude, levels=1, prune=["default"], progress=False))
    assert list(found[1].mask) == ["2.weight"]


# What density counts.


def test_what_density_counts_is_said() -> None:
    model = build("lstm")
    found = cover(model, Mask.ones_like(model, ["rnn.weight_hh_l0"]), ["fc.weight"])
    assert found.describe() == (
        "Density counts 112 of the network's 450 parameters; 16 of these are kept dense (fc.weight); rnn.weight_hh_l0 "
        "is left out."
    )
    assert [row[:3] for row in found.tabulate()] == [
        ("pruned", 1, 96), ("kept dense", 1, 16), ("left out", 1, 256), ("not chosen", 5, 82)
    ]  # fmt: skip
    assert sum(row[3] for row in found.tabulate()) == pytest.approx(1)
    assert found.warn() == (
        "Only 21.3 % of the network's parameters may be pruned, so its density says little about the whole; the "
        "largest others are rnn.weight_hh_l0 (256, left out), rnn.bias_ih_l0 (32, not chosen), rnn.bias_hh_l0 (32, "
        "not chosen)."
    )


def test_the_pattern_that_would_add_the_largest_tensors_is_named() -> None:
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 2))
    for patterns in ([], ["1.weight"]):
        said = cover(model, Mask.ones_like(model, prune=patterns), prune=patterns).warn()
        expected = '["default", "0.weight"]' if not patterns else '["1.weight", "0.weight"]'
        assert said.endswith(f"; prune = {expected} would prune it too.")
    everything = Mask.ones_like(model, prune=["default", "0.weight"])
    assert cover(model, everything, prune=["default", "0.weight"]).warn() == ""


def test_density_says_enough_from_nine_tenths_of_the_parameters_on() -> None:
    model = nn.Linear(9, 1)
    assert cover(model, Mask.ones_like(model)).warn() == ""
    model.scales = nn.ParameterList(torch.ones(1) for _ in range(110))  # 92 % of the parameters, each less than 1 %
    assert cover(model, Mask.ones_like(model)).warn().endswith("; the largest others are bias (1, not chosen).")


def test_paths_of_other_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(UserError, match=r"its '1.weight' is an argument of 'batch_norm'"):
        Paths(model, torch.ones(1, 2), Mask.ones_like(model, prune=["*.weight"]))


# Studies.


@pytest.mark.filterwarnings("ignore:effective sparsity")
def test_a_study_of_a_network_with_a_shared_weight(tmp_path: Path) -> None:
    task = Task(dataset=examples("gpt"), model=Gpt)
    recipe = Recipe(epochs=2, batch_size=8, rewind=1, optimizer="adamw", lr=0.01)
    study = Study(
        task=task, recipe=recipe, importances=("magnitude", "l1"), seeds=(0,), levels=2, fraction=0.5,
        prune=("default", "wpe"),
    )  # fmt: skip
    store = tmp_path / "store"
    table = run(study, store=store, progress=False)
    assert table["level"].to_list() == [0, 1, 2] * 2
    ticket = read_ticket(study, importance="l1", seed=0, level=2, store=store)
    assert "wpe" in ticket.mask
    for state in (ticket.rewound, ticket.load_trained()):
        model = build("gpt")
        model.load_state_dict(state)
        assert interchange.from_zeros(model, study.prune) == ticket.mask
    assert set(layers(study, store=store)["layer"]) == {*ticket.mask, "(all)"}
    reinit(study, level=1, draws=1, store=store, progress=False)
    planner = Planner(study, load_problem(task), Store(store))
    drawn = plan(Tickets(planner), 1, 1)[0].planner.initial(1).load()
    assert drawn["head.weight"].equal(drawn["wte.weight"])


def test_a_run_says_once_that_a_network_keeps_its_layers(tmp_path: Path) -> None:
    study = Study(
        task=Task(dataset=vectors(), model=partial(Own, "counts")), recipe=Recipe(**HALF), importances=("magnitude",),
        seeds=(0,), levels=1, fraction=0.9,
    )  # fmt: skip
    with pytest.warns(OwnLayersWarning) as said:
        run(study, store=tmp_path / "store", progress=False)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(study, {"kernels": "off"}, store=tmp_path / "store", progress=False)
    assert len(list(Store(tmp_path / "store").results)) == 2


def test_a_study_that_starts_from_a_pruned_checkpoint_is_refused(tmp_path: Path) -> None:
    model = two_layers()
    sparsify(model)
    save_file(model.state_dict(), tmp_path / "pruned.safetensors")
    study = Study(
        task=Task(dataset=vectors(), model=two_layers, checkpoint=str(tmp_path / "pruned.safetensors")),
        recipe=Recipe(**HALF), importances=("l1",), seeds=(0,), levels=1,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"60 of the 80 initial weights of '0\.weight' are exactly 0"):
        run(study, store=tmp_path / "store", progress=False)


def test_a_plan_and_a_report_list_what_is_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    found = cover(build("gpt"), Mask.ones_like(build("gpt")))
    print_coverage(found)
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["parameters", "that", "are", "tensors", "parameters", "%", "the", "largest"]
    assert said[2].startswith("pruned                     5         552  ")
    assert said[2].endswith("block.self_attn.in_proj_weight, block.linear1.weight, block.linear2.weight and 2 more")
    assert tables.coverage(found).row(1)[:3] == ("not chosen", 9, 120)


def test_layers_are_named_by_any_name_of_a_shared_weight() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    model[2].weight = model[0].weight
    assert list(Mask.ones_like(model, ["2"])) == ["1.weight"]
    assert resolve_kept_dense(Mask.ones_like(model), ["2"], (), list_shared(model)) == {"0.weight"}


def test_a_name_means_a_layer_that_is_there() -> None:
    assert resolve_layers(["a", "a.weight"], ["a"], "exclude") == {"a"}  # the full name before the layer
    with pytest.raises(UserError, match="exclude: 'c' is no prunable layer"):
        resolve_layers(["a.weight"], ["c"], "exclude", shared={"b.weight": ["c.weight"]})
    mask = Mask.ones_like(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert resolve_kept_dense(mask, ["0", "left.out"], ["left.out"]) == {"0.weight"}


def test_kernels_is_auto_or_off() -> None:
    with pytest.raises(UserError, match="expected 'auto' or 'off', got 'on'"):
        read_kernels("on")  # type: ignore[arg-type]


def test_frozen_weights_are_pruned_only_if_a_pattern_names_them() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad = False
    assert list(Mask.ones_like(model)) == ["1.weight"]
    found = cover(model, Mask.ones_like(model))
    assert "; 12 are frozen and stay as they are (0.weight)" in found.describe()
    assert "0.weight (12, frozen)" in found.warn()
    assert [(role, parameters) for role, _, parameters, _, _ in found.tabulate()] == [
        ("pruned", 6), ("not chosen", 5), ("frozen", 12),
    ]  # fmt: skip
    named = Mask.ones_like(model, prune=["*.weight"])
    assert list(named) == ["0.weight", "1.weight"]
    assert "0.weight is pruned though frozen" in cover(model, named, prune=["*.weight"]).describe()
    model[1].weight.requires_grad = False
    with pytest.raises(UserError, match=r'prune = \["0.weight"\] would prune a frozen one'):
        Mask.ones_like(model)
    assert list(Mask.ones_like(model.requires_grad_(False))) == ["0.weight", "1.weight"], "nothing is trained here"


def test_parameters_beside_each_other_in_memory_are_not_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, model.parameters())
    check_start(model, Mask.ones_like(model), (), "model")


@pytest.mark.parametrize("part", [slice(None), slice(1, 3), (slice(None), slice(2))])
def test_parameters_that_share_memory_are_refused(part: slice | tuple[slice, slice]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data[part])
    with pytest.raises(UserError, match=r"its '0.weight' and '1.weight' share memory and are not one parameter"):
        check_start(model, Mask.ones_like(model), (), "model")
    both = torch.randn(4, 8)
    model[0].weight, model[1].weight = nn.Parameter(both[:, ::2]), nn.Parameter(both[:, 1::2])
    model.register_buffer("mean", both.new_ones(4))
    model.register_buffer("part", model.mean[part if isinstance(part, slice) else 0])
    check_start(model, Mask.ones_like(model), (), "model")  # only buffers share memory
