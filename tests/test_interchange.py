"""Tickets travel: to and from other libraries, as files, and never by pickle."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from libraries import needs
from tombola import Mask, Ticket, UserError, Weights, interchange, kernels, loops
from tombola.importance import magnitude


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def find() -> Ticket:
    model = network()
    mask = loops.prune(model, Mask.ones_like(model), magnitude, 0.5)
    return Ticket(1, mask, Weights.of(model.state_dict()), None)


bits = st.lists(st.booleans(), min_size=42, max_size=42).map(torch.tensor)


@given(bits)
def test_round_trips(alive: torch.Tensor) -> None:
    mask = Mask.from_tensors({"0.weight": alive[:18].reshape(2, 1, 3, 3), "3.weight": alive[18:].reshape(3, 8)})
    assert interchange.from_open_lth(interchange.to_open_lth(mask)) == mask
    assert interchange.from_open_lth({name: layer.numpy() for name, layer in mask.items()}) == mask
    model = network()
    interchange.to_torch_prune(model, mask)
    assert interchange.from_torch_prune(model) == mask
    for layer in (model[0], model[3]):
        torch_prune.remove(layer, "weight")
    assert interchange.from_zeros(model) == mask
    assert interchange.from_torch_prune(model) == Mask.ones_like(model)


def test_a_file_of_open_lth(tmp_path: Path) -> None:
    mask = find().mask
    torch.save(interchange.to_open_lth(mask), tmp_path / "mask.pth")
    assert interchange.from_open_lth(torch.load(tmp_path / "mask.pth", weights_only=True)) == mask


@pytest.mark.filterwarnings("ignore")  # of the sparsifier
def test_files_of_torchao_and_sparseml(tmp_path: Path) -> None:
    sparsifiers = pytest.importorskip(
        "torch.ao.pruning", reason="torch has no pruning; to run: take a torch that has it"
    )
    model = network()
    sparsifier = sparsifiers.WeightNormSparsifier(0.7, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": "3.weight"}])
    sparsifier.step()
    mask = model[3].parametrizations.weight[0].mask != 0  # type: ignore[union-attr, index]
    assert 0 < mask.count_nonzero() < mask.numel()
    with pytest.raises(
        UserError, match=r"its '3\.weight' is computed from other parameters, as by .*remove these first"
    ):
        interchange.from_zeros(model)
    sparsifier.squash_mask()
    torch.save(model.state_dict(), tmp_path / "torchao.pth")
    # SparseML's save_model writes the same zeros, in a dictionary with more about the training
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "recipe": "version: 1.0"}, tmp_path / "sparseml.pth")
    for name in ("torchao", "sparseml"):
        read = torch.load(tmp_path / f"{name}.pth", weights_only=True)
        plain = network()
        plain.load_state_dict(read.get("state_dict", read))
        found = interchange.from_zeros(plain)
        assert torch.equal(found["3.weight"], mask)
        assert found["0.weight"].all()


def test_a_part_of_the_layers_and_a_single_layer() -> None:
    model = network()
    torch_prune.random_unstructured(model[3], "weight", amount=4)
    torch_prune.random_unstructured(model[3], "bias", amount=1)
    assert interchange.from_torch_prune(model).counts == {"0.weight": 18, "3.weight": 20}
    layer = torch_prune.random_unstructured(nn.Linear(5, 2), "weight", amount=4)
    assert interchange.from_torch_prune(layer).counts == {"weight": 6}


def half_masked() -> nn.Module:
    """Return a network that torch has pruned, with a mask that is not one: a number is NaN."""
    model = network()
    torch_prune.random_unstructured(model[0], "weight", amount=4)
    model[0].weight_mask[0] = float("nan")
    return model


def test_mistakes() -> None:
    model, mask = network(), find().mask
    for call, text in [
        (lambda: interchange.from_open_lth({"w": torch.tensor([2])}), "mask of layer 'w': expected 0 and 1 only"),
        (lambda: interchange.from_open_lth({"w": "x"}), "mask of layer 'w': expected a tensor of 0 and 1, got str"),
        (
            lambda: interchange.from_open_lth({"w": None}),
            "mask of layer 'w': expected a tensor of 0 and 1, got NoneType",
        ),
        (lambda: interchange.from_open_lth({"w": [[1], [1, 0]]}), "mask of layer 'w': expected a tensor of 0 and 1"),
        (
            lambda: interchange.from_open_lth({"w": torch.ones(2, device="meta")}),
            "mask of layer 'w': expected a tensor",
        ),
        (lambda: interchange.from_torch_prune(half_masked()), "mask of layer '0.weight': expected 0 and 1 only"),
        (lambda: interchange.from_open_lth({}), "expected the masks of one layer or more, got none"),
        (
            lambda: interchange.from_torch_prune(nn.ReLU()),
            "ReLU has no linear, convolution, recurrent or attention weight to prune",
        ),
        (lambda: interchange.to_torch_prune(nn.Linear(2, 1), mask), "the mask does not fit the model: it has layer"),
    ]:
        with pytest.raises(UserError, match=text):
            call()  # type: ignore[no-untyped-call]
    interchange.to_torch_prune(model, mask)
    with pytest.raises(UserError, match=r"the model has masks of torch.nn.utils.prune already"):
        interchange.to_torch_prune(model, mask)


def test_paths_are_strings_too(tmp_path: Path) -> None:
    ticket, model = find(), network()
    path = f"{tmp_path}/ticket"
    ticket.save(path)
    found = Ticket.load(path)
    found.apply(model)
    assert found.mask == ticket.mask == interchange.from_zeros(model)
    plain = network()
    plain.load_state_dict(ticket.rewound)  # a dense state that needs no tombola
    assert interchange.from_zeros(plain) == ticket.mask


@pytest.mark.parametrize("batch_size", [1, 128])
def test_the_surviving_weights_compute_the_same(batch_size: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    start = loops.snapshot(model)
    mask = loops.prune(model, Mask.ones_like(model), magnitude, 0.9)
    ticket = Ticket(1, mask, Weights.of(model.state_dict()), None)
    fast = ticket.sparse(model, batch_size=batch_size, trained=False)
    assert all(torch.equal(start.state[name], tensor) for name, tensor in model.state_dict().items())
    sparse = [each for each in fast.modules() if isinstance(each, (kernels.SparseConv2d, kernels.SparseLinear))]
    assert len(sparse) == ((2 if batch_size == 128 else 1) if kernels.available() else 0)
    ticket.apply(model)
    for size in (1, 128):
        inputs = torch.randn(size, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(fast(inputs), model(inputs), atol=1e-6)
    with pytest.raises(UserError, match="the ticket of level 1 has no trained weights"):
        ticket.sparse(model)


def test_a_ticket_is_not_pickled() -> None:
    ticket = find()
    for dump in (pickle.dumps, lambda one: torch.save(one, io.BytesIO())):
        with pytest.raises(UserError, match="a ticket is not pickled: write it with its `save`, and read it with"):
            dump(ticket)
    assert copy.copy(ticket) is copy.deepcopy(ticket) is ticket


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.usefixtures("importable_torchvision")
@needs("onnx", "onnxscript", "onnxruntime")
def test_onnxruntime_computes_equal_outputs(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    ticket, model = find(), network()
    ticket.apply(model)
    inputs = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    path = str(tmp_path / "ticket.onnx")
    torch.onnx.export(model.eval(), (inputs,), path, input_names=["inputs"], dynamo=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"inputs": inputs.numpy()})
    assert torch.allclose(torch.from_numpy(outputs), model(inputs), atol=1e-6)
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    assert {name: int((weights[name] != 0).sum()) for name in ticket.mask} == ticket.mask.counts
