"""Surroundings: a terminal, a folder, an environment or a process that is not as it should be; never a traceback."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, process, util
from pathlib import Path

import pytest

from processes import LONG, wait_for_end
from small_study import STUDY
from stores import content, run_study
from tombola.cli import main
from tombola.cli.tables import emit, reserve_output
from tombola.engine import local
from tombola.engine.local import LocalWorkers
from tombola.errors import UserError
from tombola.study.schema import presets
from tombola.workbench.path import find_modules

pytestmark = pytest.mark.xdist_group("processes")  # the process that workers are copies of starts once


def test_a_system_without_locks_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    for verb in ("run", "plan"):
        assert main([verb, "digits", "--store", str(tmp_path / "store")]) == 2
        assert "need Linux or macOS; on Windows" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_all_characters(
    encoding: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["results", *STUDY], ["presets"], ["layers", *STUDY]):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding))
        assert main([*arguments, *(["--store", str(finished)] if arguments[1:] else [])]) == 0
        sys.stdout.flush()
        assert out.getvalue().decode(encoding)
    assert "Traceback" not in capsys.readouterr().err


def test_output_on_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["presets"]) == 2
    assert capsys.readouterr().err == ("tombola: the output cannot be written or read: No space left on device\n")


def test_output_into_a_full_pipe_that_does_not_wait_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(2**16))
    with os.fdopen(reader), os.fdopen(writer, "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["presets"]) == 2
    assert "tombola: the output cannot be written or read: write could not" in capsys.readouterr().err


def test_a_file_system_that_goes_away_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **how: bool) -> int:
        raise OSError(errno.ESTALE, "Stale file handle", "/net/store")

    monkeypatch.setattr(sys.modules["tombola.cli.main"], "_call", fail)
    assert main(["presets"]) == 2
    assert capsys.readouterr().err == "tombola: /net/store cannot be written or read: Stale file handle\n"


@pytest.mark.parametrize(
    "error", [BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), RuntimeError("can't start new thread")]
)
def test_a_limit_of_processes_is_said(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fork(*_: object, **how: bool) -> int:
        raise error

    monkeypatch.setattr(sys.modules["tombola.cli.main"], "_call", fork)
    assert main(["presets"]) == 2
    assert "tombola: the system allows no more processes" in capsys.readouterr().err


def test_a_mistake_is_no_failure_where_standard_error_is_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["run", "nonsense"]) == 2
        full.flush()  # nothing is left that Python would write at its end, and fail


def test_ctrl_c_is_no_failure_where_standard_error_is_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **how: bool) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["tombola.cli.main"], "_call", stop)
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["presets"]) == 130
        full.flush()


def test_a_thread_that_has_ended_is_not_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    module = sys.modules["tombola.cli.main"]
    monkeypatch.setattr(module, "end_at_once", ended.append)
    for threads in ([threading.main_thread()], [threading.main_thread(), threading.Thread()]):
        monkeypatch.setattr(threading, "enumerate", lambda threads=threads: threads)
        module._end_without_threads(2)
        assert bool(capsys.readouterr().err) == bool(ended) == (len(threads) > 1)


LEFT = """
import sys, threading
from tombola.cli import main
sys.modules["tombola.cli.main"]._PATIENCE = 0.0
threading.Thread(target=threading.Event().wait).start()
sys.argv[1:] = ["run", "nonsense"]
sys.exit(main())
"""


def test_a_thread_that_goes_on_does_not_keep_the_command_from_ending() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=False, timeout=LONG)
    assert done.returncode == 2
    mistake, thread = done.stderr.splitlines()
    assert mistake.startswith("tombola: study 'nonsense' is neither")
    assert thread == "tombola: a thread of the study's code still runs after 0 s; the command ends without it"


def test_closed_streams_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["presets"]) == 0
    assert main(["run", "nonsense"]) == 2
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def test_what_a_program_prints_is_not_in_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of standard output is that of standard error meanwhile."""
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as output, err.open("w") as errors:
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stderr", errors)
        monkeypatch.setattr(sys, "__stdout__", output)
        library = ctypes.CDLL(None)
        library.fdopen.restype = ctypes.c_void_p
        stream = ctypes.c_void_p(library.fdopen(output.fileno(), b"w"))
        with reserve_output():
            os.write(output.fileno(), b"a program\n")
            print("a module")
            library.fputs(b"a library\n", stream)
            print("a module that goes round", file=sys.__stdout__)
            emit("[]")
        print("later")
    assert out.read_text() == "[]\nlater\n"
    lines = ["a library", "a module", "a module that goes round", "a program"]
    assert sorted(err.read_text().splitlines()) == lines, "what has its own buffer comes later"


def test_what_is_printed_when_the_program_ends_is_not_in_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's module may print from `atexit`, a library in C may empty its buffer there."""
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as output, err.open("w") as errors:
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stderr", errors)
        monkeypatch.setattr(sys, "argv", ["tombola", "presets", "--format", "json"])
        assert main() == 0
        os.write(output.fileno(), b"at the end\n")
        print("at the very end")
    assert json.loads(out.read_text())
    assert err.read_text() == "at the end\nat the very end\n"


def test_an_output_that_the_code_of_a_study_closes_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    closed = io.StringIO()
    closed.close()
    said = "tombola: the code of the study closed the standard output; leave it open\n"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert main(["presets"]) == 2
        assert capfd.readouterr().err == said

    def remove(*_: object, **how: bool) -> int:
        sys.stdout = None  # type: ignore[assignment]
        return 0

    def close(*_: object, **how: bool) -> int:
        with reserve_output():
            sys.stdout.close()  # it is standard error
            print("more")
        return 0

    def close_and_ask_for_what_is_not_there(*_: object, **how: bool) -> int:
        sys.stderr.close()
        raise UserError("levels: too many")

    for call, text in (
        (remove, said),
        (close, said),
        (close_and_ask_for_what_is_not_there, "tombola: levels: too many\n"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", sys.stdout)
            patch.setattr(sys, "stderr", os.fdopen(2, "w", 1, closefd=False))
            patch.setattr(sys.modules["tombola.cli.main"], "_call", call)
            assert main(["presets"]) == 2
            assert capfd.readouterr().err == text


def test_a_working_directory_that_was_removed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert main(["run", "digits"]) == 2
    assert capsys.readouterr().err == "tombola: the working directory has been removed; change to another one\n"


def test_a_path_that_is_not_utf_8_is_written_with_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = os.fsdecode(b"./\xff.toml")
    assert main(["run", path]) == 2
    assert "\\udcff.toml: cannot be read: No such file or directory" in capsys.readouterr().err
    Path(path).write_text("levels = ")
    assert main(["run", path]) == 2
    assert "\\udcff.toml: is not valid TOML" in capsys.readouterr().err


def test_a_report_on_a_study_whose_path_is_not_utf_8(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"st\xffudy.toml")
    Path(name).write_bytes(presets()["digits"].read_bytes())
    assert main(["report", f"./{name}", *STUDY[1:], "--store", str(finished), "-o", "r.html"]) == 0
    assert "st\\udcffudy.toml" in Path("r.html").read_text()


@pytest.mark.parametrize("name", ["torch", "numpy", "rich", "tombola", "PIL", "scipy", "sympy", "typing_extensions"])
def test_a_file_that_hides_a_package_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / f"{name}.py").write_text("raise SystemExit")
    with pytest.raises(
        UserError, match=rf"{name}\.py: its name hides the package '{name}', which tombola needs; rename"
    ):
        find_modules([tmp_path])
    assert str(tmp_path) not in sys.path


def test_other_files_and_folders_hide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("models.py", "random.py", "_pytest.py", "torch.txt"):
        (tmp_path / name).touch()
    (tmp_path / "ray").mkdir()  # data, not a package
    find_modules([tmp_path, tmp_path / "missing"])
    assert str(tmp_path) in sys.path


def test_processes_of_workers_do_not_import_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('mine')")
    before = dict(os.environ)
    with local._safe_path():
        command = [sys.executable, "-c", "import random; print(random.__file__)"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=LONG)
    assert done.returncode == 0
    assert str(tmp_path) not in done.stdout
    assert dict(os.environ) == before


@pytest.fixture
def no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let multiprocessing choose its folder for sockets anew."""
    config = process.current_process()._config
    before = config.pop("tempdir", None)
    yield
    config["tempdir"] = before or config["tempdir"]  # both are removed when the process ends


def test_a_folder_for_temporary_files_may_have_a_long_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_temporary_folder: None
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    local._shorten_temporary_folder()
    assert len(util.get_temp_dir()) < 80
    assert tempfile.gettempdir() == str(long)


def test_the_process_that_workers_are_copies_of_may_be_killed(tmp_path: Path) -> None:
    run_study(tmp_path / "undisturbed", workers=1)
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGKILL)
    os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has noticed yet
    run_study(tmp_path / "store", workers=1)
    wait_for_end(server)
    assert content(tmp_path / "store") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("error", [EOFError(), ConnectionRefusedError(), BrokenPipeError()])
def test_a_worker_whose_start_fails_is_started_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def fail(setting: object) -> object:
        calls.append(setting)
        if len(calls) < local.TRIES:
            raise error
        return "worker"

    monkeypatch.setattr(local, "_PAUSE", 0.0)
    monkeypatch.setattr(local._Worker, "_start", fail)
    assert local._Worker.start("setting") == "worker"  # type: ignore[arg-type, comparison-overlap]
    monkeypatch.setattr(local, "TRIES", 1)
    calls.clear()
    monkeypatch.setattr(local._Worker, "_start", lambda setting: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match="a process that trains cannot be started: "):
        local._Worker.start("setting")  # type: ignore[arg-type]


def test_too_few_files_for_a_worker_are_said(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    def connect(*_: object) -> object:
        raise AssertionError("the process that workers are copies of would end with a traceback")

    monkeypatch.setattr(forkserver._forkserver, "connect_to_new_process", connect)
    monkeypatch.setattr(local, "_FILES", 300)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard)))
    with LocalWorkers(1, None, None, None) as workers, pytest.raises(UserError, match="Too many open files; fewer"):  # type: ignore[arg-type]
        workers.submit(None)  # type: ignore[arg-type]
