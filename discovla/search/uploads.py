"""Decode an uploaded picture in a process of its own, which may crash or hang without harm to the server."""

from __future__ import annotations

import io
import threading
import warnings

from PIL import Image, ImageOps

from discovla.data.sandbox import Sandbox, WorkerLost

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_BYTES = 10 << 20
MAX_PIXELS = 50_000_000
MAX_SIDE = 1024  # pixels of the longer side after decoding; models see less
SECONDS = 10.0


class TooManyPixels(ValueError):
    """A picture that is larger than `MAX_PIXELS`."""


class ImageDecoder:
    """Decoder of uploaded pictures, one at a time; calls from several threads take turns."""

    def __init__(self, *, seconds: float = SECONDS) -> None:
        self._sandbox: Sandbox[bytes, bytes] = Sandbox(decoded_png, limit=seconds)
        self._lock = threading.Lock()

    def __call__(self, content: bytes) -> bytes:
        """Return the picture as an RGB PNG, which is safe to decode in this process.

        Raises:
            ValueError: no picture, one of another format, or one with too many pixels.
        """
        try:
            with self._lock:
                return self._sandbox(content)
        except WorkerLost as error:
            raise ValueError(f"image: cannot be decoded: {error}") from None

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._sandbox.close()


def decoded_png(content: bytes) -> bytes:
    """Decode the first frame of a picture and encode its pixels as an RGB PNG.

    It is turned as its EXIF orientation asks, and at most `MAX_SIDE` pixels a side.

    Raises:
        ValueError: no picture, one of another format, or one with too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width} x {picture.height}"
                raise TooManyPixels(f"image: expected at most {MAX_PIXELS:,} pixels, found {size}")
            picture.draft("RGB", (MAX_SIDE, MAX_SIDE))  # JPEG only: decodes at 1/2, 1/4 or 1/8
            picture = ImageOps.exif_transpose(picture).convert("RGB")
    except Image.UnidentifiedImageError:
        raise ValueError(f"image: expected a picture ({', '.join(FORMATS)}), found none") from None
    except TooManyPixels:
        raise
    except Exception as error:  # Pillow raises errors of a dozen kinds for broken files
        raise ValueError(f"image: expected a whole picture, found a broken one: {error}") from None
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    png = io.BytesIO()
    picture.save(png, "PNG", compress_level=1)
    return png.getvalue()
