"""Values of options: whatever a user types after an option is understood or refused in one short sentence."""

# ruff: noqa: E501 (the sentences stand in tables, one a line)

from __future__ import annotations

import argparse
import contextlib
import io
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tombola.cli.main import main, make_parser
from tombola.cli.options import open_study, overrides, parse_value
from tombola.cli.store import store as _store_verb
from tombola.errors import UserError
from tombola.study.schema import load_study
from tombola.training.recipe import Augmentation, Recipe

VERBS = {
    "plan": ["--workers"],
    "run": ["--per-gpu", "--engine", "--address"],
    "results": ["--format"],
    "claims": ["--level"],
    "overlap": ["--level"],
    "stability": ["--level", "--layer"],
    "winners": ["--margin"],
    "connectivity": ["--points", "--level"],
    "reinit": ["--draws", "--level"],
    "verify": ["--sample"],
    "export": ["--seed", "--level", "--importance", "-o"],
    "report": ["--level", "-o", "--margin"],
    "figures": ["--columns", "--format", "-o"],
    "watch": ["--port"],
}
"""A verb about a study -> some options of it; those of the study's fields belong to every verb."""

FIELDS = [
    "--seeds", "--levels", "--fraction", "--importances", "--data-seeds", "--exclude", "--device", "--task.dataset",
    "--task.model", "--task.loss", "--task.model-arguments", "--task.dataset-arguments", "--recipe.lr",
    "--recipe.gamma", "--recipe.milestones", "--recipe.epochs", "--recipe.iterations", "--recipe.batch-size",
    "--recipe.augmentation.crop", "--recipe.augmentation.flip", "--recipe.warmup", "--recipe.optimizer",
]  # fmt: skip

NUMBERS = st.one_of(
    st.integers().map(str),
    st.integers(1, 4).map(lambda power: "9" * 10**power),
    st.integers(0, 400).map(lambda power: f"1e{power}"),
    st.floats().map(repr),
    st.sampled_from(["0x10", "1_000", "٣", "½", "-0", "+1", "1e-400", "inf", "-nan", "1979-05-27", "true", "²"]),
)
DEEP = st.integers(1, 4).map(lambda power: "[" * 10**power + "]" * 10**power)
TABLES = st.integers(1, 3).map(lambda power: "{a=" * 10**power + "1" + "}" * 10**power)
LINES = st.builds("{}\n{} = {}".format, NUMBERS, st.sampled_from(["fraction", "value", "[x]"]), NUMBERS)
VALUES = st.one_of(NUMBERS, DEEP, TABLES, LINES, st.text(max_size=20), st.text("[]{}=,\"'1a.\n#", max_size=12))


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    verb = draw(st.sampled_from(sorted(VERBS)))
    words = [verb, "digits"]
    for option in draw(st.lists(st.sampled_from([*VERBS[verb], *FIELDS]), min_size=1, max_size=3, unique=True)):
        words += [option, *draw(st.lists(VALUES, min_size=1, max_size=2))]
    return words


@settings(max_examples=120)
@given(command_lines())
@example(["reinit", "digits", "--level", "1", "--draws", "1000000000000"])
@example(["plan", "digits", "--levels", "1\nfraction = 0.5"])
def test_no_value_of_an_option_raises(words: list[str]) -> None:
    """The options are parsed and the study is loaded; the verb itself is not called."""

    def load(verb: object, options: argparse.Namespace, *, ends: bool) -> int:
        assert verb is not _store_verb
        assert not ends
        open_study(options)
        return 0

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys.modules["tombola.cli.main"], "_call", load)
        status = main(words)
    assert status in (0, 2)
    assert len(said.getvalue()) < 3000
    assert said.getvalue().count("\n") <= 1 + (status == 0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["reinit", "--level", "1", "--draws", "1" + 12 * "0"], "--draws: expected a whole number from 1 to 1000, got '1000"),
        (["connectivity", "--points", "1" + 14 * "0"], "--points: expected a whole number from 2 to 1001, got '1000000000"),
        (["verify", "--sample", "1" + 20 * "0"], "--sample: expected a whole number from 1 on, got '1000000000000000000"),
        (["plan", "--workers", "9" * 5000], "--workers: expected a whole number from 1 to 10000, got '9999"),
        (["watch", "--port", "65536"], "--port: expected a whole number from 0 to 65535, got '65536'"),
        (["plan", "--levels", "9" * 5000], "levels: expected a whole number, got '9999"),
        (["plan", "--levels", "1\nfraction = 0.5"], "levels: expected a whole number, got '1\\nfraction = 0.5'"),
        (["plan", "--levels", "[" * 3000 + "]" * 3000], "--levels: '[[[["),
        (["plan", "--task.model-arguments", "width=" + "[" * 3000], "--task.model-arguments: '[[[["),
        (["plan", "--seeds", *map(str, range(1001))], "seeds: expected at most 1000 values, got 1001"),
        (["plan", "--data-seeds", *map(str, range(5, 1006))], "data_seeds: expected at most 1000 values, got 1001"),
        (
            ["plan", "--seeds", *map(str, range(101)), "--data-seeds", *map(str, range(200, 300))],
            " chains of tickets, expected at most 10000; name fewer of them, or write several studies",
        ),
        (["plan", "--seeds", "1" + 30 * "0"], "seeds.0: expected a number up to 9.22337e+18, got 1000"),
        (["plan", "--recipe.gamma", "1e200", "--recipe.schedule", "milestones", "--recipe.milestones", "1", "2"],
         "recipe: gamma: at the last milestone, the learning rate would be more than e^88"),
        (["plan", "--recipe.iterations", "1" + 12 * "0"], "a training would have 1000000000000 iterations; at most 1000000000 are"),
        (["plan", "--recipe.epochs", "1" + 17 * "0"], "iterations; at most 1000000000 are possible"),
        (["plan", "--recipe.augmentation.crop", "1" + 12 * "0"], "recipe.augmentation.crop: 1000000000000 is more than the 8 pixels of a side"),
        (["plan", "--task.model-arguments", "inputs=1000000000000"], "inputs: expected a whole number from 1 to 1000000000, got 1000000000000"),
        (["plan", "--task.model-arguments", "inputs=1" + 25 * "0"], "inputs: expected a whole number from 1 to 1000000000, got 1"),
        (["plan", "--levels", "1" + 15 * "0"], "levels: 1000000000000000 are too many"),
        (["plan", "--task.model", "x" * 100_000], "task.model: unknown model 'xxxx"),
    ],
)  # fmt: skip
def test_numbers_out_of_bounds(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([words[0], "digits", *words[1:]]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert len(said.err) < 2100
    assert said.out == ""


@given(value=VALUES)
def test_a_value_in_a_file_raises_nothing_else(value: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(f"levels = {value}".encode(errors="surrogatepass"))
    with pytest.raises(UserError) as refused:
        load_study(str(path))
    assert len(str(refused.value)) < 1000


def test_a_library_refuses_numbers_of_thousands_of_digits() -> None:
    with pytest.raises(
        UserError, match=r"levels: expected a number up to .* a value of type int that is too long to pr"
    ):
        load_study("digits", {"levels": 10**5000})


def test_overrides_have_one_field_each() -> None:
    options = make_parser().parse_args(["plan", "digits", "--levels", "1\nfraction = 0.5"])
    assert overrides(options) == {"levels": "1\nfraction = 0.5"}
    assert parse_value("1\n") == 1


def test_learning_rates_stay_finite() -> None:
    recipe = Recipe(epochs=9, lr=1.0, gamma=10.0, schedule="milestones", milestones=(1, 2, 3))
    assert recipe.lr_at(10**6, 1) == 1000.0
    with pytest.raises(ValueError, match="gamma: at the last milestone"):
        Recipe(epochs=99, lr=1.0, gamma=10.0, schedule="milestones", milestones=tuple(range(1, 40)))
    assert Augmentation(crop=4).crop == 4
