"""Sample videos during training: of which prompts, when, and made by the same functions as any other video."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toml
import torch
from torch import nn

from modules.conditions import Condition, encode_conditions, encode_pictures
from modules.generation import Texts, decode_all, denoise_all, encode_prompts
from modules.generation_options import LoraOptions, Models, RunOptions, SamplingOptions
from modules.generation_plan import check_generation, describe_request, describe_run
from modules.outputs import MAX_FPS, Files, OutputOptions, Result
from modules.prompts import LETTERS, PATCH_PIXELS, PromptOptions, Request, make_request, parse_training_prompt
from modules.sizes import output_frames
from utils.devices import release_memory
from utils.errors import UserError
from utils.files import require_file
from utils.options import option, suggest
from wan.clip import ClipOptions
from wan.configs import TASKS, WanConfig
from wan.dit_file import DitOptions
from wan.memory import Step
from wan.model import WanModel
from wan.t5 import T5Options
from wan.vae import VaeOptions, WanVAE

logger = logging.getLogger(__name__)

# What a prompt that says nothing gets; all but the size are what prompt files written for musubi-tuner count on.
_DEFAULTS = {"width": 256, "height": 256, "frame_count": 1, "sample_steps": 20, "discrete_flow_shift": 14.5}
_LETTER_KEYS = dict.fromkeys(letter.training_key for letter in LETTERS.values() if letter.training_key)
_KEYS = ("prompt", *_LETTER_KEYS, "control_image_mask_path", "enum")


@dataclass(frozen=True)
class SampleOptions:
    """samples during training"""

    sample_prompts: Path | None = option(None, "file of prompts: .txt, a line each, .toml or .json")
    sample_every_n_steps: int | None = option(None, "make samples after every N steps")
    sample_every_n_epochs: int | None = option(None, "make samples after every N epochs")
    sample_at_first: bool = option(False, "make samples before training as well")
    sample_fps: int = option(16, "frames per second of sample videos; Wan's motion is made for 16")
    one_frame: bool = option(
        False, "train on one-frame caches; each prompt must say by --of where in time its frame is (docs/wan_1f.md)"
    )


@dataclass(frozen=True)
class Sample:
    """One video to make at each sampling."""

    request: Request
    seeded: bool  # the prompt file gives the seed, which then is in the file's name


@dataclass(frozen=True)
class SamplePlan:
    """Samples that are known to be possible, and the models they need besides the DiT."""

    options: SampleOptions
    samples: tuple[Sample, ...]
    models: Models
    folder: Path
    name: str  # first part of the file names


@dataclass(frozen=True, kw_only=True)
class LiveModels(Models):
    """Models whose DiT is the one in training."""

    live: WanModel

    def load_dit(self, steps: Sequence[Step] = ()) -> WanModel:
        return self.live


def plan_samples(
    options: SampleOptions,
    dit: DitOptions,
    encoders: tuple[VaeOptions, T5Options, ClipOptions],
    run: RunOptions,
    device: torch.device,
    output: tuple[Path, str],
) -> SamplePlan | None:
    """Return what is to be sampled, or None for nothing; raise UserError for what would fail during training.

    output: the folder and name of the trained files.
    """
    for name in ("sample_every_n_steps", "sample_every_n_epochs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    wanted = options.sample_every_n_steps or options.sample_every_n_epochs or options.sample_at_first
    if options.sample_prompts is None:
        if wanted:
            raise UserError("--sample_prompts is missing", "give a file of prompts, or leave the sample options out")
        return None
    if not wanted:
        logger.warning("--sample_prompts: no samples are made without --sample_every_n_epochs or _steps")
        return None
    if not 1 <= options.sample_fps <= MAX_FPS:
        raise UserError(f"--sample_fps {options.sample_fps}: must be from 1 to {MAX_FPS}", "Wan's videos have 16")
    config = TASKS[dit.task]
    samples = tuple(read_samples(options.sample_prompts, config, options.one_frame))
    models = Models(config, device, dit, *encoders, LoraOptions(), run)
    check_generation([sample.request for sample in samples], models, SamplingOptions(), OutputOptions())
    return SamplePlan(options, samples, models, output[0] / "sample", output[1])


def read_samples(path: Path, config: WanConfig, one_frame: bool = False) -> list[Sample]:
    """Return the samples that a prompt file asks for. Raises UserError naming the line or entry that is wrong.

    one_frame: each must say where in time its one frame is.
    """
    require_file(path, "--sample_prompts", "a file of prompts")
    readers = {".txt": _read_lines, ".toml": _read_toml, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"--sample_prompts {path}: unknown kind of file", f"use {', '.join(readers)}")
    try:
        entries = readers[path.suffix.lower()](path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"--sample_prompts {path}: not a text in UTF-8", "save it as UTF-8") from None
    except (toml.TomlDecodeError, ValueError, IndexError) as error:
        raise UserError(f"--sample_prompts {path}: cannot be read ({error})") from None
    if not entries:
        raise UserError(f"--sample_prompts {path}: there is no prompt in it", "write one on each line")
    samples = []
    for number, entry in enumerate(entries, 1):
        try:
            options = _prompt_options(entry)
            if one_frame and options.one_frame_inference is None:
                controls = ";".join(str(2 * i) for i in range(max(len(options.control_image_path), 1)))
                fix = f"add --of target_index=1,control_index={controls} and --ci, or leave --one_frame out"
                raise UserError("there is no --of, which --one_frame asks for", fix)
            samples.append(Sample(make_request(options, config), "seed" in entry))
        except UserError as error:
            raise UserError(f"--sample_prompts {path}, prompt {number}: {error.problem}", error.fix) from None
    return samples


def _read_lines(text: str) -> list[dict[str, Any]]:
    lines = (line.rstrip() for line in text.splitlines())
    return [parse_training_prompt(line) for line in lines if line.strip() and not line.startswith("#")]


def _read_toml(text: str) -> list[dict[str, Any]]:
    """Return the entries of [[prompt.subset]], each on top of what [prompt] says for all; without them [prompt]."""
    common = dict(toml.loads(text).get("prompt", {}))
    subsets = common.pop("subset", [{}] if common else [])
    return [{**common, **entry} for entry in subsets]


def _read_json(text: str) -> list[dict[str, Any]]:
    """Return a list of prompt lines and objects as entries."""
    entries = json.loads(text)
    if not isinstance(entries, list) or not all(isinstance(entry, (str, dict)) for entry in entries):
        raise ValueError("it must be a list of texts and objects")
    return [parse_training_prompt(entry) if isinstance(entry, str) else entry for entry in entries]


def _prompt_options(entry: dict[str, Any]) -> PromptOptions:
    """Return an entry of a prompt file as the options of a command line."""
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"'{key}': unknown key", suggest(key, _KEYS) or f"choose from {', '.join(_KEYS)}")
    values = {**_DEFAULTS, **entry}
    try:
        width, height = (max(int(values[key]) // PATCH_PIXELS, 1) * PATCH_PIXELS for key in ("width", "height"))
        paths = {"image_path": "image_path", "end_image_path": "end_image_path", "control_path": "control_video_path"}
        return PromptOptions(
            prompt=values.get("prompt"),
            negative_prompt=values.get("negative_prompt"),
            video_size=(height, width),
            video_length=int(values["frame_count"]),
            infer_steps=int(values["sample_steps"]),
            flow_shift=float(values["discrete_flow_shift"]),
            guidance_scale=float(values["cfg_scale"]) if "cfg_scale" in values else None,
            seed=int(values["seed"]) if "seed" in values else None,
            one_frame_inference=values.get("one_frame"),
            **{name: Path(values[key]) for name, key in paths.items() if values.get(key)},
            **{name: _several(values.get(name)) for name in ("control_image_path", "control_image_mask_path")},
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"a value is of the wrong type ({error})") from None


def _several(value: Any) -> tuple[Path, ...]:
    """Return one path or a list of them, as a .json or .toml file may have it."""
    return tuple(map(Path, [value] if isinstance(value, str) else value or ()))


class Sampler:
    """Makes samples of a plan with the DiT in training; texts and pictures are encoded once, before the DiT loads."""

    def __init__(self, plan: SamplePlan):
        self.plan = plan
        self.requests = [sample.request for sample in plan.samples]
        models, sampling = plan.models, SamplingOptions()
        self.run = describe_run(models, sampling)
        self.texts: list[Texts] = encode_prompts(self.requests, models, sampling)
        release_memory(models.device)
        features = encode_pictures(self.requests, models)
        release_memory(models.device)
        self.vae: WanVAE = models.load_vae()
        self.conditions = [Condition()] * len(self.requests)
        if models.config.images or models.config.control:
            self.conditions = encode_conditions(self.requests, features, self.vae, models.config)
        self._park()
        self._last_step = -1

    def due(self, step: int, epoch: int | None = None) -> bool:
        """Tell whether samples are wanted now; epoch: the number of complete ones at an epoch's end, else None.

        Not twice at the same step, where both an epoch and N steps end.
        """
        options = self.plan.options
        if step == 0:
            return options.sample_at_first
        every, count = (options.sample_every_n_steps, step) if epoch is None else (options.sample_every_n_epochs, epoch)
        return bool(every) and count % every == 0 and step != self._last_step

    def go_on(self, step: int) -> None:
        """Go on after a step at whose end a state was saved: what was due then is done."""
        if step and self.due(step):
            self._last_step = step

    def make(self, dit: WanModel, trained: nn.Module, step: int, epoch: int | None = None) -> list[Path]:
        """Write the samples and return their files; the random numbers of training are not touched."""
        device = self.plan.models.device
        results = self._results(f"{step:06d}" if epoch is None else f"e{epoch:06d}", step)
        models = LiveModels(**vars(self.plan.models), live=dit)
        trained.eval()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                latents = denoise_all(self.requests, self.texts, self.conditions, models, SamplingOptions(), results)
                release_memory(device)
                decode_all(latents, results, self.vae.to(device), self.plan.options.sample_fps)
        finally:
            trained.train()
            self._park()
        self._last_step = step
        return [path for result in results for path in (result.files.video, result.files.images) if path]

    def attempt(self, dit: WanModel, trained: nn.Module, step: int, epoch: int | None = None) -> list[Path]:
        """Do what make() does, but log what goes wrong: no sample is worth the end of a run."""
        try:
            return self.make(dit, trained, step, epoch)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            logger.error("no samples after step %d: %s. Training goes on", step, str(error).rstrip(".").splitlines()[0])
            return []

    def _park(self) -> None:
        """Keep the VAE in main memory until the next samples."""
        self.vae.to("cpu")
        release_memory(self.plan.models.device)

    def _results(self, when: str, step: int) -> Sequence[Result]:
        plan, now, results = self.plan, time.strftime("%Y%m%d%H%M%S"), []
        trained = {"trained": plan.name, "training_step": step} if step else {}
        for number, sample in enumerate(plan.samples):
            request = sample.request
            seed = f"_{request.seed}" if sample.seeded else ""
            stem = f"{plan.name}_{when}_{number:02d}_{now}{seed}"
            frames = output_frames(request, plan.models.config)
            one = frames == 1
            outputs = OutputOptions(output_type="images" if one else "video", fps=plan.options.sample_fps)
            run = {**self.run, "options": self.run["options"] | outputs.repeated()}
            metadata = {**describe_request(request, plan.models, SamplingOptions()), **run, **trained}
            files = Files(images=plan.folder / f"{stem}_000.png") if one else Files(video=plan.folder / f"{stem}.mp4")
            results.append(Result(files, frames, metadata))
        return results
