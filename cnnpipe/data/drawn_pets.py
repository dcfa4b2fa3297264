"""The built-in data set "drawn-pets": synthetic cartoon cats and dogs, drawn from a seed.

Its place: this is where images come from when nothing is downloaded; whoever fills `data/raw`
calls `draw` for each number and writes the picture under its class name. Size, background,
colours, fur pattern, pose and light are drawn alike for both classes; only the anatomy differs.

Shapes are outlines in head units: the origin is the middle of the head, x points right, y points
down, and 1 is about half the width of the head. A `_Pose` carries them to pixels.
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

SIDES = (120, 640)
# Pictures are drawn with this long side and resized at the end: drawing at 640 costs five times
# as much, and the article's network sees 300 x 300 pixels anyway.
DRAWING_SIDE = 200

# One palette for both classes, so that colour alone does not tell them apart.
FUR = np.array(
    [
        [0.16, 0.15, 0.16],
        [0.93, 0.91, 0.87],
        [0.86, 0.73, 0.54],
        [0.80, 0.49, 0.22],
        [0.50, 0.33, 0.20],
        [0.31, 0.21, 0.15],
        [0.55, 0.56, 0.58],
        [0.41, 0.46, 0.53],
        [0.70, 0.58, 0.44],
    ],
    np.float32,
)
IRIS = np.array(
    [[0.50, 0.68, 0.25], [0.85, 0.66, 0.16], [0.45, 0.26, 0.12], [0.40, 0.62, 0.80]], np.float32
)
NOSE = np.array([[0.12, 0.10, 0.11], [0.35, 0.22, 0.18], [0.88, 0.58, 0.58]], np.float32)
BLACK = np.array([0.06, 0.05, 0.06], np.float32)
WHITE = np.array([0.98, 0.98, 0.96], np.float32)
PINK = np.array([0.90, 0.58, 0.58], np.float32)


@dataclass(frozen=True)
class _Pose:
    """Where the head is: `pixels = points @ axes + centre`, both in (x, y)."""

    axes: Floats
    centre: Floats
    turn: float

    def to_pixels(self, points: Floats) -> Floats:
        return points @ self.axes + self.centre

    def head_grid(self, shape: tuple[int, int]) -> tuple[Floats, Floats]:
        """x and y in head units of each pixel, two arrays of `shape`."""
        rows, columns = np.indices(shape, dtype=np.float32)
        grid = (np.stack([columns, rows], axis=-1) - self.centre) @ np.linalg.inv(self.axes)
        return grid[..., 0], grid[..., 1]


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
    size = _size(rng)
    height, width = (max(1, round(side * DRAWING_SIDE / max(size))) for side in size)
    image = _background(rng, (height, width))
    pose = _pose(rng, (height, width))
    coat = _coat(rng, pose, (height, width))
    brush = _Brush(image, pose, coat)
    _paint_body(rng, brush)
    (_paint_cat if name == "cat" else _paint_dog)(rng, brush)
    _paint_occluder(rng, brush)
    return name, _photograph(rng, image, size)


# --- the frame -----------------------------------------------------------------------------


def _size(rng: Generator) -> tuple[int, int]:
    """Height and width of the finished picture."""
    aspect = np.exp(rng.uniform(-0.27, 0.27))
    long_side = SIDES[0] + (SIDES[1] - SIDES[0]) * rng.beta(1.2, 3.5)
    short_side = max(SIDES[0], long_side * min(aspect, 1 / aspect))
    sides = round(short_side), round(long_side)
    return sides if aspect > 1 else sides[::-1]


def _pose(rng: Generator, shape: tuple[int, int]) -> _Pose:
    """A head near the middle: scaled, tilted, mirrored and turned a little."""
    size = np.array(shape[::-1])
    scale = math.sqrt(shape[0] * shape[1]) * rng.uniform(0.24, 0.27)
    tilt = rng.normal(0, 0.06)
    cos, sin = math.cos(tilt) * scale, math.sin(tilt) * scale
    mirror = rng.choice([-1, 1])
    centre = size * [0.5, 0.5] + min(shape) * rng.uniform(-0.025, 0.025, 2)
    return _Pose(
        axes=np.array([[cos * mirror, sin * mirror], [-sin, cos]], np.float32),
        centre=centre.astype(np.float32),
        turn=rng.uniform(0, 0.16),
    )


def _resized(image: Floats, shape: tuple[int, int]) -> Floats:
    """Linear interpolation to `shape`; skimage's resize takes longer than the whole drawing."""
    for axis, side in enumerate(shape):
        position = np.linspace(0, image.shape[axis] - 1, side, dtype=np.float32)
        low = np.minimum(position.astype(int), image.shape[axis] - 2)
        share = (position - low).astype(np.float32)
        share = np.expand_dims(share, tuple(i for i in range(image.ndim) if i != axis))
        first = image.take(low, axis)
        image = first + share * (image.take(low + 1, axis) - first)
    return image


def _noise(rng: Generator, shape: tuple[int, int], cells: int) -> Floats:
    """Smooth noise in 0 .. 1, with `cells` values along each side."""
    return _resized(rng.random((cells, cells), dtype=np.float32), shape)


# --- outlines in head units, (n, 2) --------------------------------------------------------


def _ellipse(x: float, y: float, rx: float, ry: float, corners: int = 18) -> Floats:
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.column_stack([x + rx * np.cos(angle), y + ry * np.sin(angle)]).astype(np.float32)


def _rounded(corners: list[tuple[float, float]]) -> Floats:
    """A smooth closed outline near `corners`, by Chaikin's corner cutting."""
    points = np.array(corners, np.float32)
    for _ in range(2):
        following = np.roll(points, -1, axis=0)
        cut = [0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following]
        points = np.stack(cut, axis=1).reshape(-1, 2)
    return points


def _stroke(start: Floats, control: Floats, end: Floats, width: float) -> Floats:
    """A quadratic Bezier curve from `start` to `end` as an outline that tapers to a point."""
    t = np.linspace(0, 1, 7, dtype=np.float32)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
    along = np.gradient(curve, axis=0)
    across = along[:, ::-1] * [-1, 1] / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-6)
    half = across * (0.5 * width * (1 - 0.8 * t))
    return np.concatenate([curve + half, (curve - half)[::-1]]).astype(np.float32)


# --- the surroundings ----------------------------------------------------------------------


def _colour(rng: Generator) -> Floats:
    """A rather muted colour."""
    grey = rng.uniform(0.3, 0.8)
    return (grey + rng.uniform(-0.2, 0.2, 3)).clip(0, 1).astype(np.float32)


def _background(rng: Generator, shape: tuple[int, int]) -> Floats:
    """A shaded wall with furniture, grass, lights or wallpaper before it, (height, width, 3)."""
    across = _noise(rng, shape, 2)[..., None]
    image = _colour(rng) * (1 - across) + _colour(rng) * across
    clutter = rng.choice([_add_furniture, _add_grass, _add_lights, _add_wallpaper])
    clutter(rng, image)
    return image


def _add_furniture(rng: Generator, image: Floats) -> None:
    height, width = image.shape[:2]
    floor = round(height * rng.uniform(0.6, 0.85))
    image[floor:] = 0.6 * image[floor:] + 0.4 * _colour(rng)
    for _ in range(rng.integers(3, 7)):
        left, top = rng.integers(0, width), rng.integers(0, floor)
        right = left + round(width * rng.uniform(0.1, 0.4))
        image[top : floor + 8, left:right] = _colour(rng)
        image[top : top + 4, left:right] *= 0.7


def _add_grass(rng: Generator, image: Floats) -> None:
    height, width = image.shape[:2]
    horizon = round(height * rng.uniform(0.3, 0.7))
    green = np.array([0.30, 0.48, 0.18], np.float32) * rng.uniform(0.7, 1.5)
    image[horizon:] = green
    for _ in range(60):
        foot = rng.uniform([0, horizon], [width, height * 1.1])
        tip = foot + rng.normal([0, -35], [12, 12])
        blade = _stroke(foot, (foot + tip) / 2 + rng.normal(0, 4, 2), tip, 6)
        _fill(image, blade, green * rng.uniform(0.6, 1.4))


def _add_lights(rng: Generator, image: Floats) -> None:
    height, width = image.shape[:2]
    for _ in range(rng.integers(6, 16)):
        radius = rng.uniform(0.03, 0.12) * height
        disc = _ellipse(*rng.uniform([0, 0], [width, height]), radius, radius, 14)
        _fill(image, disc, _colour(rng) + 0.15, opacity=0.5)


def _add_wallpaper(rng: Generator, image: Floats) -> None:
    rows, columns = np.indices(image.shape[:2], dtype=np.float32)
    slant = rng.choice([0, 0, 1, 0.5])
    wave = np.sin((columns + slant * rows) * rng.uniform(0.15, 0.5))
    image += (_colour(rng) - image) * (0.6 * (wave > rng.uniform(-0.5, 0.5)))[..., None]


# --- the animal ----------------------------------------------------------------------------


def _coat(rng: Generator, pose: _Pose, shape: tuple[int, int]) -> Floats:
    """Fur for the whole picture: two colours in a pattern, lit from one side, (h, w, 3)."""
    x, y = pose.head_grid(shape)
    wobble = _noise(rng, shape, 12)
    match rng.choice(["plain", "tabby", "spots", "patches"]):
        case "tabby":
            stripes = np.sin(rng.uniform(9, 14) * (np.abs(x) + 0.35 * y) + 5 * wobble)
            second = (stripes > 0.25) * np.float32(0.7)
        case "spots":
            second = (_noise(rng, shape, 32) > 0.72) * np.float32(0.8)
        case "patches":
            second = (_noise(rng, shape, 6) > 0.5).astype(np.float32)
        case _:
            second = 0.3 * wobble
    first_colour, second_colour = rng.choice(FUR, 2, replace=False)
    fur = first_colour + second[..., None] * (second_colour - first_colour)
    direction = rng.uniform(0, 2 * np.pi)
    light = 1 - 0.16 * (x * math.cos(direction) + 0.6 * y * math.sin(direction))
    grain = 0.12 * (_noise(rng, shape, 70) - 0.5)
    return (fur * light.clip(0.6, 1.3)[..., None] + grain[..., None]).clip(0, 1)


def _fill(image: Floats, outline: Floats, colour: Floats, opacity: float = 1.0) -> None:
    """Paint the inside of `outline` (pixels) with one colour or, if (h, w, 3), a texture."""
    inside = polygon(outline[:, 1], outline[:, 0], image.shape[:2])
    paint = colour[inside] if colour.ndim == 3 else colour
    image[inside] += opacity * (paint - image[inside])


@dataclass(frozen=True)
class _Brush:
    """Paints outlines in head units onto `image`, which it changes in place."""

    image: Floats
    pose: _Pose
    coat: Floats

    def fill(self, outline: Floats, colour: Floats, opacity: float = 1.0) -> None:
        _fill(self.image, self.pose.to_pixels(outline), colour, opacity)

    def fur(self, outline: Floats, shade: float = 1.0) -> None:
        """A furry part with a darker rim around it."""
        spokes = outline - outline.mean(axis=0)
        rim = 0.04 * spokes / np.linalg.norm(spokes, axis=1, keepdims=True)
        self.fill(outline + rim, self.coat * 0.5)
        self.fill(outline, self.coat * shade)

    def line(
        self,
        points: list[tuple[float, float]],
        colour: Floats,
        width: float = 0.06,
        opacity: float = 1.0,
    ) -> None:
        self.fill(_stroke(*np.array(points, np.float32), width), colour, opacity)


def _paint_body(rng: Generator, brush: _Brush) -> None:
    """Shoulders below the head and, on some, a pale chest and a collar."""
    lean = rng.uniform(-0.5, 0.5)
    breadth = rng.uniform(0.8, 1.15)
    brush.fur(_ellipse(lean, 2.2, breadth, 1.7), shade=0.9)
    if rng.random() < 0.4:
        brush.fill(_ellipse(lean * 0.7, 1.8, 0.45 * breadth, 0.9), WHITE, opacity=0.6)
    if rng.random() < 0.4:
        brush.fill(_ellipse(lean * 0.3, 0.85, 0.72, 0.34), _colour(rng))


def _paint_cat(rng: Generator, brush: _Brush) -> None:
    """Pointed upright ears, slit pupils, a short muzzle and whiskers."""
    turn = brush.pose.turn
    inner_ear = rng.choice(NOSE)
    tip_x, tip_y = rng.uniform(0.62, 0.85), rng.uniform(-1.6, -1.35)
    for side in (-1, 1):
        tip = (tip_x + rng.normal(0, 0.04), tip_y + rng.normal(0, 0.04))
        ear = np.array([(0.14, -0.72), (0.45, -1.15), tip, (0.88, -0.9), (0.92, -0.3)], np.float32)
        ear = ear * [side, 1]
        brush.fur(ear)
        brush.fill(ear.mean(axis=0) + 0.55 * (ear - ear.mean(axis=0)), inner_ear, opacity=0.7)
    cheek = rng.uniform(0.95, 1.08)
    brush.fur(
        _rounded(
            [
                (0, -0.85),
                (0.7, -0.75),
                (cheek, 0.1),
                (0.75, 0.72),
                (0, 0.95),
                (-0.75, 0.72),
                (-cheek, 0.1),
                (-0.7, -0.75),
            ]
        )
    )
    _paint_eyes(rng, brush, height=rng.uniform(0.16, 0.22), pupil_width=rng.uniform(0.25, 0.55))
    pads = rng.choice(FUR)
    pale = rng.uniform(0.3, 0.9)
    for side in (-0.17, 0.17):
        brush.fill(_ellipse(turn + side, 0.5, 0.24, 0.19), pads, opacity=pale)
    brush.fill(_rounded([(turn - 0.16, 0.27), (turn + 0.16, 0.27), (turn, 0.45)]), rng.choice(NOSE))
    for side in (-1, 1):
        brush.line([(turn, 0.42), (turn, 0.62), (turn + 0.24 * side, 0.6)], BLACK, opacity=0.8)
    whiskers, opacity = (WHITE if rng.random() < 0.6 else BLACK), rng.uniform(0.3, 0.95)
    for side in (-1, 1):
        for droop in rng.normal([-0.22, 0.02, 0.26], 0.04):
            root, bend = (turn + 0.25 * side, 0.48 + 0.2 * droop), (turn + 0.75 * side, 0.4 + droop)
            brush.line(
                [root, bend, (turn + 1.25 * side, 0.5 + 1.6 * droop)], whiskers, 0.05, opacity
            )


def _paint_dog(rng: Generator, brush: _Brush) -> None:
    """Hanging or half-raised ears, round pupils, a long muzzle with a big nose."""
    turn = brush.pose.turn
    width, chin = rng.uniform(0.78, 0.92), rng.uniform(0.9, 1.1)
    head = _rounded(
        [
            (0, -0.95),
            (0.65, -0.85),
            (width, -0.2),
            (0.7, 0.6),
            (0, chin),
            (-0.7, 0.6),
            (-width, -0.2),
            (-0.65, -0.85),
        ]
    )
    hanging = rng.random() < 0.8
    reach, length = rng.uniform(1.0, 1.3), rng.uniform(0.3, 0.95)
    if hanging:
        ear = _rounded(
            [(0.4, -0.85), (0.8, -0.9), (reach, -0.2), (reach, length), (0.8, length), (0.68, -0.1)]
        )
    else:
        ear = _rounded(
            [(0.2, -0.7), (0.45, -1.3), (0.75, -1.3), (reach, -0.75), (1.0, -0.5), (0.85, -0.3)]
        )
    ears = [ear * [side, 1] + rng.normal(0, 0.03, 2) for side in (-1, 1)]
    brush.fur(head)
    ear_shade = rng.uniform(0.6, 1.2)
    for ear in ears:
        brush.fur(ear, shade=ear_shade)
    _paint_eyes(rng, brush, height=rng.uniform(0.12, 0.17), pupil_width=0.75)
    drop = rng.uniform(0.45, 0.6)
    muzzle = _ellipse(1.4 * turn, drop, rng.uniform(0.42, 0.55), rng.uniform(0.4, 0.5))
    if rng.random() < 0.4:
        brush.fill(
            _rounded(
                [
                    (1.4 * turn - 0.2, 0.8),
                    (1.4 * turn + 0.2, 0.8),
                    (1.4 * turn + 0.2, 1.3),
                    (1.4 * turn - 0.2, 1.3),
                ]
            ),
            PINK * 0.9,
        )
    brush.fill(muzzle, brush.coat * 0.6)
    brush.fill(muzzle * 0.94 + 0.06 * muzzle.mean(axis=0), brush.coat)
    brush.fill(muzzle * 0.94 + 0.06 * muzzle.mean(axis=0), rng.choice(FUR), opacity=rng.uniform(0, 0.8))
    brush.fill(_ellipse(1.6 * turn, drop - 0.2, rng.uniform(0.2, 0.26), 0.17), rng.choice(NOSE))
    for side in (-1, 1):
        brush.line(
            [(1.5 * turn, drop), (1.5 * turn, drop + 0.3), (1.4 * turn + 0.35 * side, drop + 0.2)],
            BLACK,
        )


def _paint_eyes(rng: Generator, brush: _Brush, height: float, pupil_width: float) -> None:
    """Two eyes with irises, pupils as wide as `pupil_width` of their height, and highlights."""
    iris = rng.choice(IRIS)
    apart, level = rng.uniform(0.36, 0.44), rng.uniform(-0.2, -0.05)
    for x in (brush.pose.turn - apart, brush.pose.turn + apart):
        brush.fill(_ellipse(x, level, height * 1.2 + 0.04, height + 0.04, 16), BLACK)
        brush.fill(_ellipse(x, level, height * 1.2, height, 16), iris)
        brush.fill(_ellipse(x, level, height * pupil_width, height * 0.9, 12), BLACK)
        brush.fill(_ellipse(x + 0.05, level - 0.07, 0.05, 0.05, 8), WHITE)


def _paint_occluder(rng: Generator, brush: _Brush) -> None:
    """Now and then a ball or a board in front of a part of the animal."""
    if rng.random() > 0.2:
        return
    x, y = rng.choice([-1, 1]) * rng.uniform(0.7, 1.3), rng.uniform(-0.5, 1.5)
    outline = _ellipse(x, y, 0.5, 0.5) if rng.random() < 0.5 else _ellipse(x, y, 0.3, 4, 4)
    brush.fill(outline, _colour(rng))


# --- the camera ----------------------------------------------------------------------------


def _photograph(rng: Generator, image: Floats, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Blur, uneven tinted light and grain, at the finished size."""
    image = gaussian(image, rng.uniform(0.5, 1.1), channel_axis=-1)
    light = rng.uniform(0.85, 1.15) * rng.uniform(0.93, 1.07, 3) + 0.3 * (
        _noise(rng, image.shape[:2], 2)[..., None] - 0.5
    )
    image = image * light.astype(np.float32)
    image += rng.uniform(0, 0.05) * rng.standard_normal(image.shape, dtype=np.float32)
    return (_resized(image, size) * 255).clip(0, 255).round().astype(np.uint8)
