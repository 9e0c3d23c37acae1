"""One-frame inference: a single frame anywhere in time, made of pictures at other times."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import reduce
from torch import Tensor

from dataset.decoding import load_alpha, load_image
from dataset.media import resize_to_bucket
from modules.latent_encoding import as_pixels
from utils.errors import UserError
from utils.options import suggest
from wan.conditioning import VideoEncoder, one_frame_condition
from wan.configs import TASKS, WanConfig

logger = logging.getLogger(__name__)

MAX_INDEX = 1023  # where the model's positions end
_PARTS = ("target_index", "control_index")
_IDLE = ("no_2x", "no_4x", "no_post")  # of FramePack, whose command lines people reuse


@dataclass(frozen=True)
class Control:
    """A picture that the frame is made of."""

    index: int  # where in time it is, in latent frames
    picture: Path
    mask: Path | None = None  # a picture: white where the control counts, black where it does not


@dataclass(frozen=True)
class OneFrame:
    """One frame to make, and what of."""

    target: int  # where in time it is, in latent frames
    controls: tuple[Control, ...]  # in order of time

    @property
    def indices(self) -> list[int]:
        """The places in time of all frames that the DiT sees, in their order."""
        return sorted([self.target, *(control.index for control in self.controls)])

    @property
    def place(self) -> int:
        """Which of these frames is the one to make."""
        return self.indices.index(self.target)

    def __str__(self) -> str:
        return written(self.target, [control.index for control in self.controls])


def written(target: int, controls: Sequence[int]) -> str:
    """Return places in time as the option writes them."""
    return f"control_index={';'.join(map(str, controls))},target_index={target}"


# ------------------------------------------------------------------------------------------------------- the option
def parse_one_frame(text: str) -> tuple[int, list[int]]:
    """Return (target, controls), places in time, of `control_index=0;2,target_index=1`; 0 and [] for what is left out.

    Raises UserError for what is neither.
    """
    target, controls = 0, []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name in _IDLE:
            logger.warning("--one_frame_inference: %s is FramePack's and has no effect", part)
            continue
        if name not in _PARTS:
            fix = suggest(name, _PARTS) or 'write it as "control_index=0,target_index=1"'
            raise UserError(f"--one_frame_inference {text}: '{name}' is unknown", fix)
        try:
            numbers = [int(number) for number in value.split(";") if number.strip()]
        except ValueError:
            fix = "write them as 0;2" if name == "control_index" else "write it as target_index=1"
            raise UserError(f"--one_frame_inference {text}: '{value}' is not a whole number", fix) from None
        if name == "control_index":
            controls = numbers
        elif len(numbers) == 1:
            target = numbers[0]
        else:
            raise UserError(f"--one_frame_inference {text}: one target_index is needed", "one frame is made at a time")
    return target, controls


def make_one_frame(text: str, pictures: Sequence[Path], masks: Sequence[Path], config: WanConfig) -> OneFrame:
    """Return what --one_frame_inference asks for, with pictures and masks in the order of --control_image_path.

    Raises UserError, with the option as it should be, for places that cannot be or do not go with the pictures.
    """
    if not config.images or config.control:
        tasks = [each.name for each in TASKS.values() if each.images and not each.control]
        raise UserError(f"--one_frame_inference: {config.name} is no model for it", f"use --task {' or '.join(tasks)}")
    target, controls = parse_one_frame(text)
    if not pictures:
        raise UserError(
            "--control_image_path is missing: one-frame inference needs control pictures",
            "give one for each control_index, usually that of --image_path",
        )
    problem = _problem(target, controls, text, len(pictures))
    if problem:
        raise UserError(
            f"--one_frame_inference {text}: {problem}",
            f'use --one_frame_inference "{written(*_corrected(target, controls, len(pictures)))}", in quotes',
        )
    if len(masks) > len(pictures):
        raise UserError(
            f"--control_image_mask_path: {len(masks)} masks for {len(pictures)} control pictures",
            "give at most one for each, in the order of --control_image_path",
        )
    if controls != sorted(controls):
        logger.warning(
            "--one_frame_inference %s: control pictures are taken in order of time, the first one at %d",
            text,
            min(controls),
        )
    masks = (*masks, *[None] * (len(pictures) - len(masks)))
    return OneFrame(target, tuple(map(Control, sorted(controls), pictures, masks)))


def _problem(target: int, controls: list[int], text: str, pictures: int) -> str | None:
    """Return what is wrong with places in time, or None."""
    if "target_index" not in text:
        return "target_index is missing; many shells end a command at a ; that is not in quotes"
    if not controls:
        return "control_index is missing"
    if target < 1:
        return f"target_index {target}: must be 1 or more"
    out = [index for index in (*controls, target) if not 0 <= index <= MAX_INDEX]
    if out:
        return f"{out[0]} is not from 0 to {MAX_INDEX}"
    if len({*controls, target}) <= len(controls):
        return "the places in time must all differ"
    if len(controls) != pictures:
        return f"{len(controls)} places for {pictures} control picture{'s' * (pictures > 1)}"
    return None


def _corrected(target: int, controls: list[int], pictures: int) -> tuple[int, list[int]]:
    """Return (target, controls) near the given ones that can be: the first one free, or one after all others."""
    target = min(max(target, 1), MAX_INDEX - pictures)
    taken, mended = {target}, []
    for number in range(pictures):
        index = controls[number] if number < len(controls) else 0
        if index in taken or not 0 <= index <= MAX_INDEX:
            index = 0 if 0 not in taken else max(taken) + 1
        taken.add(index)
        mended.append(index)
    return target, sorted(mended)


# ---------------------------------------------------------------------------------------------------- the condition
def encode_controls(one_frame: OneFrame, vae: VideoEncoder, width: int, height: int) -> Tensor:
    """Return the condition [20 F h w] of a frame of this size in pixels, to which the control pictures are cropped."""
    pictures = [
        as_pixels(resize_to_bucket(load_image(control.picture), (width, height))[None])
        for control in one_frame.controls
    ]
    grey, *latents = vae.encode(torch.stack([torch.zeros_like(pictures[0]), *pictures]))
    masks = [control_mask(control, width, height) for control in one_frame.controls]
    return one_frame_condition(latents, grey, one_frame.place, masks)


def control_mask(control: Control, width: int, height: int) -> Tensor | None:
    """Return how much of a control picture counts, from 0 to 1 in each latent cell [h w]; None where all of it does.

    The mask is that of the control, else its picture's alpha channel. It is scaled and cropped like the picture, and
    each cell has the mean over its 8 x 8 pixels.
    """
    if control.mask is None:
        levels = load_alpha(control.picture)
    else:
        levels = load_image(control.mask).mean(axis=2).round().astype(np.uint8)
        high, wide = load_image(control.picture).shape[:2]
        levels = cv2.resize(levels, (wide, high), interpolation=cv2.INTER_AREA)
    if levels is None or levels.min() == 255:
        return None
    pixels = resize_to_bucket(np.repeat(levels[..., None], 3, axis=2), (width, height))[..., 0]
    return reduce(torch.from_numpy(pixels) / 255, "(h a) (w b) -> h w", "mean", a=8, b=8)
