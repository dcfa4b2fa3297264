"""From the bytes of an image file to its pixels, whatever the format."""

import io
import warnings
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import (
    ExifTags,
    Image,
    ImageFile,
    ImageOps,
    TiffImagePlugin,
    UnidentifiedImageError,
    features,
)

MAX_PIXELS = 100_000_000
"""Larger images are refused where nothing else is said: decoded, such a one takes 300 MB."""

MOST_PIXELS = 178_956_970
"""More cannot be allowed: twice `PIL.Image.MAX_IMAGE_PIXELS`, from where on Pillow refuses."""

_MAX_SIDE = 65_535
"""In pixels, as much as a JPEG can have."""

# By what the bytes say, never by the file's name. Formats that call other programs (EPS) or that
# are not photographs stay out. Two-picture JPEGs of phones (MPO) are opened as JPEG.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000") + (
    ("AVIF",) if features.check("avif") else ()
)
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class UnreadableImage(ValueError):
    """The bytes are no image that can be used; the message is the reason."""


class Decoded(NamedTuple):
    """What an image file holds."""

    pixels: np.ndarray
    """(H, W, 3) uint8 RGB, of the first frame."""
    num_frames: int
    """Of an animation, or the pages of a TIFF; 1 for all else."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of an image file, (H, W, 3) uint8 RGB, its EXIF orientation applied.

    Transparency is laid over white; of an animation the first frame is taken; integers of more than
    8 bits and floating point are scaled to 0-255, not clipped.

    Raises:
        UnreadableImage: not an image, damaged, of more than `max_pixels` pixels, or of a side that
            no JPEG could have.
    """
    return decode_frame(data, max_pixels).pixels


def decode_frame(data: bytes, max_pixels: int = MAX_PIXELS) -> Decoded:
    """As `decode`, with the number of frames that the file has.

    Raises:
        UnreadableImage: likewise.
    """
    if not data:
        raise UnreadableImage("empty file")
    if data.startswith(b"\xff\xd8") and not _may_be_turned(data):
        pixels = _jpeg_pixels(data, max_pixels)  # without Pillow's look at it, another 4 % less
        if pixels is not None:
            return Decoded(pixels, 1)
    try:
        with warnings.catch_warnings():
            # Odd metadata in a sound picture is of no interest, and the size is checked below.
            warnings.simplefilter("ignore")
            try:
                image = Image.open(io.BytesIO(data), formats=_FORMATS)
            except UnidentifiedImageError:
                if data.startswith(_TIFF_SIGNATURES):
                    return _deep_tiff(data, max_pixels)
                raise UnreadableImage("not an image") from None
            _check_size(image.width, image.height, max_pixels)
            if image.format == "JPEG":
                if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                    pixels = _jpeg_pixels(data, max_pixels)
                    if pixels is not None:
                        return Decoded(pixels, 1)
                num_frames = 1
            else:
                if isinstance(image, TiffImagePlugin.TiffImageFile) and _is_misread(image):
                    return _deep_tiff(data, max_pixels)
                num_frames = getattr(image, "n_frames", 1)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return Decoded(np.asarray(_rgb(image)), num_frames)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more than {max_pixels:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"damaged: {reason}") from None


def glimpse(data: bytes, max_pixels: int, side: int) -> np.ndarray | None:
    """What can still be seen of a damaged image file, for people to look at and nothing else.

    Args:
        data: the file.
        max_pixels: of more there is no glimpse.
        side: of the result, at most, in pixels.

    Returns:
        (h, w, 3) uint8 RGB, what is missing in grey or black; None where there is nothing to see.
    """
    with suppress(Exception), warnings.catch_warnings():  # as in decode_frame
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(image.width, image.height, max_pixels)
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            image.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
        ImageOps.exif_transpose(image, in_place=True)
        seen = _rgb(image)
        seen.thumbnail((side, side))
        if len(seen.getcolors(2) or "more") > 1:
            return np.asarray(seen)
    return None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than {max_pixels:,}")
    if max(width, height) > _MAX_SIDE:
        raise UnreadableImage(f"{width} x {height} pixels, a side of more than {_MAX_SIDE:,}")


def _jpeg_pixels(data: bytes, max_pixels: int) -> np.ndarray | None:
    """The pixels of a JPEG as they are stored; None where Pillow is to judge or convert it.

    They are Pillow's own, in half of its time: libjpeg-turbo decodes for both, but Pillow keeps
    four bytes a pixel and copies them.
    """
    with suppress(ValueError):  # damaged, or merely odd
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if height * width <= max_pixels and colors in ("YCbCr", "RGB", "Gray"):
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


def _is_misread(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether Pillow gives other pixels than the TIFF has, as of some deep ones, without a word.

    These are planes one after another, unsigned values of 32 bits, and greys with 0 as white.
    """
    tags = image.tag_v2
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
    unsigned = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 1
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return bits > 8 and (planes or inverted or (bits == 32 and unsigned))


def _deep_tiff(data: bytes, max_pixels: int) -> Decoded:
    """A TIFF that Pillow misreads, or cannot read, such as one of floating-point colours."""
    import tifffile  # 0.1 s, for files that few have

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        _check_size(page.imagewidth, page.imagelength, max_pixels)
        try:
            values = page.asarray()
        except ValueError as error:  # among them kinds of compression
            raise UnreadableImage(f"a TIFF of a kind that is not read: {error}") from None
        if values.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            values = values.transpose(1, 2, 0)
        if values.ndim == 2:
            values = values[:, :, None]
        if values.ndim != 3 or page.photometric > tifffile.PHOTOMETRIC.RGB:
            raise UnreadableImage("a TIFF of a kind that is not read: neither grey nor RGB")
        num_colors = 3 if page.photometric == tifffile.PHOTOMETRIC.RGB else 1
        colors = _scaled(values[:, :, :num_colors])
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            colors = 255 - colors
        bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.rollaxis(colors, 2)]
        mode = "L" if num_colors == 1 else "RGB"
        if tuple(page.extrasamples[:1]) in ((1,), (2,)):  # transparency, of whichever kind
            bands.append(Image.fromarray(_scaled(values[:, :, num_colors])))
            mode += "A"
        image = Image.merge(mode, bands)
        image.getexif()[ExifTags.Base.Orientation] = page.tags.valueof(274, 1)
        ImageOps.exif_transpose(image, in_place=True)
        return Decoded(np.asarray(_rgb(image)), len(file.pages))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_scaled(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scaled(values: np.ndarray) -> np.ndarray:
    """Values of any range as 0-255 uint8: integers or floats to uint8 of the same shape."""
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
