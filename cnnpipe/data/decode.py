"""From the bytes of an image file to its pixels, whatever the format."""

import io
import warnings
from contextlib import suppress

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

MAX_PIXELS = 100_000_000
"""Larger images are refused: decoded, such a one takes 300 MB."""

# By what the bytes say, never by the file's name. Formats that call other programs (EPS) or that
# are not photographs stay out. Two-picture JPEGs of phones (MPO) are opened as JPEG.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000") + (
    ("AVIF",) if features.check("avif") else ()
)


class UnreadableImage(ValueError):
    """The bytes are no image that can be used; the message is the reason."""


def decode(data: bytes) -> np.ndarray:
    """The pixels of an image file, (H, W, 3) uint8 RGB, its EXIF orientation applied.

    Transparency is laid over white; of an animation the first frame is taken; 16-bit, 32-bit and
    floating-point greys are scaled to 0-255, not clipped.

    Raises:
        UnreadableImage: not an image, damaged, or of more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise UnreadableImage("empty file")
    if data.startswith(b"\xff\xd8") and not _may_be_turned(data):
        pixels = _jpeg_pixels(data)  # without Pillow's look at the file, another 4 % of the time
        if pixels is not None:
            return pixels
    try:
        with warnings.catch_warnings():
            # Odd metadata in a sound picture is of no interest, and the size is checked below.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(
                    f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}"
                )
            upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            if image.format == "JPEG" and upright:
                pixels = _jpeg_pixels(data)
                if pixels is not None:
                    return pixels
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(_rgb(image))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image") from None
    except Image.DecompressionBombError:  # Pillow's own limit, met before the size is known here
        raise UnreadableImage(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"damaged: {reason}") from None


def _jpeg_pixels(data: bytes) -> np.ndarray | None:
    """The pixels of a JPEG as they are stored; None where Pillow is to judge or convert it.

    They are Pillow's own, in half of its time: libjpeg-turbo decodes for both, but Pillow keeps
    four bytes a pixel and copies them.
    """
    with suppress(ValueError):  # damaged, or merely odd
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if height * width <= MAX_PIXELS and colors in ("YCbCr", "RGB", "Gray"):
            return np.asarray(simplejpeg.decode_jpeg(data))
    return None


def _may_be_turned(jpeg: bytes) -> bool:
    """Whether a JPEG has metadata (a segment APP1) before its pixels, or is none after all.

    Source: ITU-T T.81, annex B.
    """
    position = 2
    while jpeg[position : position + 1] == b"\xff":
        marker = jpeg[position + 1 : position + 2]
        if marker in (b"\xda", b"\xe1"):  # the pixels begin, or metadata
            return marker == b"\xe1"
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
    return True


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_scaled(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scaled(values: np.ndarray) -> np.ndarray:
    """Greys of any range as 0-255 uint8: (H, W) integers or floats to (H, W) uint8."""
    floating = values.dtype.kind == "f"
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    if floating and low >= 0 and high <= 1:
        top = 1.0  # floating point by convention: 0 to 1
    elif low >= 0 and high <= 255:
        top = 255.0
    elif low >= 0 and high <= 65535:
        top = 65535.0
    else:  # no convention fits: from its darkest to its brightest
        values, top = values - low, (high - low) or 1.0
    return np.asarray(np.rint(values * (255 / top)), dtype=np.uint8)
