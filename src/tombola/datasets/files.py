"""Search for the files of data sets, and download missing ones."""

from __future__ import annotations

import http.client
import importlib
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from tombola.datasets.progress import Bar
from tombola.errors import UserError

SECONDS_TO_ANSWER = 6.0
"""A server that takes longer to answer counts as unreachable."""

SECONDS_OF_SILENCE = 30.0
"""A download that receives nothing for this time is stopped."""


def cache_folder() -> Path:
    """Return this program's cache folder of the user, without creating it."""
    try:
        import pooch
    except ImportError:  # nothing can be downloaded into it, but files may have been put there
        return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tombola")
    return Path(pooch.os_cache("tombola"))


def require(module: str, what: str) -> None:
    """Refuse what needs a package of the extra `data` if it is not installed.

    Args:
        module: the package's name in Python.
        what: what needs it, the beginning of the message.

    >>> require("json", "reading this file")
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} needs the extra 'data' ({error}): pip install 'tombola[data]'") from error


def folders(directory: Path | None, *names: str) -> list[Path]:
    """Return the folders in which a data set's files are searched, in this order.

    Args:
        directory: the data directory; None means `data/` in the current folder, then the user's cache folder.
        names: possible subfolders of the data set; they come before the directory itself.

    >>> [folder.as_posix() for folder in folders(Path("data"), "mnist")]
    ['data/mnist', 'data']
    """
    roots = [Path("data"), cache_folder()] if directory is None else [directory]
    return [root / name for root in roots for name in (*names, "")]


def find_or_download(
    name: str, directory: Path | None, choices: Collection[str], inside: str, url: str, sha256: str
) -> Path:
    """Return the path of a data set that is one folder or archive, after a download if it is missing.

    Args:
        name: name of the data set, and of the subfolder that it may be in.
        directory: the data directory, see `folders`.
        choices: possible names of the folder or the archive.
        inside: a file of the folder; a folder with another name is accepted if it contains this file.
        url, sha256: of the file to download if nothing is found.

    Raises:
        UserError: if nothing is found and the download fails; it says which files to put into which folder.
    """
    looked = folders(directory, name)
    for folder in looked:
        for choice in choices:
            if (folder / choice).exists():
                return folder / choice
        if (folder / inside).exists():
            return folder
    try:
        return download(url, sha256, download_folder(directory, name))
    except UserError as error:
        raise absence_error(name, looked, error, [url.rpartition("/")[2]], looked[0]) from error


def download_folder(directory: Path | None, name: str) -> Path:
    """Return the folder into which the files of the data set `name` are downloaded."""
    return (cache_folder() if directory is None else directory) / name


def download(url: str, sha256: str, folder: Path) -> Path:
    """Download one file into `folder`. The file exists afterwards only if it is complete and its checksum is right.

    Raises:
        UserError: if there is no network, the server refuses, the checksum differs or the folder cannot be written.
            Its text is a clause that says which.
    """
    require("pooch", f"downloading {url}")
    import pooch

    reason = _out_of_reach(url)
    if reason:
        raise UserError(f"{url} is out of reach ({reason})")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    name = url.rpartition("/")[2]
    try:
        with Bar(name, of_bytes=True) as bar:
            fetch = pooch.HTTPDownloader(progressbar=bar, timeout=SECONDS_OF_SILENCE, chunk_size=1 << 16)
            return Path(pooch.retrieve(url, f"sha256:{sha256}", fname=name, path=folder, downloader=fetch))
    except (OSError, ValueError) as error:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise UserError(f"{url} could not be downloaded into {folder} ({_brief(error)})") from error


def absence_error(name: str, looked: Iterable[Path], reason: UserError, files: Iterable[str], into: Path) -> UserError:
    """Return the error for a data set that is not found and cannot be downloaded: which files to put where."""
    *others, last = map(str, looked)
    places = f"{', '.join(others)} or {last}" if others else last
    return UserError(f"data set {name!r} is not complete in {places}, and {reason}; put {', '.join(files)} into {into}")


def _out_of_reach(url: str) -> str:
    """Return why `url` cannot be reached, or '' if its server answers, within SECONDS_TO_ANSWER.

    The request runs in its own thread, because a name look-up has no timeout.
    """
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS_TO_ANSWER):
                answers.put("")
        except urllib.error.HTTPError:
            answers.put("")  # this is an answer, too; the download itself reports the error
        except (OSError, ValueError, http.client.HTTPException) as error:
            answers.put(_brief(error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=SECONDS_TO_ANSWER)
    except queue.Empty:
        return f"{urlsplit(url).hostname} did not answer within {SECONDS_TO_ANSWER:g} seconds"


def _brief(error: Exception) -> str:
    """Return the first line of an error's text."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return (str(reason).strip() or type(error).__name__).splitlines()[0]
