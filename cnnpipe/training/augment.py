"""Augmentations of a whole batch on its device: an image is never seen twice alike.

They draw from PyTorch's global generator, which the loop seeds at every step.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The area of the crop, as a share of the image, and its aspect. Inception's 0.08 is made for
# 1.3 million photos; with a few thousand, so small a crop is often none of the animal.
_AREA = (0.35, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_COLOR = 0.3
"""Brightness, contrast and saturation vary by up to this share."""


def augment(images: Tensor, kind: str, crop_size: int | None) -> Tensor:
    """The batch, each image changed in its own way: (N, C, H, W) of 0-255, uint8 or float32.

    Args:
        images: uint8; it stays uint8, a quarter of the memory to move, as long as it can.
        kind: `none`; `flip` mirrors half of them; `crop` also cuts a random part out and scales it
            to `crop_size`; `photo` also varies brightness, contrast and saturation.
        crop_size: pixels; None keeps the size.
    """
    if kind in ("crop", "photo"):
        images = random_resized_crop(images.float(), crop_size or images.shape[2])
    if kind in ("flip", "crop", "photo"):
        images = random_flip(images)
    if kind == "photo":
        images = random_color(images)
    return images


def random_flip(images: Tensor) -> Tensor:
    """(N, C, H, W), each image mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def random_resized_crop(images: Tensor, size: int) -> Tensor:
    """A random part of each image at one size: (N, C, H, W) to (N, C, size, size) float.

    Source: Szegedy et al., "Going deeper with convolutions" (2014), section 6.
    """
    n = len(images)
    low, high = _AREA
    area = torch.empty(n, device=images.device).uniform_(low, high)
    log_aspect = torch.empty_like(area).uniform_(*map(math.log, _ASPECT))
    # Half the crop's width and height where the image is 2 x 2, grid_sample's coordinates.
    width = (area * log_aspect.exp()).sqrt().clamp(max=1)
    height = (area / log_aspect.exp()).sqrt().clamp(max=1)
    x = (torch.rand_like(area) * 2 - 1) * (1 - width)
    y = (torch.rand_like(area) * 2 - 1) * (1 - height)
    zero = torch.zeros_like(area)
    theta = torch.stack([width, zero, x, zero, height, y], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, images.shape[1], size, size], align_corners=False)
    cropped = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return cropped.contiguous(memory_format=torch.channels_last)


def random_color(images: Tensor) -> Tensor:
    """Each image's brightness, contrast and saturation varied, clamped to 0-255."""

    def factor() -> Tensor:
        low_high = (1 - _COLOR, 1 + _COLOR)
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(*low_high)

    images = images * factor()
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * factor()
    grey = images.mean(dim=1, keepdim=True)
    return (grey + (images - grey) * factor()).clamp(0, 255)
