"""What is asked for: command lines and prompt lines turned into requests, every value of them checked."""

import hashlib
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from modules.clips import count_frames
from modules.one_frame import OneFrame, make_one_frame
from utils.errors import UserError
from utils.files import require_file
from utils.options import option
from wan.configs import DEFAULT_NEGATIVE_PROMPT, TASKS, WanConfig, default_flow_shift

logger = logging.getLogger(__name__)

PATCH_PIXELS = 16  # 8 by the VAE, 2 by the DiT's patches
POSITIONS = 1024  # along each axis, in the DiT's own table
MAX_PIXELS, MAX_FRAMES = POSITIONS * PATCH_PIXELS, 4 * (POSITIONS - 1) + 1
MAX_STEPS = 1000  # as many as the timesteps of training
MAX_SEED = 2**32 - 1
DEFAULT_STRENGTH = 0.8


@dataclass(frozen=True)
class PromptOptions:
    """what to make"""

    prompt: str | None = option(None, "the prompt")
    negative_prompt: str | None = option(None, "what to keep away from; empty or left out: the task's default text")
    from_file: Path | None = option(
        None,
        "text file with a prompt on each line, and behind it --w --h --f --d --s --g --fs --n --i --ei --cn "
        "--of --ci --cim",
    )
    skip_existing: bool = option(
        False, "with --from_file: name files after their lines, leave out lines whose files are there, and go on"
    )
    interactive: bool = option(False, "ask for prompts, such lines too, with models that stay loaded in between")
    video_size: tuple[int, int] = option((256, 256), "height and width in pixels", metavar=("HEIGHT", "WIDTH"))
    video_length: int | None = option(None, "frames, 4 n + 1; left out: 81, or 1 for t2i")
    infer_steps: int | None = option(None, "denoising steps; left out: the task's default, 40 or 50")
    timesteps: str | None = option(
        None,
        "these timesteps, falling from 1000 at most, instead of evenly spaced ones, for --sample_solver vanilla; "
        "shifted only where --flow_shift is given",
        metavar="T,T,...",
    )
    flow_shift: float | None = option(
        None, "shift of the noise schedule; left out: 3.0 for i2v at 832x480 or 480x832, else the task's default"
    )
    guidance_scale: float | None = option(
        None, "weight of the prompt; at 1 steps take half the time; left out: the task's"
    )
    guidance_scale_high_noise: float | None = option(None, "the same for the noisy steps of the Wan2.2 tasks")
    seed: int | None = option(None, "seed of the noise; left out: a random one, which is logged")
    image_path: Path | None = option(None, "start image of the i2v and flf2v tasks")
    end_image_path: Path | None = option(None, "end image; needed by flf2v, possible with i2v")
    control_path: Path | None = option(None, "control video, or folder of pictures, of the -FC tasks")
    video_path: Path | None = option(None, "video, picture or folder of pictures to start from instead of noise")
    strength: float | None = option(
        None,
        "with --video_path: noise level to start at, from 0, which leaves it as it is, to 1, which forgets it "
        f"(default: {DEFAULT_STRENGTH})",
    )
    from_metadata: Path | None = option(
        None, "make this video, picture or latent again, by what it says of itself; typed options win"
    )
    one_frame_inference: str | None = option(
        None,
        'make one frame of pictures at other times: "control_index=0,target_index=1" or, of two pictures, '
        '"control_index=0;2,target_index=1", in quotes (docs/wan_1f.md)',
        metavar="INDICES",
    )
    control_image_path: tuple[Path, ...] = option(
        (), "the pictures that --one_frame_inference makes a frame of, one for each control_index"
    )
    control_image_mask_path: tuple[Path, ...] = option(
        (), "masks for them: white where a picture counts, black where it does not; otherwise its alpha channel is that"
    )


@dataclass(frozen=True)
class Request:
    """One video to make: all that its pixels depend on besides weights and how they are run."""

    prompt: str
    negative_prompt: str
    width: int  # asked for, in pixels, a multiple of 16, as is height; a start image keeps the area but not the shape
    height: int
    frames: int  # 4 n + 1
    steps: int
    flow_shift: float
    guidance_scale: float
    guidance_scale_high_noise: float  # equal to guidance_scale but for the Wan2.2 tasks
    seed: int
    image: Path | None = None
    end_image: Path | None = None
    control: Path | None = None
    one_frame: OneFrame | None = None  # frames is 1 then
    timesteps: tuple[float, ...] = ()  # of each step before the shift; empty: evenly spaced ones
    video: Path | None = None  # to start from
    strength: float = 1.0  # noise level to start at


class Letter(NamedTuple):
    """How one option letter of a prompt line is read; a key is None where that kind of line lacks the letter."""

    training_key: str | None
    inference_key: str | None
    read: Callable[[str], Any]
    several: bool = False


LETTERS = {
    "w": Letter("width", "video_size_width", int),
    "h": Letter("height", "video_size_height", int),
    "f": Letter("frame_count", "video_length", int),
    "d": Letter("seed", "seed", int),
    "s": Letter("sample_steps", "infer_steps", int),
    "g": Letter("guidance_scale", "guidance_scale", float),
    "l": Letter("cfg_scale", "guidance_scale", float),
    "fs": Letter("discrete_flow_shift", "flow_shift", float),
    "n": Letter("negative_prompt", "negative_prompt", str),
    "i": Letter("image_path", "image_path", str),
    "ei": Letter("end_image_path", "end_image_path", str),
    "ci": Letter("control_image_path", "control_image_path", str, several=True),
    "cim": Letter(None, "control_image_mask_path", str, several=True),
    "cn": Letter("control_video_path", "control_path", str),
    "of": Letter("one_frame", "one_frame_inference", str),
}
_VALUE_PATTERNS = {int: r"\d+", float: r"[\d.]+", str: r".+"}


def _put(found: dict[str, Any], key: str, letter: Letter, value: Any) -> None:
    if letter.several:
        found.setdefault(key, []).append(value)
    else:
        found[key] = value


def parse_training_prompt(line: str) -> dict[str, Any]:
    """Return the prompt and the options of one line of a sample prompt file.

    Letters may be capital; a piece that is no option is a warning. Only pieces after the first " --" are options.
    """
    prompt, *pieces = line.split(" --")
    found: dict[str, Any] = {"prompt": prompt}
    for piece in pieces:
        name, _, _ = piece.partition(" ")
        letter = LETTERS.get(name.lower())
        value = letter and re.match(rf"{name} ({_VALUE_PATTERNS[letter.read]})", piece)
        if letter is None or letter.training_key is None or value is None:
            logger.warning("prompt '%s': '--%s' is not an option with its value; it is ignored", prompt.strip(), piece)
            continue
        try:
            read = letter.read(value[1].strip())
        except ValueError:
            raise UserError(f"prompt '{prompt.strip()}': '--{piece}' is not a number") from None
        _put(found, letter.training_key, letter, read)
    if "sample_steps" in found:
        found["sample_steps"] = min(max(found["sample_steps"], 1), 1000)
    return found


def parse_inference_prompt(line: str) -> dict[str, Any]:
    """Return the prompt and the options of one line of --from_file; a letter that is no option is a warning."""
    prompt, *pieces = line.split(" --")
    found: dict[str, Any] = {"prompt": prompt.strip()}
    for piece in pieces:
        name, _, value = piece.strip().partition(" ")
        letter = LETTERS.get(name)
        if letter is None:
            near = f" (write --{name.lower()})" if name.lower() in LETTERS else ""
            logger.warning("prompt '%s': there is no option --%s%s; it is ignored", prompt.strip(), name, near)
            continue
        try:
            _put(found, letter.inference_key, letter, letter.read(value.strip()))
        except ValueError:
            kind = "a whole number" if letter.read is int else "a number"
            raise UserError(f"prompt '{prompt.strip()}': --{name} {value.strip()}: not {kind}") from None
    return found


def read_requests(options: PromptOptions, config: WanConfig) -> list[Request]:
    """Return what the command line asks for: one request, or one for each line of --from_file.

    Raises UserError for the first value that does not fit the task, before any of them is made.
    """
    if options.from_file is None:
        if options.skip_existing:
            raise UserError("--skip_existing: is for --from_file", "leave it out")
        return [make_request(options, config)]
    path = require_file(options.from_file, "--from_file", "a file of prompts")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"--from_file {path}: not a text in UTF-8", fix="save it as UTF-8") from None
    requests, seen = [], Counter()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        try:
            given = line_options(parse_inference_prompt(line), options)
            if options.skip_existing and given.seed is None:
                given = replace(given, seed=_seed_of(line, seen))
            requests.append(make_request(given, config))
        except UserError as error:
            raise UserError(f"--from_file {path}, line {number}: {error.problem}", error.fix) from None
    if not requests:
        raise UserError(f"--from_file {path}: there is no prompt in it", fix="write one on each line")
    return requests


def _seed_of(line: str, seen: Counter[str]) -> int:
    """Return a seed that is the same in every run, and another one for each time that a line is there."""
    line = line.strip()
    seen[line] += 1
    return int.from_bytes(hashlib.sha256(f"{seen[line]} {line}".encode()).digest()[:4], "little")


def line_options(line: dict[str, Any], options: PromptOptions) -> PromptOptions:
    """Return the command line's options with those of one prompt line in their place."""
    height, width = options.video_size
    size = (line.pop("video_size_height", height), line.pop("video_size_width", width))
    paths = {
        name: tuple(map(Path, value)) if isinstance(value, list) else Path(value)
        for name, value in line.items()
        if name.endswith("_path")
    }
    return replace(options, **{**line, **paths, "video_size": size})


def make_request(options: PromptOptions, config: WanConfig) -> Request:
    """Return a complete request: what is given, checked, and the task's defaults for the rest."""
    if not (options.prompt and options.prompt.strip()):
        raise UserError("--prompt is missing", fix='give a prompt: --prompt "a cat in the rain"')
    height, width = options.video_size
    check_size(width, height, config)
    guidance = config.guidance if options.guidance_scale is None else options.guidance_scale
    guidance_high = options.guidance_scale_high_noise
    if guidance_high is None:
        guidance_high = guidance if config.guidance_high is None else config.guidance_high
    elif config.boundary is None:
        raise UserError(f"--guidance_scale_high_noise: {config.name} has one model", fix="use --guidance_scale")
    for name, value in (("guidance_scale", guidance), ("guidance_scale_high_noise", guidance_high)):
        if not math.isfinite(value):
            raise UserError(f"--{name} {value}: not a usable number", fix=f"the default is {config.guidance}")
    timesteps = read_timesteps(options.timesteps)
    steps = (len(timesteps) or config.steps) if options.infer_steps is None else options.infer_steps
    if steps < 1:
        raise UserError(f"--infer_steps {steps}: at least one step is needed", fix=f"the default is {config.steps}")
    if steps > MAX_STEPS:
        raise UserError(
            f"--infer_steps {steps}: more than {MAX_STEPS}, which is all that the model tells apart",
            fix=f"the default is {config.steps}",
        )
    if timesteps and steps != len(timesteps):
        raise UserError(f"--infer_steps {steps}: --timesteps lists {len(timesteps)}", fix="leave --infer_steps out")
    shift = options.flow_shift
    if shift is None:
        shift = 1.0 if timesteps else default_flow_shift(config, width, height)
    if not (math.isfinite(shift) and shift > 0):
        raise UserError(f"--flow_shift {shift}: must be above 0", fix=f"the default is {config.flow_shift}")
    one_frame = _one_frame(options, config)
    seed = random.SystemRandom().randint(0, MAX_SEED) if options.seed is None else options.seed
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: must be 0 or more, and below 2^63", fix="leave it out for a random one")
    return Request(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt or config.negative_prefix + DEFAULT_NEGATIVE_PROMPT,
        width=width,
        height=height,
        frames=1 if one_frame else frame_count(available_frames(options, config), config),
        steps=steps,
        flow_shift=shift,
        guidance_scale=guidance,
        guidance_scale_high_noise=guidance_high,
        seed=seed,
        one_frame=one_frame,
        timesteps=timesteps,
        **_pictures(options, config),
        **_start(options),
    )


def read_timesteps(text: str | None) -> tuple[float, ...]:
    """Return the numbers of --timesteps."""
    if text is None:
        return ()
    where, fix = f"--timesteps {text}", "write them as 1000,750,500,250"
    try:
        numbers = tuple(float(word) for word in text.rstrip(", ").split(","))
    except ValueError:
        raise UserError(f"{where}: not numbers with commas between them", fix) from None
    if not all(0 < number <= 1000 for number in numbers) or any(a <= b for a, b in pairwise(numbers)):
        raise UserError(f"{where}: must fall from at most 1000 and stay above 0", fix)
    return numbers


def check_size(width: int, height: int, config: WanConfig) -> None:
    """Raise UserError for a size that the DiT's patches do not tile; warn of one that the model was not trained at."""
    wrong = [(name, n) for name, n in (("high", height), ("wide", width)) if n < PATCH_PIXELS or n % PATCH_PIXELS]
    if wrong:
        name, pixels = wrong[0]
        below = max(pixels // PATCH_PIXELS, 1) * PATCH_PIXELS
        raise UserError(
            f"--video_size {height} {width}: {pixels} pixels {name} is not a multiple of {PATCH_PIXELS}",
            fix=f"use {below} or {below + PATCH_PIXELS}",
        )
    if max(width, height) > MAX_PIXELS:
        raise UserError(
            f"--video_size {height} {width}: more than {MAX_PIXELS} pixels, where the model's positions end",
            fix=f"use a size near {config.sizes[0][1]} {config.sizes[0][0]}",
        )
    if (width, height) not in config.sizes:
        sizes = ", ".join(f"{h} {w}" for w, h in config.sizes)
        logger.warning("--video_size %d %d: %s was trained at %s (height width)", height, width, config.name, sizes)


def frame_count(asked: int | None, config: WanConfig) -> int:
    """Return the frames that come out for --video_length: 4 n + 1 of them, or the task's default."""
    if asked is None:
        return config.frames
    if asked < 1:
        raise UserError(f"--video_length {asked}: at least one frame is needed", fix=f"try {config.frames}")
    if asked > MAX_FRAMES:
        raise UserError(
            f"--video_length {asked}: more than {MAX_FRAMES} frames, where the model's positions end",
            fix=f"it was trained at {config.frames}",
        )
    if config.frames == 1 and asked != 1:
        raise UserError(f"--video_length {asked}: {config.name} makes one picture", fix="use 1, or leave it out")
    frames = (asked - 1) // 4 * 4 + 1
    if frames != asked:
        logger.warning("--video_length %d: frames come in fours after the first, so %d are made", asked, frames)
    return frames


def _one_frame(options: PromptOptions, config: WanConfig) -> OneFrame | None:
    """Return the frame that --one_frame_inference asks for, or None for a video."""
    given = ("control_image_path", "control_image_mask_path")
    if options.one_frame_inference is None:
        for name in given:
            if getattr(options, name):
                fix = 'add --one_frame_inference "control_index=0,target_index=1"'
                raise UserError(f"--{name}: is for one-frame inference", fix)
        return None
    pictures, masks = (getattr(options, name) for name in given)
    one_frame = make_one_frame(options.one_frame_inference, pictures, masks, config)
    for name in given:
        for path in getattr(options, name):
            check_picture(path, f"--{name}")
    if options.video_length not in (None, 1):
        logger.warning("--video_length %d: one-frame inference makes one frame", options.video_length)
    return one_frame


def _pictures(options: PromptOptions, config: WanConfig) -> dict[str, Path | None]:
    """Return the checked paths of the pictures that the task conditions on."""
    takes = {"image_path": bool(config.images), "end_image_path": bool(config.images), "control_path": config.control}
    needs = {"image_path": "first" in config.images, "end_image_path": "last" in config.images}
    needs["control_path"] = config.control
    what = {"image_path": "a start image", "end_image_path": "an end image", "control_path": "a control video"}
    for name, taken in takes.items():
        path = getattr(options, name)
        if path is not None and not taken:
            tasks = [c.name for c in TASKS.values() if (c.control if name == "control_path" else c.images)]
            raise UserError(
                f"--{name}: {config.name} takes no {what[name].split(maxsplit=1)[1]}",
                fix=f"use --task {' or '.join(tasks)}",
            )
        if path is None and needs[name]:
            controls = options.control_image_path  # of which it usually is one
            usual = {"image_path": controls[0], "end_image_path": controls[-1]} if controls else {}
            fix = f"give --{name} {usual.get(name, 'PATH')}"
            raise UserError(f"--{name} is missing: {config.name} needs {what[name]}", fix)
    for name in ("image_path", "end_image_path"):
        if getattr(options, name) is not None:
            check_picture(getattr(options, name), f"--{name}")
    if config.control and options.end_image_path is not None:
        raise UserError(f"--end_image_path: is not available with {config.name}", fix="leave it out")
    if options.control_path is not None and not options.control_path.is_dir():
        require_file(options.control_path, "--control_path", "a control video")
    end_image = options.end_image_path
    if end_image and options.one_frame_inference is not None and not needs["end_image_path"]:
        logger.warning("--end_image_path: ignored in one-frame inference, %s looks at one image", config.name)
        end_image = None
    return {"image": options.image_path, "end_image": end_image, "control": options.control_path}


def _start(options: PromptOptions) -> dict[str, Any]:
    """Return the checked video to start from, if any, and the noise level to start at."""
    path, strength = options.video_path, options.strength
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(f"--strength {strength:g}: must be from 0 to 1", fix=f"the default is {DEFAULT_STRENGTH}")
    if path is None:
        if strength is not None:
            raise UserError(f"--strength {strength:g}: is for --video_path", fix="give that, or leave it out")
        return {}
    if options.one_frame_inference is not None:
        raise UserError(f"--video_path {path}: one-frame inference starts from noise", fix="leave one of them out")
    return {"video": path, "strength": DEFAULT_STRENGTH if strength is None else strength}


def available_frames(options: PromptOptions, config: WanConfig) -> int | None:
    """Return --video_length, or where it is left out the frames of a --video_path that has fewer than the default."""
    if options.video_path is None or options.video_length is not None:
        return options.video_length
    frames = count_frames(options.video_path, "--video_path", config.frames)
    return None if frames >= config.frames else (frames - 1) // 4 * 4 + 1


def check_picture(path: Path, option: str) -> None:
    """Raise UserError unless `path` is a picture that can be opened."""
    require_file(path, option, "a picture")
    try:
        with Image.open(path) as image:
            image.load()  # verify() finds nothing wrong with half a JPEG
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{option} {path}: not a readable picture ({error})", fix="use a PNG or JPEG file") from None
