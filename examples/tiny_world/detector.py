"""Tell what a clip shows, from its pixels alone: colour, shape, motion, background, stripes.

    python -m examples.tiny_world.detector --clips 500

measures how often it is right on clips drawn at random, and how often it is fooled by clips that show nothing.
"""

import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from tqdm import tqdm

from examples.tiny_world.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, draw, random_scene
from utils.errors import run_script
from utils.options import option, parse_options

NOTHING = "nothing"
# A shape looks the same again after this part of a turn.
SYMMETRY = {"circle": None, "ring": None, "square": 4, "cross": 4, "star": 5, "triangle": 1}
VISIBLE = 60.0  # RGB steps from the background
FARTHEST_COLOR = 110.0  # in RGB steps; beyond it a colour is none of the world's
LEAST_OVERLAP = 0.72  # of a shape with its template, as intersection over union of soft masks


@dataclass(frozen=True)
class Sight:
    """What is seen; NOTHING for what is none of the world's."""

    color: str
    shape: str
    motion: str
    background: str
    striped: bool = False


@dataclass(frozen=True)
class DetectorOptions:
    """measuring the detector"""

    clips: int = option(500, "clips to draw")
    seed: int = option(1, "which clips")


def look(clip: np.ndarray) -> Sight:
    """Return what a clip, uint8 [F H W 3], shows."""
    pixels = clip.astype(np.float64)
    border = np.concatenate([pixels[:, :2].reshape(-1, 3), pixels[:, :, :2].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    background = _nearest(ground, BACKGROUNDS)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    # How far the shape is from the background in colour; low among its pixels, because stripes are farther.
    seen = distance[distance > VISIBLE]
    strength = np.quantile(seen, 0.3) if seen.size else 0.0
    masks = np.clip(distance / max(strength * 0.85, 1), 0, 1)
    areas = masks.sum((1, 2))
    if background == NOTHING or seen.size < 40 * len(clip) or areas.min() < 40 or areas.max() > 0.5 * masks[0].size:
        return Sight(NOTHING, NOTHING, NOTHING, background)
    inside = masks > 0.9
    stripe = BACKGROUNDS["black" if background == "white" else "white"]
    is_stripe = inside & (np.linalg.norm(pixels - stripe, axis=-1) < 60)
    striped = is_stripe.sum() > 0.15 * inside.sum()
    color = _color(pixels[inside & ~is_stripe])
    shape, turns = _shape(masks)
    return Sight(color, shape, _motion(masks, areas, turns) if shape != NOTHING else NOTHING, background, bool(striped))


def _nearest(color: np.ndarray, known: dict[str, tuple[int, int, int]]) -> str:
    distances = {name: np.linalg.norm(color - value) for name, value in known.items()}
    best = min(distances, key=distances.get)
    return best if distances[best] < FARTHEST_COLOR else NOTHING


def _color(pixels: np.ndarray) -> str:
    """Return the colour that most of the pixels [N 3] are nearest to, those between two colours left out."""
    distances = np.linalg.norm(pixels[:, None] - np.array(list(COLORS.values())), axis=-1)
    votes = np.bincount(distances.argmin(1)[distances.min(1) < FARTHEST_COLOR / 2], minlength=len(COLORS))
    return list(COLORS)[votes.argmax()] if votes.max() > 0.25 * len(pixels) else NOTHING


def _centers(masks: np.ndarray) -> np.ndarray:
    """Return the centre of mass (x, y) of each mask [F H W], in pixels."""
    y, x = np.mgrid[: masks.shape[1], : masks.shape[2]]
    weights = masks / masks.sum((1, 2), keepdims=True)
    return np.stack([(weights * x).sum((1, 2)), (weights * y).sum((1, 2))], axis=1)


def _motion(masks: np.ndarray, areas: np.ndarray, turns: np.ndarray) -> str:
    """Return how the shape's place, size or angle changes; turns: how far it is turned in each looked-at frame."""
    centers = _centers(masks)
    quarter = max(1, len(masks) // 4)
    way = (centers[-quarter:].mean(0) - centers[:quarter].mean(0)) / masks.shape[1]
    if np.abs(way).max() > 0.15:
        if np.abs(way).max() < 2 * np.abs(way).min():
            return NOTHING
        sideways = abs(way[0]) > abs(way[1])
        return f"moves {('left', 'right')[int(way[0] > 0)]}" if sideways else f"moves {('up', 'down')[int(way[1] > 0)]}"
    growth = areas[-quarter:].mean() / areas[:quarter].mean()
    if growth > 1.6 or growth < 1 / 1.6:
        return "grows" if growth > 1 else "shrinks"
    return "spins" if np.abs(turns - turns[0]).max() > 0.25 else "stays still"


def _shape(masks: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the shape whose templates cover the masks best, and its turn in each of some frames.

    Turns are the angles of the best template in radians, as far as the shape's symmetry tells them apart.
    """
    chosen = masks[np.linspace(0, len(masks) - 1, 5).round().astype(int)]
    best, best_score, best_turns = NOTHING, LEAST_OVERLAP, np.zeros(1)
    for shape, symmetry in SYMMETRY.items():
        angles = [0.0] if symmetry is None else np.arange(0, 2 * np.pi / symmetry, np.pi / 24)
        overlaps = np.array([[_overlap(mask, shape, angle) for angle in angles] for mask in chosen])
        score = overlaps.max(1).mean()
        if score > best_score:
            # Differences around the circle of angles that look different.
            phase = np.array(angles)[overlaps.argmax(1)] * (symmetry or 1)
            turns = np.abs((phase - phase[0] + np.pi) % (2 * np.pi) - np.pi) / (symmetry or 1)
            best, best_score, best_turns = shape, score, turns
    return best, best_turns


def _overlap(mask: np.ndarray, shape: str, angle: float) -> float:
    """Return how well a shape of the mask's area and centre covers it: soft intersection over union."""
    area, center_x, center_y = _moments(shape)
    radius = np.sqrt(mask.sum() / area)
    x, y = _centers(mask[None])[0]
    # Nothing of a template is farther from its centre than this; there the mask alone counts.
    left, top = max(0, int(x - 1.4 * radius)), max(0, int(y - 1.4 * radius))
    near = mask[top : int(y + 1.4 * radius) + 2, left : int(x + 1.4 * radius) + 2]
    grid_y, grid_x = np.mgrid[: 2 * near.shape[0], : 2 * near.shape[1]] / 2 - 0.25
    u, v = (grid_x + left - x) / radius, (grid_y + top - y) / radius
    u, v = np.cos(angle) * u + np.sin(angle) * v + center_x, np.cos(angle) * v - np.sin(angle) * u + center_y
    template = SHAPES[shape](u, v).reshape(near.shape[0], 2, near.shape[1], 2).mean((1, 3))
    return np.minimum(near, template).sum() / (np.maximum(near, template).sum() + mask.sum() - near.sum())


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Return area and centre of mass (x, y) of a shape of radius 1."""
    y, x = np.mgrid[-1.2:1.2:600j, -1.2:1.2:600j]
    inside = SHAPES[shape](x, y)
    return inside.mean() * 2.4**2, x[inside].mean(), y[inside].mean()


def main() -> None:
    (options,) = parse_options(__doc__, DetectorOptions)
    rng = random.Random(options.seed)
    scenes = [replace(random_scene(rng), striped=i % 5 == 0) for i in range(options.clips)]
    sights = [look(draw(scene)) for scene in tqdm(scenes, desc="looking", unit="clip")]
    for name in ("color", "shape", "motion", "background", "striped"):
        right = sum(getattr(sight, name) == getattr(scene, name) for sight, scene in zip(sights, scenes, strict=True))
        print(f"{name:10} {100 * right / len(scenes):.1f} %")
    noise = np.random.default_rng(options.seed).integers(0, 256, (20, 17, 64, 64, 3), dtype=np.uint8)
    print(f"shapes seen in noise: {sum(look(clip).shape != NOTHING for clip in noise)} of {len(noise)}")
    assert set(MOTIONS) >= {scene.motion for scene in scenes}


if __name__ == "__main__":
    run_script(main)
