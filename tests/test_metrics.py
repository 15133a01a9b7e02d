"""Metrics, losses and the validation split: from the outputs of a network to the words that are printed."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from torch import Tensor, nn
from torch.nn import functional

import regression_task
import tombola
from tombola import Dataset, History, Recipe, UserError, find_tickets, load_study
from tombola.analysis.accuracy import Row, table2
from tombola.analysis.winners import by_level, select_winners
from tombola.cli.main import main
from tombola.datasets.dataset import split_validation
from tombola.engine.verify import first_in_histories
from tombola.importance import magnitude
from tombola.own.code import own_modules
from tombola.store.results import Results
from tombola.study.chains import Chain
from tombola.study.task import load_problem, try_out
from tombola.study.tickets import Tickets
from tombola.training.evaluation import evaluate, measure, predict
from tombola.training.history import HistoryDocument
from tombola.training.loss_functions import LOSSES, binary_cross_entropy, mse
from tombola.training.metrics import ACCURACY, LOSS, METRICS, Measure, as_metric, check_names, compute, find
from tombola.training.trial import try_network
from tombola.workbench.studies import open_planner

R2 = Measure("r2", "r2", "R2", "validation", percent=False)
MSE = Measure("mse", "mse", "MSE", higher_is_better=False, percent=False)


def scores(examples: int = 40, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(examples, classes, generator=generator)
    return outputs, torch.randint(classes - 1, (examples,), generator=generator)  # the last class does not occur


def of_sklearn(name: str, outputs: Tensor, targets: Tensor) -> float:
    """Return a metric by scikit-learn."""
    predicted = outputs.argmax(1)
    occurring = sorted({*targets.tolist(), *predicted.tolist()})
    labels = {"labels": range(outputs.shape[1])}
    return {
        "accuracy": lambda: sklearn_metrics.accuracy_score(targets, predicted),
        "token_accuracy": lambda: sklearn_metrics.accuracy_score(targets, predicted),
        "top5_accuracy": lambda: sklearn_metrics.top_k_accuracy_score(targets, outputs, k=5, **labels),
        "f1": lambda: sklearn_metrics.f1_score(targets, predicted, average="macro"),
        "mean_iou": lambda: sklearn_metrics.jaccard_score(targets, predicted, average="macro", labels=occurring),
        "cross_entropy": lambda: sklearn_metrics.log_loss(targets, outputs.double().softmax(1), **labels),
        "perplexity": lambda: math.exp(sklearn_metrics.log_loss(targets, outputs.double().softmax(1), **labels)),
    }[name]()


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.of_classes])
def test_metrics_of_classes_are_those_of_scikit_learn_in_any_batches(name: str) -> None:
    outputs, targets = scores()
    metric = find(name)
    expected = of_sklearn(name, outputs, targets)
    assert compute(metric, outputs, targets) == pytest.approx(expected, rel=1e-6)
    state = None
    for part in torch.arange(len(targets)).split(9):
        state = metric.add(state, outputs[part], targets[part])
    assert metric.value(state) == pytest.approx(expected, rel=1e-6)
    tokens = outputs.view(8, 5, 7), targets.view(8, 5)  # of sequences, with the classes last or second
    padded = torch.cat([tokens[1], torch.full((8, 1), -100)], 1), torch.cat([tokens[0], torch.randn(8, 1, 7)], 1)
    assert compute(metric, *tokens) == pytest.approx(expected, rel=1e-6)
    assert compute(metric, tokens[0].movedim(2, 1), tokens[1]) == pytest.approx(expected, rel=1e-6)
    assert compute(metric, padded[1], padded[0]) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=4, max_size=20),
    st.integers(1, 5),
    st.sampled_from([0.0, 1e5]),
)
def test_metrics_of_numbers_are_those_of_scikit_learn_in_any_batches(
    pairs: list[tuple[float, float]], size: int, offset: float
) -> None:
    outputs, targets = (torch.tensor(side, dtype=torch.float64) + offset for side in zip(*pairs, strict=True))
    expected = {
        "mse": sklearn_metrics.mean_squared_error(targets, outputs),
        "mae": sklearn_metrics.mean_absolute_error(targets, outputs),
    }
    if targets.std() > 1e-3:
        expected["r2"] = sklearn_metrics.r2_score(targets, outputs)
    for name, value in expected.items():
        metric, state = find(name), None
        for part in torch.arange(len(pairs)).split(size):
            state = metric.add(state, outputs[part], targets[part])
        assert metric.value(state) == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_r2_of_several_outputs_is_their_mean_and_of_equal_targets_it_is_not_defined() -> None:
    outputs, targets = torch.randn(9, 3), torch.randn(9, 3)
    assert compute(METRICS["r2"], outputs, targets) == pytest.approx(sklearn_metrics.r2_score(targets, outputs))
    assert math.isnan(compute(METRICS["r2"], outputs, torch.ones(9, 3)))


def test_an_output_that_is_nan_counts_as_wrong() -> None:
    outputs, targets = torch.eye(6), torch.arange(6)
    outputs[2, 0] = math.nan
    assert compute(ACCURACY, outputs, targets) == compute(find("top5_accuracy"), outputs, targets) == 5 / 6
    assert compute(find("mean_iou"), outputs, targets) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "said"),
    [
        ("accuracy", torch.zeros(3, 2), torch.zeros(3), "it needs class numbers as targets"),
        ("f1", torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), "one more dimension than the targets"),
        ("mean_iou", torch.zeros(3, 2), torch.tensor([0, 1, 2]), "targets in 0..1 for outputs of 2 classes, got 0..2"),
        ("perplexity", torch.zeros(3, 4, 4), torch.zeros(3, 4, dtype=torch.int64), "do not show whether the classes"),
        ("top5_accuracy", torch.zeros(3, 4), torch.tensor([0, 1, 2]), "five classes or more, got 4"),
        ("mse", torch.zeros(3, 1), torch.zeros(3), "one output for each target, got outputs of shape (3, 1)"),
    ],
)
def test_a_metric_refuses_what_it_cannot_take(name: str, outputs: Tensor, targets: Tensor, said: str) -> None:
    with pytest.raises(UserError) as caught:
        compute(find(name), outputs, targets)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mse", functional.mse_loss),
        ("mae", functional.l1_loss),
        ("huber", functional.smooth_l1_loss),
        ("binary_cross_entropy", lambda o, t: functional.binary_cross_entropy(o.sigmoid(), t)),
    ],
)
def test_losses_by_name(name: str, expected: Callable[[Tensor, Tensor], Tensor]) -> None:
    outputs, targets = torch.randn(6, 2), torch.rand(6, 2)
    assert LOSSES[name](outputs, targets).item() == pytest.approx(expected(outputs, targets).item(), rel=1e-5)
    with pytest.raises(UserError, match=r"outputs of shape \(6, 2\) and targets of shape \(6,\)"):
        LOSSES[name](outputs, targets[:, 0])
    assert binary_cross_entropy(torch.zeros(2), torch.tensor([True, False])).item() == pytest.approx(math.log(2))


def test_outputs_of_each_token_are_not_kept_and_a_loss_of_rows_is_computed_at_once() -> None:
    seen: list[tuple[int, ...]] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(tuple(outputs.shape))
        return functional.cross_entropy(outputs.movedim(-1, 1), targets)

    inputs, targets = torch.randn(1200, 3, 4), torch.randint(4, (1200, 3))
    data = Dataset("tokens", inputs, targets, inputs, targets, ())
    values, mean = measure(nn.Identity(), data, loss, [find("perplexity"), find("loss")])
    assert seen == [(500, 3, 4), (500, 3, 4), (200, 3, 4)]
    seen.clear()
    measure(nn.Flatten(0, 1), data, lambda outputs, targets: loss(outputs, targets.flatten()), [])
    assert seen == [(1500, 4), (1500, 4), (600, 4)], "one row for each token"
    assert mean == values["loss"] == pytest.approx(functional.cross_entropy(inputs.movedim(2, 1), targets).item())
    assert values["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    seen.clear()
    rows = Dataset("rows", inputs[:, 0], targets[:, 0], inputs[:, 0], targets[:, 0], tuple("abcd"))
    assert evaluate(nn.Identity(), rows, loss)[1] is not None
    assert seen == [(1200, 4)]


@pytest.mark.parametrize("outputs", [(600, 2, 3), (600, 3)])
def test_a_loss_that_writes_to_its_targets_leaves_those_of_the_data(outputs: tuple[int, ...]) -> None:
    def overwrite(outputs: Tensor, targets: Tensor) -> Tensor:
        targets.zero_()
        return outputs.mean()

    inputs, targets = torch.randn(outputs), torch.randint(1, 3, outputs[:-1])
    data = Dataset("small", inputs, targets, inputs, targets.clone(), ())
    measure(nn.Identity(), data, overwrite, [find("accuracy")])
    assert data.test_labels.equal(targets)


def test_metrics_are_computed_in_float32_whatever_the_network_is() -> None:
    kinds: list[torch.dtype] = []

    def multiply(_: object, outputs: Tensor, targets: Tensor) -> Tensor:
        kinds.append((outputs.T @ outputs).dtype)
        return outputs

    def square(outputs: Tensor) -> float:
        kinds.append((outputs.T @ outputs).dtype)
        return 0.0

    inputs, targets = torch.randn(8, 3), torch.randint(3, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        noted = replace(ACCURACY, key="noted", add=multiply, value=square)
        measure(nn.Identity(), Dataset("small", inputs, targets, inputs, targets), functional.cross_entropy, [noted])
    assert kinds == [torch.float32, torch.float32]


def test_a_loss_that_is_not_finite_is_none() -> None:
    inputs, targets = torch.randn(8, 3), torch.randint(3, (8,))
    data = Dataset("small", inputs, targets, inputs, targets)
    assert measure(nn.Identity(), data, lambda *_: torch.tensor(math.inf), [LOSS]) == ({"loss": None}, None)


# histories


def test_a_history_without_other_metrics_is_the_document_that_it_was() -> None:
    old = {"losses": [0.5], "test_accuracy": 0.8, "test_loss": 0.6, "diverged_at": None}
    history = History.from_json(HistoryDocument.model_validate(old).model_dump())
    assert history.to_json() == old
    assert history.has(Measure())
    assert not history.has(MSE)
    more = replace(history, metrics={"test": {"mse": 0.25, "x": None}, "validation": {"accuracy": 0.7}})
    assert History.from_json(HistoryDocument.model_validate(more.to_json()).model_dump()) == more
    assert (more.value(MSE), more.value(Measure(split="validation")), more.value(Measure())) == (0.25, 0.7, 0.8)
    assert replace(History(), diverged_at=3).has(MSE)


def test_histories_are_compared_in_the_metrics_that_both_have() -> None:
    one = History(test_accuracy=0.8, test_loss=0.6)
    other = History(test_loss=0.6, metrics={"test": {"mse": 0.25}})
    assert first_in_histories(one, other) is None
    assert first_in_histories(other, one) is None
    assert first_in_histories(one, replace(one, diverged_at=1)) == "diverged_at: None in the store, 1 now"
    changed = replace(other, metrics={"test": {"mse": 0.5}})
    assert first_in_histories(other, changed) == "test mse: 0.25 in the store, 0.5 now"


# the validation set


def test_a_validation_set_is_carved_by_a_fixed_rule() -> None:
    data = tombola.datasets.load("digits", None)
    found = split_validation(data, 0.1)
    assert (len(found.train_labels), len(found.validation_labels), len(found.test_labels)) == (1217, 135, 445)  # type: ignore[arg-type]
    assert found.fingerprint == split_validation(data, 135).fingerprint != data.fingerprint
    together = torch.cat([found.train_inputs, found.validation_inputs]).flatten(1)  # type: ignore[list-item]
    assert sorted(together.tolist()) == sorted(data.train_inputs.flatten(1).tolist())
    assert found.test_inputs is data.test_inputs
    assert (data.judged_on, found.judged_on) == ("test", "validation")
    with pytest.raises(UserError, match="has a validation set of its own"):
        split_validation(found, 0.1)
    with pytest.raises(UserError, match="0 of the 1352 train examples"):
        split_validation(data, 1e-5)
    with pytest.raises(UserError, match="validation set: inputs and labels must be tensors"):
        replace(data, validation_inputs=data.test_inputs)


@pytest.mark.parametrize("value", [0, 1.0, -0.1, True, "0.1", math.nan])
def test_a_validation_set_is_a_share_or_a_number(value: object) -> None:
    with pytest.raises(UserError, match=r"task\.validation: expected a share between 0 and 1, or a number of examples"):
        load_study("digits", {"task.validation": value})


# directions


def rows_of(measure: Measure, values: dict[tuple[str, int], float]) -> list[Row]:
    return [
        Row(name, 0, level, 0.5**level, value, 8, 0.1, False, measure=measure)
        for (name, level), value in values.items()
    ]


def test_where_lower_is_better_the_lowest_is_best_and_a_rise_loses() -> None:
    values = {("a", 0): 4.0, ("a", 1): 4.01, ("a", 2): 4.3, ("b", 0): 4.0, ("b", 1): 3.0, ("b", 2): 2.0}
    found = rows_of(MSE, values)
    assert table2(found, ["a", "b"]).best(1) == {"b"}
    table = select_winners(by_level(found, margin=0.005))  # of 4.0: 0.02
    assert table.select("importance", "level", "dense_mse", "mse").rows() == [("a", 1, 4.0, 4.01), ("b", 2, 4.0, 2.0)]
    higher = rows_of(replace(MSE, higher_is_better=True), values)
    assert table2(higher, ["a", "b"]).best(1) == {"a"}
    assert select_winners(by_level(higher, margin=0.005))["level"].to_list() == [2, 0]


def test_an_interval_counts_on_its_worse_side() -> None:
    pairs = ((0, 4.0, 3.0), (1, 4.0, 3.9), (2, 4.0, 3.5))
    found = [
        Row("a", seed, level, 1.0, value, 8, 0.1, False, measure=MSE)
        for seed, *both in pairs
        for level, value in enumerate(both)
    ]
    line = by_level(found, margin=0.0).rows(named=True)[-1]
    assert line["keeps"]
    assert line["high"] > 0
    assert line["surely"] is False
    assert by_level(found, margin=0.5).rows(named=True)[-1]["surely"] is True


# bad input


def refuse(overrides: dict[str, Any], **task: Any) -> str:
    study = load_study("digits", overrides | {f"task.{name}": value for name, value in task.items()})
    with pytest.raises(UserError) as caught:
        try_out(load_problem(study.task), study)
    return str(caught.value)


REGRESSION = {
    "dataset": "regression_task:dataset",
    "model": "regression_task:model",
    "model_arguments": {},
    "loss": "mse",
    "metrics": ["r2"],
}


def test_a_metric_may_return_a_number_that_has_a_gradient() -> None:
    def learned(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.tensor(0.5, requires_grad=True)

    learned.higher_is_better = True  # type: ignore[attr-defined]
    assert compute(as_metric(learned, "learned", "k"), *scores()) == 0.5


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"metrics": ["r3"]}, "task.metrics: unknown metric 'r3'; choose from 'accuracy'"),
        (
            {"metrics": ["accuracy"]},
            "task.metrics 'accuracy': it needs class numbers as targets (int64), got torch.float32; for numbers",
        ),
        (
            {"metrics": ["regression_task:without_direction"]},
            "which way is better; set without_direction.higher_is_better",
        ),
        ({"metrics": ["regression_task:nothing"]}, "task.metrics 'nothing': on a few examples of the test set"),
        ({"metrics": ["regression_task:several"]}, "'several': expected one number, got a tensor of shape (64, 1)"),
        (
            {"metrics": ["torchmetrics.regression:R2Score"]},
            "torchmetrics is not installed: pip install 'tombola[metrics]'",
        ),
        ({"model": "regression_task:flat"}, "task.loss 'mse': it needs one output for each target"),
        ({"loss": "binary_cross_entropy"}, "task.loss 'binary_cross_entropy': it needs targets in 0..1, got -"),
        ({"loss": "l1"}, "task.loss: unknown loss 'l1'"),
        ({"validation": 300}, "300 of the 300 train examples of 'diabetes'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(
    task: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert said in refuse({}, **REGRESSION | task)


def test_classes_and_metrics_of_numbers_do_not_fit() -> None:
    assert "task.metrics 'r2': it needs one output for each target" in refuse({}, metrics=["r2"])
    with pytest.raises(UserError, match=r"task.metrics: 'r2' is named more than once"):
        load_study("digits", {"task.metrics": ["r2", "r2"]})


def test_a_metric_with_a_state_is_updated_batch_by_batch() -> None:
    bias = as_metric(regression_task.Bias, "Bias", "k")
    draw = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(9, generator=draw), torch.randn(9, generator=draw)
    state = bias.add(bias.add(None, outputs[:5], targets[:5]), outputs[5:], targets[5:])
    assert bias.value(state) == pytest.approx(float((outputs - targets).mean()), abs=1e-6)  # sums are in float32
    with pytest.raises(UserError, match="cannot be called 'level'"):
        as_metric(regression_task.largest_error, "level", "k")


# a regression from beginning to end


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers_here: None) -> Path:
    (tmp_path / "diabetes.toml").write_text(
        'importances = ["magnitude", "l1"]\nseeds = [0, 1]\nlevels = 1\n[task]\ndataset = "regression_task:dataset"\n'
        'model = "regression_task:model"\nloss = "mse"\nmetrics = ["r2", "regression_task:largest_error"]\n'
        "validation = 0.2\n[recipe]\nepochs = 5\nlr = 0.05\nbatch_size = 32\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_regression_is_judged_by_its_own_metric_on_the_validation_set(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tombola.reporting.page._library", str)  # it takes seconds, and nothing is drawn here
    assert main(["run", "diabetes.toml", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "level 0, density 100.00 %: validation R2 0." in printed
    assert "validation R2 on diabetes, mean ± std over 2 seeds; best *\n" in printed
    names = {path.parent.name for path in folder.glob("tombola-store/results/*/*/result.json")}

    found = tombola.results("diabetes.toml")
    planner = open_planner("diabetes.toml")
    ticket = Tickets(planner).measure(Chain(1, "l1"))[1]
    model = planner.problem.build()
    ticket.apply(model, trained=True)
    line = found.filter(seed=1, importance="l1", level=1).row(0, named=True)
    data = planner.problem.data
    for split, targets in (("validation", data.validation_labels), ("test", data.test_labels)):
        outputs = predict(model, data, split=split)
        assert targets is not None
        assert line[f"{split}_r2"] == pytest.approx(sklearn_metrics.r2_score(targets, outputs), abs=1e-6)
        assert line[f"{split}_largest_error"] == pytest.approx(float((outputs - targets).abs().max()), abs=1e-6)
    assert "test_accuracy" not in line

    table = tombola.winners("diabetes.toml", margin=1.0)
    assert table["level"].to_list() == [1, 1]
    assert table["r2"][1] == pytest.approx(found.filter(importance="l1", level=1)["validation_r2"].mean())
    capsys.readouterr()
    assert main(["winners", "diabetes.toml", "--margin", "100"]) == 0
    captured = capsys.readouterr()
    assert "dense R2" in captured.out
    assert "accuracy" not in captured.out
    assert "test set" not in captured.err
    assert main(["report", "diabetes.toml", "-o", "report.html"]) == 0
    page = (folder / "report.html").read_text()
    for text in ("Sparsest tickets that keep the R2", "R2 against sparsity", "Validation R2 of the dense network"):
        assert text in page

    # another metric needs no other training: it is computed from the stored weights, once
    capsys.readouterr()
    other = ["diabetes.toml", "--task.metrics", "mse", "r2", "mae"]
    assert main(["run", *other, "--workers", "1"]) == 0
    assert "validation MSE on diabetes, mean ± std over 2 seeds; best * (lowest)\n" in capsys.readouterr().out
    assert {path.parent.name for path in folder.glob("tombola-store/results/*/*/result.json")} == names
    results = Results(folder / "tombola-store")
    key = min(names)
    kept = results.metrics(key)
    assert {*kept["validation"]} == {"mse", "r2", "mae", "loss"}
    path = results.folder(key) / "metrics.json"
    changed = json.loads(path.read_text())
    changed["metrics"]["test"]["mae"] += 0.1
    path.write_text(json.dumps(changed))
    assert results.metrics(key) == {}
    before = tombola.results("diabetes.toml", {"task.metrics": ["mae"]})
    assert results.metrics(key)["test"]["mae"] == pytest.approx(kept["test"]["mae"])
    assert before.columns[4] == "validation_mae"
    assert main(["store", "check", "--store", "tombola-store"]) == 0


def test_the_value_of_an_edited_metric_is_not_used_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spread(outputs: Tensor, targets: Tensor) -> float:
        return float(outputs.std())

    def doubled(outputs: Tensor, targets: Tensor) -> float:
        return 2 * float(outputs.std())

    few = {"levels": 0, "seeds": [0], "importances": ["l1"], "task.validation": None}
    values = []
    for function in (spread, doubled):
        function.higher_is_better = True  # type: ignore[attr-defined]
        function.__name__ = "spread"
        (value,) = tombola.run("diabetes.toml", few | {"task.metrics": [function]}, progress=False)["test_spread"]
        values.append(value)
    assert values[1] == pytest.approx(2 * values[0])
    text = (folder / "diabetes.toml").read_text()
    (folder / "diabetes.toml").write_text(text.replace("validation = 0.2\n", ""))
    capsys.readouterr()
    assert main(["winners", "diabetes.toml", "--levels", "0", "--seeds", "0", "--importances", "l1"]) == 0
    assert "winners are chosen on the test set" in capsys.readouterr().err


def test_two_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two of them are called 'mse'"):
        check_names([find("mse"), find("mse")])


def test_an_own_metric_has_no_name_of_a_built_in_one() -> None:
    with pytest.raises(UserError, match="cannot be called 'accuracy', like a built-in one"):
        as_metric(mean_of_outputs, "accuracy", "own")


COUNT = itertools.count()


def mean_of_outputs(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.mean()


mean_of_outputs.higher_is_better = False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "msee"}, "unknown loss 'msee'; did you mean 'mse'"),
        ({"loss": "mse", "metrics": ["r3"]}, "unknown metric 'r3'"),
        ({"loss": "mse", "metrics": [3]}, "expected names of metrics or functions, got int"),
        ({"loss": "mse", "metrics": ["mse"], "prune": "*.weight"}, "prune: expected a list of patterns, got"),
    ],
)
def test_find_tickets_says_which_name_is_wrong(options: dict[str, Any], said: str) -> None:
    data = Dataset("line", torch.randn(8, 2), torch.randn(8, 1), torch.randn(4, 2), torch.randn(4, 1))
    with pytest.raises(UserError, match=said):
        find_tickets(nn.Linear(2, 1), data, Recipe(epochs=1, batch_size=4), magnitude, levels=0, **options)


def test_find_tickets_takes_names_and_functions() -> None:
    torch.manual_seed(0)
    data = Dataset("line", torch.randn(8, 2), torch.randn(8, 1), torch.randn(4, 2), torch.randn(4, 1))
    recipe = Recipe(epochs=1, batch_size=4)
    [ticket] = find_tickets(
        nn.Linear(2, 1), data, recipe, magnitude, levels=0, loss="mse", metrics=["r2", mean_of_outputs]
    )
    assert ticket.trained is not None
    assert set(ticket.trained.history.metrics["test"]) == {"r2", "mean_of_outputs"}


def unsteady(outputs: Tensor, targets: Tensor) -> float:
    return float(next(COUNT))


unsteady.higher_is_better = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        (torch.tensor([[0.0], [math.nan], [1.0], [2.0]]), {"loss": mse}, "the target of example 1 is NaN or infinite"),
        (torch.zeros(4, 1), {"loss": mse, "metrics": [as_metric(unsteady, "n", "n")]}, "different val"),
    ],
)  # fmt: skip
def test_targets_and_metrics_are_tried_out(labels: Tensor, options: dict[str, Any], said: str) -> None:
    data = Dataset("line", torch.randn(4, 2), labels, torch.randn(4, 2), torch.zeros(4, 1))
    with pytest.raises(UserError, match=said):
        try_network(lambda: nn.Linear(2, 1), options.pop("loss"), data, Recipe(epochs=1, batch_size=2), **options)


def test_classes_in_the_last_dimension_are_refused_with_what_to_do() -> None:
    tokens = torch.randint(7, (6, 7))
    data = Dataset("text", tokens, tokens, tokens, tokens)
    build = lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))  # noqa: E731
    with pytest.raises(UserError, match=r"takes the classes as the second dimension.* outputs\.transpose\(1, 2\)"):
        try_network(build, nn.functional.cross_entropy, data, Recipe(epochs=1, batch_size=3), [find("loss")])


def test_functions_of_torch_are_named_without_reading_torch() -> None:
    assert own_modules("torch.optim") == {}


class Recorded(nn.Module):
    """Gives the outputs of each example by its number."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, numbers: Tensor) -> Tensor:
        return self.outputs[numbers[:, 0]]


def test_the_loss_of_tokens_is_the_mean_over_those_that_count() -> None:
    draw = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(1203, 3, 4, generator=draw), torch.randint(3, (1203, 4), generator=draw)
    targets[torch.rand(targets.shape, generator=draw) < 0.3] = -100
    targets[400:1000, 1:] = -100
    for ignored in (slice(0), slice(500, 1000)):  # then a batch has no token that counts
        targets[ignored] = -100
        data = Dataset("text", torch.arange(2)[:, None], targets[:2], torch.arange(1203)[:, None], targets)
        found = measure(Recorded(outputs), data, functional.cross_entropy, [find("perplexity")])
        expected = float(functional.cross_entropy(outputs.double(), targets))
        assert found == ({"perplexity": pytest.approx(math.exp(expected))}, pytest.approx(expected))
