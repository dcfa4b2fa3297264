"""Tests of decoding: every format and orientation to the same pixels, damage to a reason."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image, ImageOps, features

from cnnpipe.data.decode import UnreadableImage, decode, decode_frame

Photo = Callable[..., np.ndarray]
Encoded = Callable[..., bytes]
ORIENTATION = 0x0112  # the EXIF tag


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_a_file_without_loss_gives_its_own_pixels(
    photo: Photo, encoded: Encoded, kind: str
) -> None:
    image = photo(30, 40)
    result = decode(encoded(image, kind))
    np.testing.assert_array_equal(result, image)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous


def test_lossless_webp_and_jpeg_2000_give_their_own_pixels(photo: Photo, encoded: Encoded) -> None:
    image = photo(30, 40)
    np.testing.assert_array_equal(decode(encoded(image, "WEBP", lossless=True)), image)
    np.testing.assert_array_equal(decode(encoded(image, "JPEG2000")), image)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_a_file_with_loss_gives_nearly_its_pixels(
    photo: Photo, encoded: Encoded, kind: str
) -> None:
    image = photo(60, 80)
    result = decode(encoded(image, kind))
    assert result.shape == image.shape
    assert np.abs(result.astype(int) - image).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_give_the_upright_picture(
    photo: Photo, encoded: Encoded, orientation: int
) -> None:
    upright = photo(30, 40)
    # How a camera stores the upright picture under each orientation: the inverse of its meaning.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(np.ascontiguousarray(stored), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data), upright)


def test_the_orientation_of_a_jpeg_is_applied(photo: Photo, encoded: Encoded) -> None:
    image = photo(30, 40)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(image, "JPEG", exif=exif)
    plain = decode(encoded(image, "JPEG"))
    np.testing.assert_array_equal(decode(data), np.rot90(plain, -1))


def test_transparency_is_laid_over_white(encoded: Encoded) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = [0, 255, 102]  # black: invisible, opaque, at 40 %
    assert decode(encoded(rgba, "PNG"))[0, :, 0].tolist() == [255, 0, 153]


def test_transparent_grey_palette_and_gif_are_laid_over_white(encoded: Encoded) -> None:
    grey_alpha = np.array([[[0, 0], [0, 255]]], np.uint8)
    assert decode(encoded(grey_alpha, "PNG"))[0].tolist() == [[255] * 3, [0] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        data = encoded(palette, kind, transparency=0)
        assert decode(data)[0].tolist() == [[255] * 3, [40, 50, 60]]


def test_a_palette_gives_its_colours(encoded: Encoded) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert decode(encoded(palette, "PNG"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_one_bit_images_are_black_and_white(encoded: Encoded) -> None:
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    for kind in ("PNG", "TIFF"):
        assert decode(encoded(bits, kind))[0].tolist() == [[0] * 3, [255] * 3]


def test_cmyk_gives_the_colours_seen(encoded: Encoded) -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow: red
    for kind in ("JPEG", "TIFF"):
        red, green, blue = decode(encoded(cmyk, kind))[8, 8]
        assert red > 240 and green < 15 and blue < 15


def test_sixteen_bit_grey_is_scaled_and_not_clipped(encoded: Encoded) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert decode(encoded(Image.fromarray(values), kind))[0, :, 1].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_grey_of_small_values_is_taken_as_eight_bit(encoded: Encoded) -> None:
    for values in ([0, 1, 1], [0, 1, 255]):
        image = Image.fromarray(np.array([values], np.uint16))
        assert decode(encoded(image, "PNG"))[0, :, 0].tolist() == values


@pytest.mark.parametrize(
    ("values", "shades"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 1.0, 1.0], [0, 255, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([-7.0, -7.0, -7.0], [0, 0, 0]),
        ([float("nan"), 0.5, 1.0], [128, 128, 255]),
        ([float("-inf"), 0.0, float("inf")], [0, 0, 0]),
        ([0.0, 1.0, float("inf")], [0, 255, 255]),
        ([float("nan")] * 3, [0, 0, 0]),
    ],
)
def test_floating_point_grey_is_scaled_by_what_its_range_says(
    encoded: Encoded, values: list[float], shades: list[int]
) -> None:
    data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert decode(data)[0, :, 0].tolist() == shades


RAMP = np.linspace(0, 1, 12).reshape(3, 4)[:, :, None] * [1, 0.5, 0.25]
"""(3, 4, 3) float64, 0 to 1."""


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ((RAMP * 65535).astype(np.uint16), {}),
        ((RAMP * 65535).astype(">u2"), {"byteorder": ">"}),
        ((RAMP * 65535).astype(np.uint16), {"compression": "zlib"}),
        ((RAMP * 65535).astype(np.uint16).transpose(2, 0, 1), {"planarconfig": "separate"}),
        (RAMP.astype(np.float32), {}),
        (RAMP.astype(np.float32).transpose(2, 0, 1), {"planarconfig": "separate"}),
        (RAMP.astype(np.float16), {}),
        (RAMP * 255, {}),
    ],
)
def test_deep_colours_are_scaled_and_not_clipped(
    values: np.ndarray, options: dict[str, Any]
) -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.ascontiguousarray(values), photometric="rgb", **options)
    pixels = decode(file.getvalue())
    assert np.abs(pixels - RAMP * 255).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_deep_greys_are_scaled_whichever_end_is_white(dtype: Any, photometric: str) -> None:
    ramp = RAMP[:, :, 0]
    top = {np.uint16: 65535, np.int32: 2**31 - 1, np.uint32: 2**32 - 1}.get(dtype, 1)
    file = io.BytesIO()
    tifffile.imwrite(file, (ramp * top).astype(dtype), photometric=photometric)
    pixels = decode(file.getvalue())
    expected = ramp if photometric == "minisblack" else 1 - ramp
    assert np.abs(pixels - expected[:, :, None] * 255).max() <= 1


@pytest.mark.parametrize("options", [{}, {"planarconfig": "separate"}])
def test_a_deep_tiffs_transparency_is_laid_over_white(options: dict[str, Any]) -> None:
    values = np.dstack([RAMP, np.full((3, 4), 0.4)]).astype(np.float32)
    values = values.transpose(2, 0, 1) if options else values
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        np.ascontiguousarray(values),
        photometric="rgb",
        extrasamples=["unassalpha"],
        **options,
    )
    assert np.abs(decode(file.getvalue()) - 255 * (0.4 * RAMP + 0.6)).max() <= 2


def test_a_deep_tiff_is_turned_upright() -> None:
    file = io.BytesIO()
    turned = np.ascontiguousarray(np.rot90(RAMP.astype(np.float32)))
    tifffile.imwrite(file, turned, photometric="rgb", extratags=[(ORIENTATION, 3, 1, 6, True)])
    assert np.abs(decode(file.getvalue()) - RAMP * 255).max() <= 1


def test_a_deep_png_of_colours_is_scaled(encoded: Encoded) -> None:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RAMP * 65535)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks.items()
    )
    assert np.abs(decode(data) - RAMP * 255).max() <= 1


def test_ycck_gives_the_colours_seen() -> None:
    # Adobe's four inks are stored inverted: 255 is none of it, and so RGB where there is no black.
    inks = np.full((16, 16, 4), (250, 20, 30, 255), np.uint8)
    red, green, blue = decode(simplejpeg.encode_jpeg(inks, colorspace="CMYK"))[8, 8].astype(int)
    assert abs(red - 250) < 5 and abs(green - 20) < 5 and abs(blue - 30) < 5


def test_progressive_jpegs_and_interlaced_pngs_are_as_any_other(
    photo: Photo, encoded: Encoded
) -> None:
    image = photo(30, 40)
    progressive, plain = encoded(image, "JPEG", progressive=True), encoded(image, "JPEG")
    np.testing.assert_array_equal(decode(progressive), decode(plain))
    # Pillow writes no interlaced PNG: Adam7 of a single pixel is that pixel, in the first pass.
    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 1)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0\1\2\3")), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content
        data += struct.pack(">I", zlib.crc32(kind + content))
    assert decode(data).tolist() == [[[1, 2, 3]]]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_an_avif_is_nearly_its_pixels(photo: Photo, encoded: Encoded) -> None:
    image = photo(60, 80)
    assert np.abs(decode(encoded(image, "AVIF")).astype(int) - image).mean() < 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_taken_and_their_number_said(
    encoded: Encoded, kind: str
) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    pixels, num_frames = decode_frame(data)
    np.testing.assert_array_equal(pixels, np.asarray(frames[0]))
    assert num_frames == 3
    assert decode_frame(encoded(frames[0], kind)).num_frames == 1


def test_a_two_picture_jpeg_of_a_phone_gives_its_first(photo: Photo, encoded: Encoded) -> None:
    first, second = photo(20, 30, seed=1), photo(20, 30, seed=2)
    data = encoded(first, "MPO", save_all=True, append_images=[Image.fromarray(second)])
    assert np.abs(decode(data).astype(int) - first).mean() < 12


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a cat\n", "not an image"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\xff\xd8\xff", "not an image"),
        (bytes(1000), "not an image"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=f"^{reason}$"):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_short_is_damaged_and_no_half_picture(
    photo: Photo, encoded: Encoded, kind: str
) -> None:
    whole = encoded(photo(64, 64), kind)
    with pytest.raises(UnreadableImage, match=r"^(damaged: \S.*|not an image)$"):
        decode(whole[: len(whole) // 2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "JPEG2000"])
def test_a_file_that_lacks_its_last_tenth_is_not_guessed(
    photo: Photo, encoded: Encoded, kind: str
) -> None:
    whole = encoded(photo(64, 64), kind)
    with pytest.raises(UnreadableImage):
        decode(whole[: len(whole) * 9 // 10])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_photo_is_called_damaged(photo: Photo, encoded: Encoded, kind: str) -> None:
    whole = encoded(photo(64, 64), kind)
    with pytest.raises(UnreadableImage, match=r"(?i)^damaged: .*truncated"):
        decode(whole[: len(whole) // 2])


def test_random_bytes_after_a_signature_never_escape_as_another_error(
    photo: Photo, encoded: Encoded
) -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM"):
        whole = np.frombuffer(encoded(photo(24, 24), kind), np.uint8)
        for _ in range(40):
            data = whole.copy()
            data[rng.integers(8, len(data), 12)] = rng.integers(0, 256, 12)
            try:
                assert decode(data.tobytes()).ndim == 3
            except UnreadableImage as error:
                assert str(error)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_too_many_pixels_are_refused_before_they_are_decoded(encoded: Encoded, kind: str) -> None:
    assert decode(encoded(np.zeros((10, 10), np.uint8), kind), 100).shape == (10, 10, 3)
    with pytest.raises(UnreadableImage, match=r"^11 x 10 pixels, more than 100$"):
        decode(encoded(np.zeros((10, 11), np.uint8), kind), 100)


def test_a_side_that_no_photo_has_is_refused(encoded: Encoded) -> None:
    assert decode(encoded(np.zeros((1, 65_535), np.uint8), "PNG")).shape == (1, 65_535, 3)
    with pytest.raises(UnreadableImage, match=r"^65536 x 1 pixels, a side of more than 65,535$"):
        decode(encoded(np.zeros((1, 65_536), np.uint8), "PNG"))


@pytest.mark.parametrize("side", [10_001, 50_000])
def test_a_small_file_that_claims_a_huge_picture_is_refused(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk
    data += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT"
    with pytest.raises(UnreadableImage, match="more than 100,000,000"):
        decode(data)


def test_odd_metadata_in_a_sound_picture_warns_nobody(encoded: Encoded) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    data = encoded(palette, "PNG", transparency=b"\x00\xff")  # Pillow warns on converting it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data).shape == (1, 2, 3)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("shape", [(61, 83), (1, 1), (8, 3), (17, 1)])
def test_a_jpeg_gives_pillows_own_pixels(
    photo: Photo,
    encoded: Encoded,
    mode: str,
    subsampling: int,
    progressive: bool,
    shape: tuple[int, int],
) -> None:
    image = Image.fromarray(photo(*shape)).convert(mode)
    data = encoded(image, "JPEG", subsampling=subsampling, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_with_metadata_gives_pillows_own_pixels_too(
    photo: Photo, encoded: Encoded, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(photo(61, 83), "JPEG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decode(data), np.asarray(expected))


@pytest.mark.parametrize("orientation", [1, 6])
def test_only_a_turned_jpeg_is_left_to_pillow(
    photo: Photo, encoded: Encoded, monkeypatch: pytest.MonkeyPatch, orientation: int
) -> None:
    asked: list[bytes] = []
    original = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda data: (asked.append(data), original(data))[1]
    )
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(photo(20, 30), "JPEG", exif=exif)
    decode(data)
    assert asked == ([data] if orientation == 1 else [])


def test_a_jpeg_that_the_fast_decoder_refuses_is_pillows_to_judge(
    photo: Photo, encoded: Encoded
) -> None:
    data = bytearray(encoded(photo(60, 80), "JPEG"))
    data[len(data) // 2 : len(data) // 2] = b"\xff\xd0"  # a restart that nobody announced
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(bytes(data))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(bytes(data)), expected)
