"""The built-in data set "drawn-pets": synthetic cartoon cats and dogs, drawn from a seed.

Its place: images come from here when no data set is brought along; whoever fills `data/raw`
calls `draw` for every number and writes each picture under its class name. Size, background,
colours, fur pattern, pose and light are drawn alike for both classes; only the anatomy differs.
The ranges are tuned so that one convolution and a dense layer get most pictures right but not
all, while a deeper network gets nearly all of them.

Shapes are outlines, (corners, 2) arrays of (x, y), mostly in head units: the origin is the middle
of the head, x points right, y points down, 1 is about half the width of the head.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from skimage.draw import polygon
from skimage.filters import gaussian

CLASS_NAMES = ("cat", "dog")
NUM_IMAGES = 1000

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]
Point = tuple[float, float]

MIN_SIDE, MAX_SIDE = 120, 640
# Every picture is drawn with this long side and resized at the end, for speed: the time goes
# with the number of pixels, and networks see pictures of 300 x 300 or fewer.
DRAWING_SIDE = 176


def _palette(hex_colours: str) -> Floats:
    """RGB colours in 0 .. 1, (n, 3), from hexadecimal digits."""
    values = np.frombuffer(bytes.fromhex(hex_colours), np.uint8).reshape(-1, 3)
    return (values / 255).astype(np.float32)


# One palette for both classes, so that colour alone does not tell them apart.
FUR = _palette("383437 e0dbd0 d6b585 cc7d38 8a5a38 5a3f2e 8c8f94 697587 b39470")
IRIS = _palette("80ad40 d9a829 73421f 669ecc")
NOSE = _palette("1f1a1c 59382e e09494")
BLACK, WHITE, PINK, GREEN = _palette("0f0d0f fafaf5 cf8585 4d7a2e")


def draw(seed: int, index: int) -> tuple[str, NDArray[np.uint8]]:
    """Draw one picture, always the same for the same arguments.

    Args:
        seed: Seed of the data set, 0 or more.
        index: Picture number, 0 .. NUM_IMAGES - 1; even numbers are cats, odd ones dogs.

    Returns:
        The class name and the picture, (height, width, 3) uint8 RGB with sides in 120 .. 640.
    """
    rng = np.random.default_rng([seed, index])
    name = CLASS_NAMES[index % len(CLASS_NAMES)]
    height, width = _size(rng)
    shrink = DRAWING_SIDE / max(height, width)
    shape = round(height * shrink), round(width * shrink)
    pose = _pose(rng, shape)
    brush = _Brush(_background(rng, shape), pose, _coat(rng, pose, shape))
    _paint_body(rng, brush)
    if name == "cat":
        _paint_cat(rng, brush)
    else:
        _paint_dog(rng, brush)
    _paint_occluder(rng, brush)
    return name, _photograph(rng, brush.image, (height, width))


# --- the frame -----------------------------------------------------------------------------


def _size(rng: Generator) -> tuple[int, int]:
    """Height and width of the finished picture."""
    aspect = math.exp(rng.uniform(-0.27, 0.27))
    long_side = MIN_SIDE + (MAX_SIDE - MIN_SIDE) * rng.beta(1.2, 3.5)
    short_side = max(MIN_SIDE, long_side * min(aspect, 1 / aspect))
    if aspect > 1:
        return round(short_side), round(long_side)
    return round(long_side), round(short_side)


@dataclass(frozen=True)
class _Pose:
    """Where the head is: pixels = outline @ axes + centre; `turn` moves the face sideways."""

    axes: Floats
    centre: Floats
    turn: float


def _pose(rng: Generator, shape: tuple[int, int]) -> _Pose:
    """A head near the middle: scaled, tilted, mirrored and turned a little."""
    height, width = shape
    scale = math.sqrt(height * width) * rng.uniform(0.24, 0.27)
    tilt = rng.normal(0, 0.05)
    cos, sin = scale * math.cos(tilt), scale * math.sin(tilt)
    mirror = rng.choice([-1, 1])
    shift = min(shape) * rng.uniform(-0.02, 0.02, 2)
    return _Pose(
        axes=np.array([[cos * mirror, sin * mirror], [-sin, cos]], np.float32),
        centre=np.array([width / 2 + shift[0], height / 2 + shift[1]], np.float32),
        turn=rng.uniform(0, 0.16),
    )


def _resized(image: Floats, shape: tuple[int, int]) -> Floats:
    """Linear interpolation to `shape`; skimage's resize takes longer than the whole drawing."""
    for axis, side in enumerate(shape):
        position = np.linspace(0, image.shape[axis] - 1, side, dtype=np.float32)
        low = np.minimum(position.astype(int), image.shape[axis] - 2)
        share = (position - low).astype(np.float32)
        share = np.expand_dims(share, [other for other in range(image.ndim) if other != axis])
        start = image.take(low, axis)
        image = start + share * (image.take(low + 1, axis) - start)
    return image


def _noise(rng: Generator, shape: tuple[int, int], cells: int) -> Floats:
    """Smooth noise in 0 .. 1 of `shape`, from `cells` x `cells` random values."""
    return _resized(rng.random((cells, cells), dtype=np.float32), shape)


# --- outlines ------------------------------------------------------------------------------


def _ellipse(x: float, y: float, rx: float, ry: float, corners: int = 16) -> Floats:
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False, dtype=np.float32)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _rounded(*corners: Point) -> Floats:
    """A smooth outline near `corners`, by Chaikin's corner cutting."""
    points = np.array(corners, np.float32)
    for _ in range(2):
        ahead = np.roll(points, -1, axis=0)
        cut = np.stack([0.75 * points + 0.25 * ahead, 0.25 * points + 0.75 * ahead], axis=1)
        points = cut.reshape(-1, 2)
    return points


def _head(*right_half: Point) -> Floats:
    """A smooth symmetric outline from the corners of its right half, top to bottom."""
    return _rounded(*right_half, *((-x, y) for x, y in reversed(right_half)))


def _stroke(start: Point, control: Point, end: Point, width: float) -> Floats:
    """A quadratic Bezier curve from `start` to `end` that tapers off."""
    t = np.linspace(0, 1, 7, dtype=np.float32)[:, None]
    weights = np.hstack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    curve = weights @ np.array([start, control, end], np.float32)
    along = np.gradient(curve, axis=0)
    across = along[:, ::-1] * np.array([-1, 1]) / np.linalg.norm(along, axis=1, keepdims=True)
    half = across * width * (0.5 - 0.4 * t)
    return np.concatenate([curve + half, (curve - half)[::-1]]).astype(np.float32)


# --- painting: everything below changes the image it is given ------------------------------


def _inside(outline: Floats, image: Floats) -> tuple[Indices, Indices]:
    """Rows and columns of the pixels of `image` inside `outline`, which is in pixels."""
    rows, columns = polygon(outline[:, 1], outline[:, 0], image.shape[:2])
    return rows, columns


def _fill(image: Floats, outline: Floats, colour: Floats, opacity: float = 1.0) -> None:
    """Paint the inside of `outline`, in pixels, with one colour."""
    inside = _inside(outline, image)
    image[inside] += opacity * (colour - image[inside])


@dataclass(frozen=True)
class _Brush:
    """Paints outlines in head units onto `image`; `coat` is fur for all of the image."""

    image: Floats
    pose: _Pose
    coat: Floats

    def to_pixels(self, outline: Floats) -> Floats:
        return outline @ self.pose.axes + self.pose.centre

    def fill(self, outline: Floats, colour: Floats, opacity: float = 1.0) -> None:
        _fill(self.image, self.to_pixels(outline), colour, opacity)

    def fur(self, outline: Floats, shade: float = 1.0) -> None:
        """A furry part with a darker rim."""
        spokes = outline - outline.mean(axis=0)
        rim = 0.04 * spokes / np.linalg.norm(spokes, axis=1, keepdims=True)
        for part, brightness in ((outline + rim, 0.5), (outline, shade)):
            inside = _inside(self.to_pixels(part), self.image)
            self.image[inside] = brightness * self.coat[inside]


def _colour(rng: Generator) -> Floats:
    """A muted colour."""
    return (rng.uniform(0.4, 0.7) + rng.uniform(-0.16, 0.16, 3)).astype(np.float32)


def _background(rng: Generator, shape: tuple[int, int]) -> Floats:
    """A shaded wall with furniture, grass, lights or wallpaper, (height, width, 3)."""
    across = _noise(rng, shape, 2)[..., None]
    image = _colour(rng) * (1 - across) + _colour(rng) * across
    clutters = (_paint_furniture, _paint_grass, _paint_lights, _paint_wallpaper)
    clutters[rng.integers(len(clutters))](rng, image)
    return image


def _paint_furniture(rng: Generator, image: Floats) -> None:
    height, width, _ = image.shape
    floor = round(height * rng.uniform(0.6, 0.85))
    image[floor:] = 0.6 * image[floor:] + 0.4 * _colour(rng)
    for _ in range(rng.integers(3, 7)):
        left, top = rng.integers(width), rng.integers(floor)
        right = left + round(width * rng.uniform(0.1, 0.4))
        image[top : floor + 6, left:right] = _colour(rng)
        image[top : top + 3, left:right] *= 0.7


def _paint_grass(rng: Generator, image: Floats) -> None:
    height, width, _ = image.shape
    horizon = round(height * rng.uniform(0.3, 0.7))
    green = GREEN * rng.uniform(0.7, 1.5)
    image[horizon:] = green
    for _ in range(40):
        x, y = rng.uniform([0, horizon], [width, height * 1.1])
        lean, length = rng.normal([0, 25], 8)
        blade = _stroke((x, y), (x, y - length / 2), (x + lean, y - length), width=5)
        _fill(image, blade, green * rng.uniform(0.6, 1.4))


def _paint_lights(rng: Generator, image: Floats) -> None:
    height, width, _ = image.shape
    for _ in range(rng.integers(6, 16)):
        x, y, radius = rng.uniform([0, 0, 0.03 * height], [width, height, 0.12 * height])
        _fill(image, _ellipse(x, y, radius, radius, 14), _colour(rng) + 0.15, opacity=0.5)


def _paint_wallpaper(rng: Generator, image: Floats) -> None:
    rows, columns = np.indices(image.shape[:2], dtype=np.float32)
    slanted = columns + rng.choice([0.0, 0.5, 1.0]) * rows
    stripes = np.sin(slanted * rng.uniform(0.2, 0.7)) > rng.uniform(-0.5, 0.5)
    image[stripes] += 0.6 * (_colour(rng) - image[stripes])


def _coat(rng: Generator, pose: _Pose, shape: tuple[int, int]) -> Floats:
    """Fur for the whole picture, two colours in a pattern lit from one side, (h, w, 3)."""
    rows, columns = np.indices(shape, dtype=np.float32)
    pixels = np.stack([columns, rows], axis=-1) - pose.centre
    x, y = np.moveaxis(pixels @ np.linalg.inv(pose.axes), -1, 0)
    wobble = _noise(rng, shape, 12)
    match rng.choice(["plain", "tabby", "spots", "patches"]):
        case "tabby":
            waves = np.sin(rng.uniform(9, 14) * (np.abs(x) + 0.35 * y) + 5 * wobble)
            share = np.where(waves > 0.25, np.float32(0.7), np.float32(0))
        case "spots":
            share = np.where(_noise(rng, shape, 32) > 0.72, np.float32(0.8), np.float32(0))
        case "patches":
            share = (_noise(rng, shape, 6) > 0.5).astype(np.float32)
        case _:
            share = 0.3 * wobble
    first, second = rng.choice(FUR, 2, replace=False)
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 - 0.16 * math.cos(angle) * x - 0.1 * math.sin(angle) * y
    grain = 0.12 * (_noise(rng, shape, 70) - 0.5)
    fur = first + share[..., None] * (second - first)
    coat: Floats = fur * light.clip(0.6, 1.3)[..., None] + grain[..., None]
    return coat.clip(0, 1)


def _paint_body(rng: Generator, brush: _Brush) -> None:
    """Shoulders below the head and, on some, a pale chest and a collar."""
    lean, breadth = rng.uniform([-0.5, 0.8], [0.5, 1.15])
    brush.fur(_ellipse(lean, 2.2, breadth, 1.7), shade=0.9)
    if rng.random() < 0.4:
        brush.fill(_ellipse(0.7 * lean, 1.8, 0.45 * breadth, 0.9), WHITE, opacity=0.6)
    if rng.random() < 0.4:
        brush.fill(_ellipse(0.3 * lean, 0.85, 0.72, 0.34), _colour(rng))


def _paint_cat(rng: Generator, brush: _Brush) -> None:
    """Pointed upright ears, slit pupils, a short muzzle and whiskers."""
    x = brush.pose.turn
    lining = rng.choice(NOSE)
    tip_x, tip_y = rng.uniform([0.62, -1.6], [0.85, -1.35])
    if rng.random() < 0.15:  # folded over, as some breeds have them
        tip_y = -1.05
    ear = [(0.14, -0.72), (0.45, -1.15), (tip_x, tip_y), (0.88, -0.9), (0.92, -0.3)]
    for side in (-1, 1):
        outline = np.array([(side * x, y) for x, y in ear], np.float32)
        outline += rng.normal(0, 0.03, 2)
        brush.fur(outline)
        brush.fill(0.55 * outline + 0.45 * outline.mean(axis=0), lining, opacity=0.7)
    brush.fur(_head((0.75, -0.9), (rng.uniform(1.05, 1.2), 0.15), (0.6, 0.95)))
    _paint_eyes(rng, brush, height=rng.uniform(0.16, 0.22), pupil_width=rng.uniform(0.25, 0.55))
    pads, opacity = rng.choice(FUR), rng.uniform(0.3, 0.9)
    for side in (-1, 1):
        brush.fill(_ellipse(x + 0.17 * side, 0.5, 0.24, 0.19), pads, opacity)
    brush.fill(_rounded((x - 0.16, 0.27), (x + 0.16, 0.27), (x, 0.45)), rng.choice(NOSE))
    for side in (-1, 1):
        brush.fill(_stroke((x, 0.42), (x, 0.62), (x + 0.24 * side, 0.6), 0.07), BLACK)
    colour, opacity = (BLACK, WHITE)[rng.integers(2)], rng.uniform(0.3, 0.95)
    for side in (-1, 1):
        for y in rng.normal([-0.2, 0, 0.2], 0.04):
            root, bend = (x + 0.25 * side, 0.5 + 0.2 * y), (x + 0.75 * side, 0.4 + y)
            whisker = _stroke(root, bend, (x + 1.25 * side, 0.5 + 1.7 * y), 0.06)
            brush.fill(whisker, colour, opacity)


def _paint_dog(rng: Generator, brush: _Brush) -> None:
    """Hanging or half-raised ears, round pupils, a long muzzle with a big nose."""
    x = 1.4 * brush.pose.turn
    reach, length = rng.uniform([1.0, 0.3], [1.3, 0.95])
    raised = [(0.2, -0.7), (0.45, -1.3), (0.75, -1.3), (reach, -0.75), (1.0, -0.5), (0.85, -0.3)]
    hanging = [(0.4, -0.85), (0.8, -0.9), (reach, -0.2), (reach, length), (0.8, length), (0.7, 0)]
    ear = raised if rng.random() < 0.2 else hanging
    ear_shade = rng.uniform(0.6, 1.2)
    brush.fur(_head((0.7, -1.0), (rng.uniform(0.85, 1.0), 0), (0.5, rng.uniform(0.95, 1.15))))
    for side in (-1, 1):
        outline = _rounded(*((side * x, y) for x, y in ear))
        outline += rng.normal(0, 0.03, 2)
        brush.fur(outline, ear_shade)
    _paint_eyes(rng, brush, height=rng.uniform(0.12, 0.17), pupil_width=0.75)
    y, muzzle_rx, muzzle_ry = rng.uniform([0.45, 0.4, 0.38], [0.6, 0.52, 0.47])
    if rng.random() < 0.4:
        brush.fill(_ellipse(x, 1.0, 0.17, 0.28), PINK)
    muzzle = _ellipse(x, y, muzzle_rx, muzzle_ry)
    brush.fur(muzzle)
    brush.fill(muzzle, rng.choice(FUR), opacity=rng.uniform(0, 0.8))
    brush.fill(_ellipse(1.1 * x, y - 0.2, rng.uniform(0.2, 0.26), 0.17), rng.choice(NOSE))
    for side in (-1, 1):
        brush.fill(_stroke((x, y), (x, y + 0.3), (x + 0.35 * side, y + 0.2), 0.07), BLACK)


def _paint_eyes(rng: Generator, brush: _Brush, height: float, pupil_width: float) -> None:
    """Two eyes; `pupil_width` is that of the pupils as a part of `height`."""
    iris = rng.choice(IRIS)
    apart, y = rng.uniform([0.36, -0.2], [0.44, -0.05])
    for x in (brush.pose.turn - apart, brush.pose.turn + apart):
        brush.fill(_ellipse(x, y, 1.2 * height + 0.04, height + 0.04), BLACK)
        brush.fill(_ellipse(x, y, 1.2 * height, height), iris)
        brush.fill(_ellipse(x, y, pupil_width * height, 0.9 * height), BLACK)
        brush.fill(_ellipse(x + 0.05, y - 0.07, 0.05, 0.05), WHITE)


def _paint_occluder(rng: Generator, brush: _Brush) -> None:
    """Now and then a ball in front of a part of the animal."""
    if rng.random() < 0.2:
        x, y = rng.choice([-1, 1]) * rng.uniform(0.7, 1.3), rng.uniform(-0.5, 1.5)
        brush.fill(_ellipse(x, y, 0.45, 0.45), _colour(rng))


def _photograph(rng: Generator, image: Floats, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The finished picture of `size`: blur, uneven tinted light and grain."""
    image = gaussian(image, rng.uniform(0.5, 0.9), channel_axis=-1)
    tint = rng.uniform(0.9, 1.1, 3).astype(np.float32)
    image *= tint + 0.2 * (_noise(rng, image.shape[:2], 2)[..., None] - 0.5)
    image += rng.uniform(0, 0.05) * rng.standard_normal(image.shape, dtype=np.float32)
    return (_resized(image, size) * 255).clip(0, 255).round().astype(np.uint8)
