"""Augmentations of a whole batch on its device: an image is never seen twice alike.

What is random is drawn for the whole batch at once, from PyTorch's global generator, which the loop
seeds at every step; so an image is changed in the same way whatever part of the batch it is in.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The area of the crop, as a share of the image, and its aspect. Inception's 0.08 is made for
# 1.3 million photos; with a few thousand, so small a crop is often none of the animal.
_AREA = (0.35, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_COLOR = 0.3
"""Brightness, contrast and saturation vary by up to this share."""


@dataclass(frozen=True)
class Changes:
    """How each image of a batch is changed, or of a part of it: `changes[rows]`."""

    crops: Tensor | None = None
    """(N, 2, 3) float32: affine_grid's theta."""
    mirrored: Tensor | None = None
    """(N,) bool."""
    colors: Tensor | None = None
    """(N, 3) float32: factors of brightness, contrast and saturation."""

    def __getitem__(self, rows: slice) -> "Changes":
        return Changes(*(None if all is None else all[rows] for all in vars(self).values()))


def draw(kind: str, count: int, device: torch.device) -> Changes:
    """Random changes for so many images.

    Args:
        kind: `none`; `flip` mirrors half of them; `crop` also cuts a random part out and scales it
            to the size that is asked for; `photo` also varies brightness, contrast and saturation.
        count: of the whole batch.
        device: where the images are.
    """
    crops = _random_crops(count, device) if kind in ("crop", "photo") else None
    mirrored = torch.rand(count, device=device) < 0.5 if kind != "none" else None
    colors = None
    if kind == "photo":
        colors = torch.stack(
            [torch.empty(count, device=device).uniform_(1 - _COLOR, 1 + _COLOR) for _ in range(3)],
            1,
        )
    return Changes(crops, mirrored, colors)


def augment(images: Tensor, changes: Changes, crop_size: int | None) -> Tensor:
    """The images, each changed in its own way: (N, C, H, W) of 0-255, uint8 or float32.

    Args:
        images: uint8; it stays uint8, a quarter of the memory to move, as long as it can.
        changes: of each of them.
        crop_size: pixels, of crops; None keeps the size.
    """
    if changes.crops is not None:
        images = _cropped(images.float(), changes.crops, crop_size or images.shape[2])
    if changes.mirrored is not None:
        images = torch.where(changes.mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    if changes.colors is not None:
        images = _colored(images, changes.colors)
    return images


def _random_crops(count: int, device: torch.device) -> Tensor:
    """Random parts of images: (count, 2, 3), as affine_grid takes them.

    Source: Szegedy et al., "Going deeper with convolutions" (2014), section 6.
    """
    low, high = _AREA
    area = torch.empty(count, device=device).uniform_(low, high)
    log_aspect = torch.empty_like(area).uniform_(*map(math.log, _ASPECT))
    # Half the crop's width and height where the image is 2 x 2, grid_sample's coordinates.
    width = (area * log_aspect.exp()).sqrt().clamp(max=1)
    height = (area / log_aspect.exp()).sqrt().clamp(max=1)
    x = (torch.rand_like(area) * 2 - 1) * (1 - width)
    y = (torch.rand_like(area) * 2 - 1) * (1 - height)
    zero = torch.zeros_like(area)
    return torch.stack([width, zero, x, zero, height, y], dim=1).view(count, 2, 3)


def _cropped(images: Tensor, crops: Tensor, size: int) -> Tensor:
    """Those parts at one size: (N, C, H, W) float to (N, C, size, size) float."""
    if not len(images):  # a process's share of a small batch, which affine_grid refuses
        return images.new_empty((0, images.shape[1], size, size))
    grid = F.affine_grid(crops, [*images.shape[:2], size, size], align_corners=False)
    cropped = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return cropped.contiguous(memory_format=torch.channels_last)


def _colored(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation multiplied, clamped to 0-255."""
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    images = images * brightness
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    grey = images.mean(dim=1, keepdim=True)
    return (grey + (images - grey) * saturation).clamp(0, 255)
