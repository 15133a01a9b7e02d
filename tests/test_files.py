"""Files that the user names: what is there is replaced as a whole, or written to where it is no regular file."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tombola import UserError
from tombola.files import write_output


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.write_bytes(b"before")
    link.symlink_to(target)
    write_output(link, b"after")
    assert link.is_symlink()
    assert target.read_bytes() == b"after"
    assert list((tmp_path / "folder").iterdir()) == [target]


def test_a_link_to_nothing_makes_the_file_that_it_names(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("new")
    write_output(link, b"content")
    assert link.is_symlink()
    assert (tmp_path / "new").read_bytes() == b"content"


def test_a_link_to_a_source_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_bytes(b"levels = 1")
    (tmp_path / "link").symlink_to("study.toml")
    with pytest.raises(UserError, match=r"link: is a \.toml file, which is not replaced; name another file"):
        write_output(tmp_path / "link", b"content")
    assert (tmp_path / "study.toml").read_bytes() == b"levels = 1"


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        write_output(tmp_path, b"content")


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.symlink_to(other)
    other.symlink_to(one)
    with pytest.raises(UserError, match="cannot be written"):
        write_output(one, b"content")
    assert one.is_symlink()
    assert other.is_symlink()


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write_output(pipe, b"x" * 200_000)  # more than a pipe holds
    reader.join()
    assert found == [b"x" * 200_000]
    assert pipe.is_fifo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full; to run: on Linux")
def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    for path in (link, Path("/dev/full")):
        with pytest.raises(UserError, match=r"/dev/full: cannot be written: No space left on device"):
            write_output(path, b"content")
        assert Path("/dev/full").is_char_device()
        assert link.is_symlink()
    write_output(Path("/dev/null"), b"content")
    assert Path("/dev/null").is_char_device()


def test_what_an_open_file_has_is_not_lost(tmp_path: Path) -> None:
    """As in `-o /dev/stdout >> log`."""
    log = tmp_path / "log"
    log.write_bytes(b"before, ")
    with log.open("ab", buffering=0) as file:
        write_output(Path(f"/dev/fd/{file.fileno()}"), b"content")
        file.write(b", after")
    assert log.read_bytes() == b"before, content, after"
    with pytest.raises(UserError, match="/dev/fd/99999: cannot be written: Bad file descriptor"):
        write_output(Path("/dev/fd/99999"), b"content")
