"""Tests of the augmentations: what they may change of an image, and what not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cnnpipe.training.augment import augment, draw

KINDS = ["none", "flip", "crop", "photo"]


def batch(count: int = 40, channels: int = 3, size: int = 12) -> Tensor:
    """(count, C, H, W) uint8, channels last in memory."""
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (count, size, size, channels), dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


def augmented(images: Tensor, kind: str, crop_size: int | None = None, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return augment(images, draw(kind, len(images), images.device), crop_size)


def test_none_gives_the_images_themselves() -> None:
    images = batch()
    assert augmented(images, "none") is images


def test_flip_mirrors_an_image_or_keeps_it() -> None:
    images = batch(200).float()
    result = augmented(images, "flip")
    kept = (result == images).all(dim=(1, 2, 3))
    mirrored = (result == images.flip(3)).all(dim=(1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 70 < mirrored.sum() < 130  # about half


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_0_to_255_in_the_same_layout(kind: str, channels: int) -> None:
    images = batch(channels=channels)
    images[:10] = 255
    images[10:20] = 0
    result = augmented(images, kind)
    assert result.shape == images.shape
    # Bytes stay bytes until something lies between them.
    assert result.dtype == (torch.uint8 if kind in ("none", "flip") else torch.float32)
    # Interpolation may round beyond the ends, in the seventh digit.
    assert result.min() >= -1e-3 and result.max() <= 255 + 1e-3
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["crop", "photo"])
@pytest.mark.parametrize("crop_size", [1, 8, 12])
def test_crops_have_the_size_asked_for(kind: str, crop_size: int) -> None:
    assert augmented(batch(), kind, crop_size).shape == (40, 3, crop_size, crop_size)


def test_a_crop_is_a_part_of_the_image_between_a_third_and_all_of_it() -> None:
    # The first channel holds each pixel's column, the second its row: they tell where it is from.
    line = torch.arange(100.0)
    where = torch.stack([line.expand(100, 100), line[:, None].expand(100, 100)])
    changes = replace(draw("crop", 300, where.device), mirrored=None)
    crops = augment(where.expand(300, 2, 100, 100), changes, 100)
    # Linear from its first to its last pixel's middle: 99 steps of the crop's width / 100.
    width = (crops[:, 0, 50, 98] - crops[:, 0, 50, 1]) * 100 / 97
    height = (crops[:, 1, 98, 50] - crops[:, 1, 1, 50]) * 100 / 97
    area = width * height / 100**2
    assert 0.34 < area.min() < 0.42 and 0.85 < area.max() < 1.01
    aspect = width / height
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35
    left = crops[:, 0, 50, 0]
    assert left.min() < 2 and left.max() > 25  # from everywhere
    assert crops.min() >= 0 and crops.max() <= 99  # and never from outside


def test_a_crop_of_a_plain_image_is_plain() -> None:
    for size in (7, 27):  # the larger one needs values from beyond the image's last pixels
        crops = augmented(torch.full((100, 3, 9, 9), 200.0), "crop", size)
        torch.testing.assert_close(crops, torch.full((100, 3, size, size), 200.0))


def test_photo_stays_within_0_to_255() -> None:
    images = batch()
    images[:10] = 255
    images[10:20] = 0
    result = augmented(images, "photo")
    assert result.min() == 0 and result.max() == 255


def test_photo_varies_brightness_and_colour() -> None:
    plain = torch.tensor([60.0, 90.0, 120.0]).view(1, 3, 1, 1).expand(200, 3, 4, 4)
    result = augmented(plain, "photo")
    means = result.mean(dim=(1, 2, 3))
    assert means.min() < 70 and means.max() > 110
    ratio = (result[:, 2] / result[:, 0]).mean(dim=(1, 2))  # 2 where the colour is kept
    assert ratio.min() < 1.6 and ratio.max() > 2.4


@pytest.mark.parametrize("kind", ["flip", "crop", "photo"])
def test_the_same_generator_state_gives_the_same_images(kind: str) -> None:
    images = batch()
    assert torch.equal(augmented(images, kind, 8), augmented(images, kind, 8))
    assert not torch.equal(augmented(images, kind, 8), augmented(images, kind, 8, seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_that_came_in_is_left_alone(kind: str) -> None:
    for images in (batch(), batch().float()):
        before = images.clone()
        augmented(images, kind)
        assert torch.equal(images, before)


def test_images_are_changed_one_by_one() -> None:
    same = torch.arange(4.0).expand(50, 1, 1, 4)
    assert len({tuple(image.flatten().tolist()) for image in augmented(same, "flip")}) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_batch_is_changed_as_in_the_whole(kind: str) -> None:
    images = batch()
    changes = draw(kind, len(images), images.device)
    whole = augment(images, changes, 8)
    for rows in (slice(7), slice(7, 30), slice(30, None), slice(40, None)):
        torch.testing.assert_close(augment(images[rows], changes[rows], 8), whole[rows])
