"""Tests of the store: the shards behave as the one array they are cut from."""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cnnpipe.data import manifest, store
from cnnpipe.data.store import open_images, shard_writer
from cnnpipe.errors import UserError

LENGTHS = [4, 1, 6, 2]
N = sum(LENGTHS)


@pytest.fixture
def whole() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (N, 3, 5, 2), np.uint8)


@pytest.fixture
def folder(tmp_path: Path, whole: np.ndarray) -> Path:
    """A data/resized/ of shards of different lengths."""
    rows = []
    for i, shard in enumerate(np.split(whole, np.cumsum(LENGTHS)[:-1])):
        np.save(tmp_path / f"images-{i}.npy", shard)
        rows += [{"shard": f"images-{i}.npy", "row": row} for row in range(len(shard))]
    fixed = {"official": "", "width": 9, "height": 9, "frames": 1, "sha256": "ab",
             "group": 0}  # fmt: skip
    table = pd.DataFrame(rows).assign(
        path=[f"{i}.jpg" for i in range(N)],
        label=["NA", "1"] * (N // 2) + ["NA"],
        crc32=[zlib.crc32(image.data) for image in whole],
        **fixed,
    )
    manifest.write(table, tmp_path / "manifest.csv", manifest.COLUMNS)
    return tmp_path


@pytest.mark.parametrize(
    "rows",
    [
        *range(-N, N),
        np.int64(5),
        slice(None),
        slice(3, 7),
        slice(None, None, -3),
        slice(50, 60),
        np.array([12, 0, 4, 4, 3, 11]),
        np.array([-1, -N, 5]),
        np.array([], int),
        [2, 9],
        np.arange(N) % 3 == 0,
        np.zeros(N, bool),
    ],
)
def test_every_index_gives_what_the_whole_array_gives(
    folder: Path, whole: np.ndarray, rows: Any
) -> None:
    images, _ = open_images(folder)
    np.testing.assert_array_equal(images[rows], whole[rows])
    assert images[rows].dtype == np.uint8


def test_length_and_shape_are_those_of_the_whole(folder: Path, whole: np.ndarray) -> None:
    images, table = open_images(folder)
    assert len(images) == len(table) == N
    assert images.shape == whole.shape


def test_iterating_gives_every_image_once(folder: Path, whole: np.ndarray) -> None:
    images, _ = open_images(folder)
    np.testing.assert_array_equal(np.stack(list(images)), whole)  # type: ignore[call-overload]


def test_what_is_read_can_be_changed_and_the_files_do_not(folder: Path, whole: np.ndarray) -> None:
    images, _ = open_images(folder)
    images[3][:] = 0
    images[:][:] = 0
    np.testing.assert_array_equal(images[:], whole)


@pytest.mark.parametrize(
    "rows", [N, -N - 1, np.array([0, N]), np.array([-N - 1]), np.ones(N + 1, bool)]
)
def test_an_index_out_of_range_is_an_error(folder: Path, rows: Any) -> None:
    images, _ = open_images(folder)
    with pytest.raises(IndexError):
        images[rows]


def test_the_manifest_describes_the_images_in_their_order(folder: Path) -> None:
    _, table = open_images(folder)
    assert table["path"].tolist() == [f"{i}.jpg" for i in range(N)]
    assert set(table["label"]) == {"NA", "1"}


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.csv: no such file: run `cnnpipe resize` first"):
        open_images(tmp_path / "resized")


def _missing(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _header_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def _of_another_length(path: Path) -> None:
    np.save(path, np.zeros((5, 3, 5, 2), np.uint8))


def _of_another_type(path: Path) -> None:
    np.save(path, np.zeros((6, 3, 5, 2), np.float32))


def _of_another_shape(path: Path) -> None:
    np.save(path, np.zeros((6, 15, 2), np.uint8))


def _of_another_size(path: Path) -> None:
    np.save(path, np.zeros((6, 4, 4, 2), np.uint8))


def _pickled(path: Path) -> None:
    np.save(path, np.array([{}] * 6), allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [
        _missing,
        _cut,
        _header_only,
        _of_another_length,
        _of_another_type,
        _of_another_shape,
        _of_another_size,
        _pickled,
    ],
)
def test_a_wrong_shard_is_named(folder: Path, damage: Any) -> None:
    damage(folder / "images-2.npy")
    with pytest.raises(UserError, match=r"images-2.npy: .*run `cnnpipe resize` again"):
        open_images(folder)


@pytest.mark.parametrize(
    "order", [slice(None, None, -1), slice(0, 0), [*range(5), 6, 5, *range(7, N)]]
)
def test_a_manifest_whose_rows_are_not_those_of_the_shards_is_refused(
    folder: Path, order: Any
) -> None:
    lines = (folder / "manifest.csv").read_text().splitlines(keepends=True)
    shuffled = np.array(lines[1:], object)[order].tolist()
    (folder / "manifest.csv").write_text("".join([lines[0], *shuffled]))
    with pytest.raises(UserError, match=r"manifest.csv: .*run `cnnpipe resize` again"):
        open_images(folder)


def test_a_written_shard_is_the_file_numpy_would_save(tmp_path: Path, whole: np.ndarray) -> None:
    with shard_writer(tmp_path / "ours.npy") as append:
        for image in whole:
            append(image[:, ::-1])  # not contiguous
    np.save(tmp_path / "theirs.npy", np.ascontiguousarray(whole[:, :, ::-1]))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


def test_a_shard_of_no_images_is_no_file(tmp_path: Path) -> None:
    with shard_writer(tmp_path / "shard.npy"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", [np.zeros((3, 5, 1), np.uint8), np.zeros((3, 5, 2), np.float32)])
def test_an_image_unlike_the_others_of_its_shard_is_refused(
    tmp_path: Path, other: np.ndarray
) -> None:
    with (
        pytest.raises(ValueError, match=r"in a shard of \(3, 5, 2\) uint8"),
        shard_writer(tmp_path / "shard.npy") as append,
    ):
        append(np.zeros((3, 5, 2), np.uint8))
        append(other)


def test_a_shard_that_was_cut_after_it_was_opened_is_an_error(
    folder: Path, whole: np.ndarray
) -> None:
    images, _ = open_images(folder)
    path = folder / "images-2.npy"
    path.write_bytes(path.read_bytes()[:-10])
    np.testing.assert_array_equal(images[np.arange(5)], whole[:5])
    with pytest.raises(
        UserError, match=r"images-2.npy: ends amid its images: run `cnnpipe resize`"
    ):
        images[:]


def test_a_flipped_bit_is_found_and_its_image_named_before_it_is_used(
    folder: Path, whole: np.ndarray
) -> None:
    path = folder / "images-3.npy"
    images, _ = open_images(folder)
    first = N - LENGTHS[-1]  # of the last shard
    position = path.stat().st_size - whole[0].nbytes  # where its last image begins
    data = bytearray(path.read_bytes())
    data[position + 7] ^= 4
    path.write_bytes(data)
    np.testing.assert_array_equal(images[first], whole[first])
    for _ in range(2):
        with pytest.raises(UserError, match=rf"images-3.npy: image {LENGTHS[-1] - 1} is damaged"):
            images[np.array([first, N - 1])]


def test_reading_does_not_map_the_images_into_memory(folder: Path) -> None:
    images, _ = open_images(folder)
    images[:]
    assert "images-" not in Path("/proc/self/maps").read_text()


def test_announced_images_are_read_in_long_runs_over_short_gaps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = open_images(folder)
    size, header = 3 * 5 * 2, 128
    monkeypatch.setattr(store, "_ANNOUNCED_BYTES", 2 * size)
    announced: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, at, length, __: announced.append((at, length))
    )
    images.announce(np.array([0, 3, 4, 5, 9, 10]))
    # Of four images two each; a shard of one; then one, three that are left out, and two.
    firsts = [(0, 2), (2, 2), (0, 1), (0, 1), (4, 2)]
    assert announced == [(header + first * size, number * size) for first, number in firsts]


def test_announcing_changes_nothing_that_is_read(folder: Path, whole: np.ndarray) -> None:
    images, _ = open_images(folder)
    images.announce(np.arange(N))
    images.announce(np.empty(0, int))
    np.testing.assert_array_equal(images[:], whole)
