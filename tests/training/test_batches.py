"""Tests of the batches: every image once, in an order that is known beforehand."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from stored import stored
from torch import Tensor

from cnnpipe.data.store import Images
from cnnpipe.training import order
from cnnpipe.training.batches import Batches, channel_statistics

CPU = torch.device("cpu")


def store(count: int, channels: int = 3) -> Images:
    """Images of which number i has the value i in its first pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 4, 5, channels), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    return stored(pixels[: count // 3], pixels[count // 3 :])


def batches(count: int, batch_size: int) -> Batches:
    """Of `count` images in twice as large a store; the label is the row times 10."""
    rows = np.random.default_rng(1).permutation(2 * count)[:count]
    return Batches(store(2 * count), rows, rows * 10, batch_size, CPU)


def seen(parts: list[tuple[Tensor, Tensor]]) -> list[int]:
    """The rows, by the first pixel; checks that image and label belong together."""
    rows = [int(row) for images, _ in parts for row in images[:, 0, 0, 0]]
    assert [int(label) for _, labels in parts for label in labels] == [10 * row for row in rows]
    return rows


@pytest.mark.parametrize(
    ("count", "batch_size"), [(1, 1), (1, 8), (8, 8), (20, 8), (17, 8), (5, 1)]
)
def test_every_image_comes_exactly_once_an_epoch(count: int, batch_size: int) -> None:
    of = batches(count, batch_size)
    for epoch in range(3):
        parts = list(of.shuffled(3, epoch))
        assert sorted(seen(parts)) == sorted(of.rows)
        assert len(parts) == of.num_steps


def test_in_order_keeps_the_order_of_the_rows() -> None:
    of = batches(20, 8)
    assert seen(list(of.in_order())) == of.rows.tolist()


def test_the_order_depends_on_the_seed_and_the_epoch_alone() -> None:
    of, same = batches(20, 8), batches(20, 5)
    first = seen(list(of.shuffled(3, 1)))
    np.random.seed(9)
    torch.manual_seed(9)
    assert seen(list(same.shuffled(3, 1))) == first
    assert seen(list(of.shuffled(3, 2))) != first
    assert seen(list(of.shuffled(4, 1))) != first
    assert first != of.rows.tolist()


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [
        (16, 8, [8, 8]),
        (18, 8, [8, 8, 2]),
        (17, 8, [8, 9]),  # batch normalisation cannot learn from one image
        (9, 8, [9]),
        (1, 8, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_a_last_batch_of_one_image_joins_the_one_before(
    count: int, batch_size: int, sizes: list[int]
) -> None:
    of = batches(count, batch_size)
    assert [len(labels) for _, labels in of.shuffled(0, 1)] == sizes
    assert [len(labels) for _, labels in of.in_order()] == sizes
    assert of.num_steps == len(sizes)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_uint8_in_the_stores_own_layout(channels: int) -> None:
    images = store(6, channels)
    rows = np.array([4, 1, 5])
    read, labels = next(Batches(images, rows, rows, 8, CPU).in_order())
    assert read.shape == (3, channels, 4, 5)
    assert read.dtype == torch.uint8 and labels.dtype == torch.int64
    # (N, H, W, C) in memory, seen as (N, C, H, W): nothing was copied to turn it.
    assert read.permute(0, 2, 3, 1).is_contiguous()
    assert read.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(read.permute(0, 2, 3, 1).numpy(), images[rows])


def test_batches_can_be_left_before_their_end() -> None:
    of = batches(20, 4)
    for _ in of.shuffled(0, 1):
        break
    assert sorted(seen(list(of.shuffled(0, 1)))) == sorted(of.rows)


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_statistics_are_numpys(channels: int) -> None:
    images = store(150, channels)
    rows = np.arange(0, 150, 2)[::-1]  # more than are read at a time
    mean, std = channel_statistics(images, rows)
    pixels = images[rows].reshape(-1, channels).astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-9)
    assert all(type(value) is float for value in (*mean, *std))


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_channel_that_never_varies_has_a_deviation_to_divide_by(value: int) -> None:
    pixels = np.full((70, 4, 5, 2), value, np.uint8)
    pixels[::2, :, :, 1] = 3
    mean, std = channel_statistics(stored(pixels), np.arange(70))
    assert (mean[0], std[0]) == (value, 1.0)
    assert std[1] == pytest.approx(abs(value - 3) / 2)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of two blocks of three images."""
    monkeypatch.setattr(order, "_BLOCK_BYTES", 3 * 4 * 5 * 3)
    monkeypatch.setattr(order, "_WINDOW_BLOCKS", 2)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("batch_size", [1, 4, 5, 8, 50])
def test_with_many_windows_too_an_epoch_can_begin_at_any_batch(batch_size: int) -> None:
    of = batches(41, batch_size)
    whole = list(of.shuffled(3, 1))
    assert sorted(seen(whole)) == sorted(of.rows)
    assert seen(whole) != seen(list(of.shuffled(3, 2)))
    for start in range(of.num_steps + 1):
        rest = list(of.shuffled(3, 1, start))
        assert [part.tolist() for _, part in rest] == [part.tolist() for _, part in whole[start:]]
        assert seen(rest) == seen(whole[start:])


class AtOnce(ThreadPoolExecutor):
    """Does what it is told before it answers."""

    def submit(self, call: Any, /, *arguments: Any) -> Any:  # type: ignore[override]
        future: Future[Any] = Future()
        future.set_result(call(*arguments))
        return future


@pytest.mark.usefixtures("small_windows")
def test_each_block_is_announced_once_an_epoch_before_its_window_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = batches(41, 4)
    of.rows = np.sort(of.rows)
    of.labels = of.rows * 10
    announced: list[int] = []
    monkeypatch.setattr(of.images, "announce", lambda rows: announced.extend(rows))
    monkeypatch.setattr("cnnpipe.training.batches.ThreadPoolExecutor", AtOnce)
    read = seen(list(of.shuffled(3, 1)))
    assert sorted(announced) == sorted(of.rows)
    assert set(announced[:6]) == set(read[:6])  # the first window, at once
    assert set(announced[6:12]) == set(read[6:12])  # along it the second
    of.resident = True
    announced.clear()
    assert seen(list(of.shuffled(3, 1))) == read  # and the order is the same
    assert announced == []


def test_of_a_single_window_nothing_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    of = batches(41, 4)
    monkeypatch.setattr(of.images, "announce", lambda rows: pytest.fail("announced"))
    assert sorted(seen(list(of.shuffled(3, 1)))) == sorted(of.rows)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 8), (20, 8), (17, 8)])
def test_resident_and_streamed_batches_are_the_same(count: int, batch_size: int) -> None:
    streamed = batches(count, batch_size)
    resident = Batches(
        streamed.images, streamed.rows, streamed.labels, batch_size, CPU, resident=True
    )
    for _ in range(2):  # filling it, and from what it holds
        for ours, theirs in (
            (resident.shuffled(3, 1), streamed.shuffled(3, 1)),
            (resident.in_order(), streamed.in_order()),
        ):
            for (images, labels), (expected, expected_labels) in zip(ours, theirs, strict=True):
                assert torch.equal(images, expected)
                assert torch.equal(labels, expected_labels)
                assert images.is_contiguous(memory_format=torch.channels_last)


def test_resident_images_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    of = batches(20, 8)
    of.resident = True
    read: list[int] = []
    original = of.images.read
    monkeypatch.setattr(
        of.images, "read", lambda rows, into: (read.extend(rows), original(rows, into))
    )
    for epoch in range(3):
        list(of.shuffled(0, epoch))
    assert sorted(read) == sorted(of.rows)


def test_streaming_reads_one_batch_ahead_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    of = batches(40, 8)
    read: list[int] = []
    original = of.images.read
    monkeypatch.setattr(
        of.images, "read", lambda rows, into: (read.append(len(rows)), original(rows, into))
    )
    stream = of.in_order()
    for step in range(1, 4):
        next(stream)
        assert len(read) <= step + 1
