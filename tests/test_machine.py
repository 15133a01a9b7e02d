"""Kinds of machine: results of several never mix without a word."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from stores import InTurn, planner, results, study
from tombola.cli.results import show_results
from tombola.engine.job import Job, Outcome
from tombola.engine.machine import Kind, count_kinds, describe_kinds, kind, machine
from tombola.engine.run import Status, run
from tombola.engine.verify import list_places, verify_trainings
from tombola.reporting import findings
from tombola.reporting.contents import gather
from tombola.reporting.provenance import machines
from tombola.study.chains import Chain
from tombola.study.tickets import Tickets


def elsewhere(**changes: Any) -> dict[str, Any]:
    """Return a record of a training on a machine like this one, but for the changes."""
    about = json.loads(json.dumps(machine()))
    about["versions"]["torch"] = changes.pop("torch", about["versions"]["torch"])
    device = {"device": changes.pop("device")} if "device" in changes else {}
    return {"machine": about | changes, **device}


def rewrite(root: Path, number: int, record: dict[str, Any]) -> None:
    """Let the first stored results have another record."""
    for folder in results(root)[:number]:
        (folder / "record.json").write_text(json.dumps(record))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with a finished study."""
    run(planner(tmp_path / "store"), InTurn(last_first=False), lambda *_: None)
    return tmp_path / "store"


def test_a_record_has_the_vendor_and_the_kernels(root: Path) -> None:
    record = planner(root).store.results.record(results(root)[0].name)
    found = kind(record)
    assert found is not None
    assert record["machine"]["vendor"] == found.vendor == machine()["vendor"]
    assert found.kernels == machine()["kernels"]
    assert found.architecture == machine()["system"].split()[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"vendor": "another"},
        {"instruction_set": "another"},
        {"kernels": "another"},
        {"kernels": None},
        {"torch": "1.0"},
        {"system": "Linux another"},
        {"device": "NVIDIA H100"},
    ],
)
def test_what_makes_a_kind(changes: dict[str, Any]) -> None:
    other = kind(elsewhere(**changes))
    assert other is not None
    assert other != kind(elsewhere())
    assert count_kinds([elsewhere(), elsewhere(), elsewhere(**changes)]) == {kind(elsewhere()): 2, other: 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"python": "9"},
        {"commit": "x"},
        {"processor": "faster"},
        {"system": f"Other {machine()['system'].split()[-1]}"},
    ],
)
def test_what_does_not_make_a_kind(changes: dict[str, Any]) -> None:
    assert kind(elsewhere(**changes)) == kind(elsewhere())


@pytest.mark.parametrize("missing", ["vendor", "instruction_set", "kernels", "versions", "system"])
def test_a_record_without_one_of_the_fields_is_not_recorded(missing: str) -> None:
    record = elsewhere()
    del record["machine"][missing]
    assert kind(record) is None
    assert kind({}) is None
    assert kind({"machine": None}) is None


def test_a_sentence_says_which_kinds_there_are() -> None:
    one, other = (Kind(vendor, "AVX2", "avx2", "2.6.0", "x86_64") for vendor in ("GenuineIntel", "AuthenticAMD"))
    assert describe_kinds({}) is None
    assert describe_kinds({one: 3}) is None
    assert describe_kinds({one: 3, other: 2, None: 1}) == (
        "the trainings ran on 2 kinds of machine, whose bits can differ: "
        "3 on GenuineIntel x86_64 (torch 2.6.0 with AVX2, kernels with avx2), "
        "2 on AuthenticAMD x86_64 (torch 2.6.0 with AVX2, kernels with avx2); "
        "the kind of machine is not recorded for 1 of 6 trainings"
    )
    assert describe_kinds({None: 2}) == "the kind of machine is not recorded for 2 of 2 trainings"
    assert str(dataclasses.replace(one, kernels=None)).endswith("with AVX2, no kernels)")


LONGER = study(levels=2)


def notes(root: Path) -> list[str]:
    """Return the notes of a run that goes on with the study."""
    shown: list[list[str]] = []

    def show(status: Status, _: object) -> None:
        shown.append(list(status.notes))

    workers = InTurn(last_first=False)
    status = run(planner(root, LONGER), workers, show)
    assert status.done == len(workers.order) == 2
    assert shown[0] == status.notes, "it is said before anything is trained"
    return status.notes


def test_a_run_on_the_same_kind_of_machine_says_nothing(root: Path) -> None:
    rewrite(root, 4, elsewhere(processor="another of the same kind"))
    assert notes(root) == []


def test_a_run_that_continues_chains_of_another_kind_of_machine_says_so_once(root: Path) -> None:
    rewrite(root, 4, elsewhere(vendor="AcmeChips"))
    (note,) = notes(root)
    assert note == (
        "this run continues chains on another kind of machine than they were begun on, so that their tickets mix the "
        f"bits of several kinds: {kind(elsewhere(vendor='AcmeChips'))}, {kind(elsewhere())}"
    )


def test_a_finished_run_says_nothing_of_machines(root: Path) -> None:
    rewrite(root, 4, elsewhere(vendor="AcmeChips"))
    assert run(planner(root), InTurn(last_first=False), lambda *_: None).notes == []


def test_a_run_says_once_that_older_stores_do_not_record_it(root: Path) -> None:
    rewrite(root, 2, {})
    (note,) = notes(root)
    assert note == "this run continues chains with 2 trainings whose kind of machine is not recorded"


class Cluster(InTurn):
    """Workers of which all have another processor than this machine."""

    are_here = False
    in_other_processes = True

    def events(self, timeout: float) -> Any:
        for event in super().events(timeout):
            record = elsewhere(vendor="AcmeChips")
            yield dataclasses.replace(event, record=record) if isinstance(event, Outcome) else event


def test_a_cluster_that_mixes_kinds_in_a_chain_says_so_once(root: Path) -> None:
    status = run(planner(root, LONGER), Cluster(last_first=False), lambda *_: None)
    (note,) = status.notes
    assert "mix the bits of several kinds: " in note
    assert "AcmeChips" in note
    assert str(kind(elsewhere())) in note


def test_a_cluster_of_one_other_kind_mixes_nothing(tmp_path: Path) -> None:
    assert run(planner(tmp_path / "store"), Cluster(last_first=False), lambda *_: None).notes == []


def test_results_and_report_say_where_results_are_of_several_kinds(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_results(Tickets(planner(root)), "table")
    assert "kind" not in capsys.readouterr().out
    assert not [each for each in findings.findings(gather(planner(root), "s", ["s"])) if "machine" in each.title]
    rewrite(root, 1, elsewhere(vendor="AcmeChips"))
    show_results(Tickets(planner(root)), "table")
    out = capsys.readouterr().out
    line = out.splitlines()[-1]
    assert line.startswith("the trainings ran on 2 kinds of machine, whose bits can differ: 3 on ")
    assert ", 1 on AcmeChips " in line
    contents = gather(planner(root), "s", ["s"])
    (finding,) = [each for each in findings.findings(contents) if each.title == "Kinds of machine"]
    assert finding.figure == "2"
    assert finding.text == f"{line[0].upper()}{line[1:]}."
    assert [each["vendor"] for each in machines(contents.records)] == [machine()["vendor"], "AcmeChips"]
    show_results(Tickets(planner(root)), "csv")
    assert "kinds of machine" not in capsys.readouterr().out


def test_verification_says_which_kinds_were_compared(root: Path) -> None:
    rewrite(root, 1, elsewhere(vendor="AcmeChips"))
    of = planner(root)
    found = list(verify_trainings(list_places([(of, of.chains)]), InTurn(last_first=False)))
    (other,) = [finding for finding in found if finding.kinds]
    assert other.key == results(root)[0].name
    assert other.kinds == (kind(elsewhere(vendor="AcmeChips")), kind(elsewhere()))
    assert any(phrase.startswith("vendor: 'AcmeChips' then, ") for phrase in other.machine)


def test_a_job_is_recorded_with_its_machine(root: Path) -> None:
    training = planner(root).progress(Chain(0, "l1")).trainings[0]
    assert Job.of(training, study()).key == training.key
    assert kind(planner(root).store.results.record(training.key)) == kind({"machine": machine()})
