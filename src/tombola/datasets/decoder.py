"""Images to raw pixels, and the program that does so for a share of them.

Most of decoding a small image happens inside the interpreter, so threads do not help: the work is shared by
processes. Each runs this file by itself, which loads Pillow and nothing else, is fed through its standard input, writes
the pixels to their places in one common file and answers once, when all is done or at the first trouble.
"""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

HEADER = struct.Struct("<QQ")
"""Before each image on the standard input: its place and how many bytes follow."""

MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
"""Pillow's names of the kinds of pixels that have eight bits or fewer a channel."""


MOST_PIXELS = 100_000_000
"""Maximum number of pixels of an image that is decoded: of the largest photographs. Each takes four bytes of memory."""


class TroubleError(Exception):
    """What is wrong with an image, as the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class Form:
    """What images become: uint8, channels x height x width.

    Args:
        channels: 3 for colours (grey images become grey colours), 1 for grey.
        height, width: in pixels.
        fit: bring other sizes to this one, the shorter side scaled, the longer cut to its middle; else they are
            refused.
        why: where other sizes are refused, what to say after the expected size.
    """

    channels: int
    height: int
    width: int
    fit: bool = False
    why: str = ""

    @property
    def size(self) -> int:
        """Bytes in an image."""
        return self.channels * self.height * self.width


def size_of(content: bytes) -> tuple[int, int]:
    """Return an image's height and width, read from its beginning.

    Raises:
        TroubleError: where it is not an image.
    """
    with _open_image(content) as image:
        return image.height, image.width


def decode(content: bytes, form: Form) -> bytes:
    """Decode one PNG or JPEG image.

    Args:
        content: the file.
        form: what to make of it.

    Returns:
        Its pixels, channels first.

    Raises:
        TroubleError: where it is not a whole image or does not have the right form.
    """
    from PIL import Image, ImageOps

    with _open_image(content) as image:
        if image.mode not in MODES:
            raise TroubleError(f"has pixels of the kind {image.mode}, expected eight bits a channel")
        size = form.width, form.height
        if image.size != size and not form.fit:
            raise TroubleError(
                f"is {image.width} x {image.height} pixels, expected {form.width} x {form.height}{form.why}"
            )
        try:
            if form.fit:
                image.draft(None, (2 * form.width, 2 * form.height))  # skip detail that fitting would discard
            pixels = image.convert("RGB" if form.channels == 3 else "L")
        except Exception as error:
            raise TroubleError(f"is damaged or cut short: {error}") from error
    if pixels.size != size:
        pixels = ImageOps.fit(pixels, size, Image.Resampling.BICUBIC)
    return b"".join(channel.tobytes() for channel in pixels.split())


def work(images: Iterable[tuple[int, bytes]], pixels: int, form: Form) -> dict[str, Any]:
    """Decode images into their places.

    Args:
        images: the place and the content of each.
        pixels: descriptor of the file that has a place of `form.size` bytes for every image.
        form: what to make of them.

    Returns:
        Nothing where all went well; at the first image that is not as it should be its "place" and its "trouble";
        the error number "disk" of a file that cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings about unusual but readable files
        for place, content in images:
            try:
                raw = decode(content, form)
            except TroubleError as trouble:
                return {"place": place, "trouble": str(trouble)}
            try:
                written = os.pwrite(pixels, raw, place * form.size)
                if written < len(raw):
                    os.pwrite(pixels, raw[written:], place * form.size + written)
            except OSError as error:
                return {"disk": error.errno}
    return {}


def command(pixels: int, form: Form) -> list[str]:
    """Return the command line of a process that does `work` on what `send` sends to its standard input."""
    return [sys.executable, "-P", __file__, str(pixels), json.dumps(asdict(form))]


def send(file: IO[bytes], place: int, content: bytes) -> None:
    """Send one image to a process."""
    file.write(HEADER.pack(place, len(content)) + content)


def receive(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield everything that `send` sends, until the end of the file."""
    while header := file.read(HEADER.size):
        place, length = HEADER.unpack(header)
        yield place, file.read(length)


def _open_image(content: bytes) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual but readable files, and of many pixels
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
    except UnidentifiedImageError as error:
        raise TroubleError("is not a PNG or JPEG image" if content else "is empty") from error
    except Exception as error:
        raise TroubleError(f"is damaged or cut short: {error}") from error
    if image.width * image.height > MOST_PIXELS:
        raise TroubleError(f"is {image.width} x {image.height} pixels, expected at most {MOST_PIXELS} pixels")
    return image


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the standard input ends this process
    answer = work(receive(sys.stdin.buffer), int(sys.argv[1]), Form(**json.loads(sys.argv[2])))
    with suppress(BrokenPipeError):  # the parent process may have ended
        os.write(sys.stdout.fileno(), json.dumps(answer).encode())
