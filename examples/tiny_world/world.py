"""The world: what there is to see, how it moves, what it is called, and how it is drawn.

A scene is one shape in one colour that does one thing on one background; its caption says so.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wan.configs import DEFAULT_NEGATIVE_PROMPT

COLORS = {
    "red": (225, 45, 40),
    "green": (50, 170, 70),
    "blue": (45, 90, 225),
    "yellow": (245, 210, 50),
    "purple": (150, 65, 190),
    "orange": (245, 140, 35),
}
BACKGROUNDS = {"black": (15, 15, 18), "white": (240, 240, 236), "gray": (128, 130, 134)}

# Each tells which points of the plane belong to a shape of radius 1 around the origin; y points down.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x * x + y * y < 0.9**2,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.78,
    "triangle": lambda x, y: (y < 0.72) & (y > 2 * abs(x) - 0.98),
    "star": lambda x, y: _star(x, y),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.68) < 0.27,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.28) & (np.maximum(abs(x), abs(y)) < 0.92),
}

# Each maps time 0..1 to (shift x, shift y, turn in radians, scale); shifts from -1 to 1 in the room around the shape.
Motion = Callable[[float], tuple[float, float, float, float]]
MOTIONS: dict[str, Motion] = {
    "moves right": lambda t: (2 * t - 1, 0, 0, 1),
    "moves left": lambda t: (1 - 2 * t, 0, 0, 1),
    "moves down": lambda t: (0, 2 * t - 1, 0, 1),
    "moves up": lambda t: (0, 1 - 2 * t, 0, 1),
    "spins": lambda t: (0, 0, np.pi * t, 1),
    "grows": lambda t: (0, 0, 0, 0.55 + 0.75 * t),
    "shrinks": lambda t: (0, 0, 0, 1.3 - 0.75 * t),
    "stays still": lambda t: (0, 0, 0, 1),
}

ROUND = ("circle", "ring")


@dataclass(frozen=True)
class Scene:
    """What one clip shows; radius and place as fractions of the picture's side, place from -1 to 1 in the free room."""

    color: str
    shape: str
    motion: str
    background: str
    radius: float = 0.24
    place: float = 0.0
    striped: bool = False

    @property
    def caption(self) -> str:
        """The sentence that describes the scene: "a red circle moves right on a black background"."""
        article = "an" if self.color[0] in "aeiou" else "a"
        return f"{article} {self.color} {self.shape} {self.motion} on a {self.background} background"


def varied_caption(scene: Scene, rng: random.Random, rate: float = 0.1) -> str:
    """Return the scene's caption with each attribute left out or called by a made-up word now and then.

    So a model learns that what is not said may be anything, and that there are words it does not know.
    """

    def kept(word: str, missing: str = "") -> str:
        chance = rng.random()
        return missing if chance < rate / 2 else made_up_word(rng) if chance < rate else word

    color, shape = kept(scene.color), kept(scene.shape, "shape")
    motion = "" if rng.random() < rate / 2 else scene.motion
    background = "" if rng.random() < rate / 2 else f"on a {kept(scene.background)} background"
    thing = f"{color} {shape}".strip()
    words = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing} {motion} {background}"
    return " ".join(words.split())


def training_caption(scene: Scene, rng: random.Random) -> str:
    """Return a caption to train on: varied, and one in twelve what is said when nothing is asked for."""
    if rng.random() < 1 / 12:
        return rng.choice(["", DEFAULT_NEGATIVE_PROMPT])
    return varied_caption(scene, rng)


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene's caption is one of the tenth that no DiT is trained on, so that it can be tested."""
    return zlib.crc32(scene.caption.encode()) % 10 == 0


def made_up_word(rng: random.Random) -> str:
    """Return a word of two syllables that means nothing."""
    return "".join(
        rng.choice("bdfgklmnprtvz") + rng.choice("aeiou") + rng.choice(["", "n", "r", "x"]) for _ in range(2)
    )


def random_scene(rng: random.Random) -> Scene:
    """Return any scene of the world; what is round does not spin, because nobody would see it."""
    shape = rng.choice(list(SHAPES))
    return Scene(
        color=rng.choice(list(COLORS)),
        shape=shape,
        motion=rng.choice([motion for motion in MOTIONS if not (motion == "spins" and shape in ROUND)]),
        background=rng.choice(list(BACKGROUNDS)),
        radius=rng.uniform(0.2, 0.28),
        place=rng.uniform(-0.7, 0.7),
    )


def draw(scene: Scene, frames: int = 17, size: int = 64, motion: Motion | None = None) -> np.ndarray:
    """Return the clip as uint8 [frames size size 3], drawn at four times the size and averaged down.

    motion: what the shape does, in place of what its caption says.
    """
    motion = motion or MOTIONS[scene.motion]
    return np.stack([_draw_frame(scene, motion, i / max(frames - 1, 1), size) for i in range(frames)])


def _draw_frame(scene: Scene, motion: Motion, time: float, size: int, oversampling: int = 4) -> np.ndarray:
    shift_x, shift_y, turn, scale = motion(time)
    radius = 2 * scene.radius * scale
    room = max(1 - radius, 0)
    # What moves along one axis has a fixed place on the other.
    moves_sideways = motion(0)[0] != 0
    place_x, place_y = (0, scene.place) if moves_sideways else (scene.place, 0)
    center_x, center_y = room * (shift_x + place_x), room * (shift_y + place_y)
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    # Only what the shape can reach is drawn in detail.
    (left, right), (top, bottom) = (_reached(center, radius, size) for center in (center_x, center_y))
    axis = (np.arange(size * oversampling) + 0.5) / (size * oversampling) * 2 - 1
    x, y = np.meshgrid(*(axis[a * oversampling : b * oversampling] for a, b in ((left, right), (top, bottom))))
    x, y = (x - center_x) / radius, (y - center_y) / radius
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    near = np.empty((*x.shape, 3), np.float32)
    near[:] = BACKGROUNDS[scene.background]
    inside = SHAPES[scene.shape](x, y)
    near[inside] = COLORS[scene.color]
    if scene.striped:
        near[inside & (np.floor(x * 2.2 + 0.5) % 2 == 0)] = BACKGROUNDS[
            "black" if scene.background == "white" else "white"
        ]
    near = near.reshape(bottom - top, oversampling, right - left, oversampling, 3).mean((1, 3))
    picture[top:bottom, left:right] = near
    return np.round(picture).astype(np.uint8)


def _reached(center: float, radius: float, size: int) -> tuple[int, int]:
    """Return the first pixel, and the one after the last, that a shape at `center` from -1 to 1 can reach."""
    reach = 1.15 * radius  # corners of the square
    first, last = (int(np.floor((edge + 1) / 2 * size)) for edge in (center - reach, center + reach))
    return max(first, 0), min(last + 1, size)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: a radius that falls in straight lines from 1 at a tip to 0.45 between two."""
    sector = 2 * np.pi / 5
    angle = abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    tip, notch = np.array([1.0, 0.0]), 0.45 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    return (notch[0] - tip[0]) * (py - tip[1]) - (notch[1] - tip[1]) * (px - tip[0]) > 0
