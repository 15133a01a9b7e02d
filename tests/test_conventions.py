"""The paper's conventions: layers that are counted and kept dense, open_lth's defaults, and the stem of ResNet-18."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from tombola import Mask, Recipe, Study, UserError, datasets, find_tickets, load_problem, load_study, prune
from tombola.analysis import layers, overlap
from tombola.analysis.gather import ALL, PRUNABLE
from tombola.engine.job import Job
from tombola.importance import IMPORTANCES, l1
from tombola.lottery.rule import check_levels
from tombola.models import resnet18, resnet20, vgg16
from tombola.pruning.mask import resolve_kept_dense
from tombola.store.store import Store
from tombola.study.chains import Chain
from tombola.study.planner import Planner
from tombola.study.schema import presets


def dense(**sizes: int) -> Mask:
    return Mask.from_tensors({f"{name}.weight": torch.ones(size, dtype=torch.bool) for name, size in sizes.items()})


def draw_weights(mask: Mask, seed: int = 0) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return {name: torch.randn(mask.shapes[name], generator=numbers) for name in mask}


@pytest.mark.parametrize("name", IMPORTANCES)
@settings(deadline=None, max_examples=30)
@given(sizes=st.tuples(*[st.integers(1, 60)] * 3), fraction=st.floats(0.05, 0.6), kept=st.sampled_from(["a", "b", "c"]))
def test_a_round_takes_the_fraction_of_all_from_the_layers_that_may_be_pruned(
    name: str, sizes: tuple[int, int, int], fraction: float, kept: str
) -> None:
    mask = dense(a=sizes[0], b=sizes[1], c=sizes[2])
    weights, count = draw_weights(mask), round(fraction * mask.total)
    others = mask.total - mask.sizes[f"{kept}.weight"]
    if count > others:
        with pytest.raises(UserError, match=f"is {count}, and only {others} are in layers that may be pruned"):
            prune(weights, mask, IMPORTANCES[name], fraction, keep_dense=[kept])
        return
    found = prune(weights, mask, IMPORTANCES[name], fraction, keep_dense=[kept])
    assert found.alive == mask.total - count
    assert found[f"{kept}.weight"].all()
    if 0 < count < others and name != "random":  # the same connections as from a network without this layer
        rest = Mask.from_tensors({layer: mask[layer] for layer in mask if layer != f"{kept}.weight"})
        alone = prune(weights, rest, IMPORTANCES[name], count / others)
        assert alone.alive == others - count
        assert all(torch.equal(alone[layer], found[layer]) for layer in alone)


def test_the_tables_of_the_paper_end_where_the_classifier_leaves_nothing_more_to_prune() -> None:
    for total, classifier, last in ((266_200, 1_000, 24), (14_715_584, 5_120, 35)):
        check_levels(total, 0.2, last, kept_dense=classifier)
        with pytest.raises(UserError, match=f"at most {last} levels are possible"):
            check_levels(total, 0.2, last + 1, kept_dense=classifier)
        check_levels(total, 0.2, 40)


def test_a_round_that_removes_more_than_there_is_says_what_there_is() -> None:
    with pytest.raises(UserError) as caught:
        check_levels(100, 0.5, 3, kept_dense=40)
    assert str(caught.value) == (
        "levels: 3 are too many, after level 1 only 50 of 100 connections are alive, 40 of them in layers that are "
        "kept dense, and the next round would remove 10 of the other 10; at most 1 level is possible"
    )


def test_patterns_name_layers_to_keep_dense() -> None:
    mask = dense(**{"stem": 2, "head.fc": 3, "body.fc": 4})
    assert resolve_kept_dense(mask, []) == frozenset()
    assert resolve_kept_dense(mask, ["*.fc"]) == {"head.fc.weight", "body.fc.weight"}
    assert resolve_kept_dense(mask, ["head.fc.weight", "st?m"]) == {"head.fc.weight", "stem.weight"}
    with pytest.raises(UserError, match=r"keep_dense: '\*\.fcc' is no prunable layer"):
        resolve_kept_dense(mask, ["*.fcc"])
    with pytest.raises(UserError, match=r"keep_dense: 'stem', '\*\.fc' match all 3 layers; leave one to prune"):
        resolve_kept_dense(mask, ["stem", "*.fc"])
    with pytest.raises(UserError, match=r"keep_dense: '\*' matches all 3 layers; leave one to prune"):
        resolve_kept_dense(mask, ["*"])


def test_find_tickets_keeps_layers_dense() -> None:
    data = datasets.load("digits", train_per_class=3, test_per_class=3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    found = list(find_tickets(model, data, Recipe(iterations=2, batch_size=16), l1, levels=3, keep_dense=["3"]))
    assert [ticket.mask.counts["3.weight"] for ticket in found] == [200] * 4
    assert [ticket.mask.alive for ticket in found] == [1480, 1184, 947, 758]


# A study.


def planner(folder: Path, **overrides: object) -> Planner:
    study = load_study("digits", {"recipe.epochs": 1, "levels": 2, "seeds": [0], **overrides})
    return Planner(study, load_problem(study.task), Store(folder / "store"))


def test_masks_are_remembered_under_another_name_where_layers_are_kept_dense(tmp_path: Path) -> None:
    names = set()
    for kept in ([], ["fc"], ["fc", "fc2"]):
        plan = planner(tmp_path, keep_dense=kept)
        names.add(plan._name(plan.initial(0), plan.dense, 0, plan.initial(0), Chain(0, "l1")))
    assert len(names) == 3


def test_what_is_counted_is_said(tmp_path: Path) -> None:
    text = "Density counts {} of the network's 50610 parameters"
    assert planner(tmp_path, keep_dense=[]).describe_counted() == f"{text.format(50200)}."
    assert planner(tmp_path).describe_counted() == (f"{text.format(50200)}; 1000 of these are kept dense (fc.weight).")
    assert planner(tmp_path, exclude=["fc"]).describe_counted() == f"{text.format(49200)}; fc.weight is left out."


def test_an_override_of_the_model_drops_what_the_preset_keeps_dense() -> None:
    assert load_study("digits").keep_dense == ("fc",)
    assert load_study("digits", {"task.model": "lenet_300_100"}).keep_dense == ("fc",)
    assert load_study("digits", {"task.model": "mine:model"}).keep_dense == ()
    assert load_study("digits", {"task.model": "mine:model", "keep_dense": ["a"]}).keep_dense == ("a",)


@pytest.mark.parametrize("exclude", ["fc", "fc.weight", "f?"])
def test_a_layer_that_is_left_out_is_not_kept_dense(exclude: str, tmp_path: Path) -> None:
    plan = planner(tmp_path, exclude=[exclude])
    assert plan.kept_dense == frozenset()
    assert plan.dense.total == 49_200


def test_data_orders_of_several_importances(tmp_path: Path) -> None:
    plan = planner(tmp_path, data_seeds=[7], data_seeds_for=["l2", "l1"])
    assert plan.repeats == [Chain(0, "l2", 7), Chain(0, "l1", 7)]
    assert planner(tmp_path, data_seeds=[7]).repeats == [Chain(0, "magnitude", 7)]
    assert load_study("lenet-mnist", {"importances": ["softmax", "l2"]}).repeated == ("l2",)
    assert load_study("lenet-mnist", {"importances": ["softmax"]}).repeated == ("softmax",)
    with pytest.raises(UserError, match="data_seeds_for: 'l3' is not one of this study's importances"):
        load_study("lenet-mnist", {"data_seeds_for": ["l3"]})


def test_layers_that_use_the_sparse_kernels_depend_on_the_batch_size(tmp_path: Path) -> None:
    sparse = {}
    for batch_size in (4, 128):
        plan = planner(tmp_path, **{"recipe.batch_size": batch_size})
        initial = plan.initial(0)
        mask = prune(initial.load(), plan.dense, IMPORTANCES["magnitude"], 0.95)
        sparse[batch_size] = plan.training(0, initial, mask, 0, plan.end).identity["sparse"]
    assert sparse[4] == []
    assert "fc1.weight" in sparse[128]


def test_packed_networks_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, asked = planner(tmp_path), []

    def can_pack(model: object) -> bool:
        asked.append(model)
        return True

    initial = plan.initial(0)
    mask = prune(initial.load(), plan.dense, IMPORTANCES["magnitude"], 0.95)
    before = plan.training(0, initial, mask, 0, plan.end)
    assert "packed" not in before.identity, "a perceptron has no convolutions"
    monkeypatch.setattr("tombola.study.planner.have_convolutions", lambda mask, sparse: bool(sparse))
    monkeypatch.setattr("tombola.study.planner.can_pack", can_pack)
    for _ in range(2):
        after = plan.training(0, initial, mask, 0, plan.end)
        assert after.identity == before.identity | {"packed": 4}
        assert after.key != before.key
    assert asked == [plan.model], "the network is traced once"
    assert (Job.of(before, plan.study).packed, Job.of(after, plan.study).packed) == (False, True)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))


def own_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels)


def own_forward(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs: Tensor = model(inputs)
    return outputs


def own_step(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs), labels)


def test_perceptrons_have_names_of_their_own(tmp_path: Path) -> None:
    """Others are trained by autograd, with the bits that they had in earlier versions."""
    changes: list[dict[str, object]] = [
        {},
        {"recipe.label_smoothing": 0.1},
        {"recipe.precision": "bfloat16"},
        {"task.model": f"{__name__}:two_layers", "task.model_arguments": {}, "keep_dense": []},
        {"task.loss": f"{__name__}:own_loss"},
        {"task.forward": f"{__name__}:own_forward"},
        {"task.step": f"{__name__}:own_step"},
    ]
    found = []
    for number, changed in enumerate(changes):
        plan = planner(tmp_path / str(number), **changed)
        found.append(plan.training(0, plan.initial(0), plan.dense, 0, plan.end).identity.get("perceptron"))
    assert found == [1, *[None] * (len(changes) - 1)]


# What the tables count.


def test_layers_are_counted_with_and_without_those_that_are_kept_dense() -> None:
    mask = Mask.from_tensors({"a": torch.tensor([1, 0, 0, 0]).bool(), "b": torch.ones(2).bool()})
    table = layers.of_mask(mask, kept_dense=["b"])
    rows = {row["layer"]: (row["connections"], row["alive"], row["density"]) for row in table.to_dicts()}
    assert rows == {"a": (4, 1, 0.25), "b": (2, 2, 1.0), ALL: (6, 3, 0.5), PRUNABLE: (4, 1, 0.25)}
    assert PRUNABLE not in layers.of_mask(mask)["layer"]


def test_overlap_is_counted_with_and_without_the_layers_that_are_kept_dense() -> None:
    numbers = np.random.default_rng(0)
    names = ("one", "other")

    def draw(alive: int) -> torch.Tensor:
        return torch.from_numpy(numbers.permutation(40) < alive)

    masks = {name: Mask.from_tensors({"a": draw(9), "b": draw(15), "fc": torch.ones(8).bool()}) for name in names}
    table = overlap.of_masks(masks, ["fc"])
    rows = {row["layer"]: row for row in table.to_dicts()}
    without = {name: Mask.from_tensors({layer: mask[layer] for layer in ("a", "b")}) for name, mask in masks.items()}
    alone = {row["layer"]: row for row in overlap.of_masks(without).to_dicts()}
    for layer in ("a", "b"):
        assert rows[layer] == alone[layer]
    assert rows[PRUNABLE] == {**alone[ALL], "layer": PRUNABLE}
    assert rows[ALL]["shared"] == alone[ALL]["shared"] + 8
    assert rows[ALL]["global_expected"] == pytest.approx(24 * 24 / 80 + 8)
    assert rows[ALL]["layers_expected"] == pytest.approx(9 * 9 / 40 + 15 * 15 / 40 + 8)
    low, high = stats.hypergeom(80, 24, 24).interval(0.95)
    assert (rows[ALL]["global_low"], rows[ALL]["global_high"]) == (low + 8, high + 8)
    assert rows["fc"]["shared"] == rows["fc"]["global_expected"] == rows["fc"]["global_low"] == 8
    assert rows["fc"]["global_jaccard"] == 1
    three = overlap.of_masks({**masks, "third": masks["one"]}, ["fc"]).filter(k=3)
    total = three.filter(layer=ALL)["global_expected"].item()
    assert total == pytest.approx(three.filter(layer=PRUNABLE)["global_expected"].item() + 8)


def test_a_layer_that_is_kept_dense_has_no_pruned_connection() -> None:
    masks = {"one": dense(a=3), "other": Mask.from_tensors({"a.weight": torch.tensor([1, 0, 1]).bool()})}
    with pytest.raises(UserError, match="should be kept dense, and have pruned connections"):
        overlap.of_masks(masks, ["a.weight"])


# The presets.


@pytest.mark.parametrize(
    ("preset", "kept"),
    [
        ("digits", ("fc",)),
        ("lenet-mnist", ("fc",)),
        ("lenet-fashion", ("fc",)),
        ("vgg16-cifar10", ("fc",)),
        ("resnet20-cifar10", ()),
        ("resnet18-tinyimagenet", ()),
    ],
)
def test_presets_keep_dense_what_the_paper_kept_dense(preset: str, kept: tuple[str, ...]) -> None:
    assert load_study(preset).keep_dense == kept


def test_presets_of_convolutional_networks_have_open_lths_defaults() -> None:
    studies: list[Study] = [load_study(name) for name in presets() if name.startswith(("resnet", "vgg"))]
    assert studies
    for study in studies:
        assert study.task.model_arguments["batchnorm_init"] == "uniform"
        assert study.task.dataset_arguments["normalisation"] == "imagenet"
        assert study.task.model_arguments.get("stem") is None


@pytest.mark.parametrize("build", [resnet18, resnet20, vgg16])
def test_the_scales_of_batch_norm(build: type[nn.Module]) -> None:
    def scales(**arguments: object) -> list[torch.Tensor]:
        torch.manual_seed(0)
        modules = build(width=4, **arguments).modules()
        return [module.weight.detach() for module in modules if isinstance(module, nn.BatchNorm2d)]

    assert all((scale == 1).all() for scale in scales())
    drawn = torch.cat(scales(batchnorm_init="uniform"))
    assert 0 <= drawn.min() < 0.1
    assert 0.9 < drawn.max() < 1
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3
    with pytest.raises(UserError, match="batchnorm_init must be 'ones' or 'uniform', got 'zeros'"):
        build(width=4, batchnorm_init="zeros")


def test_the_stem_of_resnet18() -> None:
    for arguments, size, parameters in (({}, 2, 11_279_112), ({"stem": "cifar"}, 8, 11_271_432)):
        model = resnet18(**arguments)  # type: ignore[arg-type]
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert model.blocks(model.pool(model.bn1(model.conv1(torch.zeros(1, 3, 64, 64))))).shape[-1] == size
    assert resnet18(width=4).conv1.weight.shape == (4, 3, 7, 7)
    with pytest.raises(UserError, match="stem must be 'imagenet' or 'cifar', got 'mnist'"):
        resnet18(stem="mnist")  # type: ignore[arg-type]


def test_normalisation_of_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data set 'digits': normalisation = 'imagenet' needs images with 3 channels"):
        datasets.load("digits", normalisation="imagenet")
    with pytest.raises(UserError, match="normalisation must be 'own' or 'imagenet', got 'mine'"):
        datasets.load("digits", normalisation="mine")
    own = datasets.load("digits", normalisation="own")
    assert own.fingerprint == datasets.load("digits").fingerprint
