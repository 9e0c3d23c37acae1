"""Requests > embeddings > latents > pixels > files: the only path, with one model on the device at a time."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from modules.approximation import Approximation
from modules.conditions import Condition, encode_conditions, encode_pictures
from modules.generation_options import Models, SamplingOptions
from modules.guidance import Scale, guidance_pattern, guided, predictions, scale_at
from modules.outputs import LATENT_CHANNELS, OutputOptions, Result, frame_writer, save_latent, tell_written
from modules.prompts import Request
from modules.resuming import Failures, left_to_make
from modules.sizes import decoded_frame_count, denoised_frames, latent_size, output_size, wanted_frames
from modules.solvers import Step, Velocity, sample
from modules.step_caching import Predict, exact
from modules.text_caching import load_text_encoder
from modules.video_files import MP4, VideoFormat
from modules.video_to_video import first_step, start
from modules.watching import PartialKeeper, Previewer, Watcher, latent_colours
from utils.devices import release_memory
from utils.errors import UserError
from utils.processes import Processes
from wan.auto_swap import auto_recommended
from wan.configs import WanConfig
from wan.memory import Step as MemoryStep
from wan.model import WanModel
from wan.pair import DitPair, prepare, twin
from wan.parallel import share_out
from wan.vae import WanVAE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """The embeddings of a request's two prompts."""

    prompt: Tensor  # [n 4096]
    negative: Tensor | None  # None where no step asks for it


# ------------------------------------------------------------------------------------------------------ denoising
def draw_noise(frames: int, width: int, height: int, seed: int, device: torch.device, on_cpu: bool = False) -> Tensor:
    """Return the noise [16 f h w] that a video of this size starts from, float32, on the device."""
    where = torch.device("cpu") if on_cpu else device
    generator = torch.Generator(where).manual_seed(seed)
    shape = (LATENT_CHANNELS, *latent_size(frames, width, height))
    return torch.randn(shape, generator=generator, device=where).to(device)


def pattern_of(steps: int, sampling: SamplingOptions) -> str:
    """Return which predictions each step asks for; without --slg_layers no layer is skipped."""
    mode = sampling.slg_mode if skipped_blocks(sampling) else None
    zero_steps = sampling.cfg_zero_init_steps if sampling.cfg_zero_star else 0
    return guidance_pattern(
        steps, sampling.cfg_skip_mode, sampling.cfg_apply_ratio, mode, sampling.slg_start, sampling.slg_end, zero_steps
    )


def guidance_of(request: Request, config: WanConfig) -> Scale:
    """Return the guidance scale: a number, or for the tasks of two noise ranges one that depends on the timestep."""
    low, high = request.guidance_scale, request.guidance_scale_high_noise
    if config.boundary is None or low == high:
        return low
    boundary = config.boundary * 1000
    return lambda step: high if step.timestep >= boundary else low


def needs_negative(pattern: str, scale: Scale) -> bool:
    """Return whether some step computes a prediction from the negative prompt."""
    return "S" in pattern or (scale != 1 and pattern.strip("CZ") != "")


def is_guided(request: Request, config: WanConfig, sampling: SamplingOptions) -> bool:
    """Return whether some step of a request makes more than one prediction."""
    return needs_negative(pattern_of(request.steps, sampling), guidance_of(request, config))


def step_of(request: Request, config: WanConfig, sampling: SamplingOptions) -> MemoryStep:
    """Return what the largest step of a request computes."""
    width, height = output_size(request)
    grid = latent_size(denoised_frames(request, config), width, height)
    weights = request.guidance_scale, request.guidance_scale_high_noise
    letters = set(pattern_of(request.steps, sampling))
    passes = max(len(predictions(letter, weight)) for letter in letters for weight in weights)
    return MemoryStep(grid, passes=passes)


def skipped_blocks(sampling: SamplingOptions) -> tuple[int, ...]:
    """Return the numbers in --slg_layers."""
    try:
        return tuple(int(word) for word in (sampling.slg_layers or "").split(",") if word.strip())
    except ValueError:
        raise UserError(f"--slg_layers {sampling.slg_layers}: not numbers", fix="write them as 9,10") from None


@torch.inference_mode()
def denoise(
    dit: WanModel | DitPair,
    noise: Tensor,
    texts: Texts,
    condition: Condition,
    steps: int,
    shift: float,
    scale: Scale,
    sampling: SamplingOptions,
    on_step: Callable[[Step, Tensor, Tensor], None] = lambda step, x, clean: None,
    predict: Predict = exact,
    first: int = 0,
    timesteps: Sequence[float] = (),
) -> Tensor:
    """Return the clean latents [16 f h w], float32, that the noise [16 f h w] becomes; on_step: see sample().

    first: number of the step to begin with, where what is called noise here has as much of it as belongs there.
    """

    def predicting(name: str) -> Velocity:
        def velocity(x: Tensor, step: Step) -> Tensor:
            if name == "conditional":  # which every step asks for first: the time to compute all that it will ask for
                names = predictions(pattern[step.index], scale_at(scale, step))
                asked = {name: passes[name] for name in names}
                model, asked = dit.chosen(step.timestep, asked) if isinstance(dit, DitPair) else (dit, asked)
                velocities = predict(model, x, step, asked)
                computed.update(zip(names, velocities, strict=True))
            return computed.pop(name)

        return velocity

    y = None if condition.y is None else condition.y[None].to(noise.device)
    features = None if condition.image_features is None else condition.image_features.to(noise.device)
    prompt, negative = (
        None if text is None else dit.context([text], features, reused=True) for text in (texts.prompt, texts.negative)
    )
    seen: dict[str, Any] = {"y": y}
    if condition.frame_indices is not None:
        seen["frame_indices"] = [condition.frame_indices]
    passes = {
        "conditional": {"text": prompt, **seen},
        "unconditional": {"text": negative, **seen},
        "skipped": {"text": negative and twin(negative), **seen, "skip_blocks": skipped_blocks(sampling)},
    }
    computed: dict[str, Tensor] = {}
    pattern = pattern_of(steps, sampling)
    velocity = guided(
        pattern,
        conditional=predicting("conditional"),
        unconditional=predicting("unconditional"),
        skipped=predicting("skipped"),
        scale=scale,
        slg_scale=sampling.slg_scale,
        zero_star=sampling.cfg_zero_star,
    )
    return sample(sampling.sample_solver, velocity, noise[None], steps, shift, on_step, first, timesteps)[0]


# --------------------------------------------------------------------------------------------------------- stages
def generate(
    requests: Sequence[Request],
    models: Models,
    sampling: SamplingOptions,
    results: Sequence[Result],
    outputs: OutputOptions,
    processes: Processes | None = None,
) -> None:
    """Make the requests into files, one stage and one model after the other; results: where each goes.

    Of several processes the first one encodes and decodes, alone; all of them denoise.
    """
    processes = processes or Processes()
    if processes.count > 1:
        models = replace(models, device=processes.device(models.run.device))
    texts = processes.first(lambda: encode_prompts(requests, models, sampling))
    release_memory(models.device)
    features = processes.first(lambda: encode_pictures(requests, models))
    release_memory(models.device)
    conditions, vae = [Condition()] * len(requests), None
    if models.config.images or models.config.control or any(request.video for request in requests):
        vae = models.load_vae() if processes.is_first else None
        conditions = processes.first(lambda: encode_conditions(requests, features, vae, models.config))
        if vae:
            vae.to("cpu")
        release_memory(models.device)
    watchers: list[Watcher] = []
    if processes.is_first:
        if outputs.preview:
            vae = vae or models.load_vae()
            watchers.append(Previewer(outputs.preview, latent_colours(vae.to(models.device))))
            vae.to("cpu")
            release_memory(models.device)
        if outputs.save_partial:
            watchers.append(PartialKeeper())
    failures = Failures(len(requests)) if processes.count == 1 else None
    approximation = Approximation(models.step_cache, models.config, models.dit, processes)
    with auto_recommended(models.swap):
        found = denoise_all(
            requests, texts, conditions, models, sampling, results, processes, watchers, failures, approximation
        )
    made = [kept for kept in zip(found, results, requests, strict=True) if kept[0] is not None]
    release_memory(models.device)
    processes.leave()
    if processes.is_first and any(result.files.video or result.files.images for _, result, _ in made):
        vae = vae.to(models.device) if vae else models.load_vae()
        latents, kept, asked = zip(*made, strict=True)
        decode_all(latents, kept, vae, outputs.fps, outputs.encoding())
        approximation.compare_frames(asked, latents, vae)
    if failures:
        failures.end()


def encode_prompts(requests: Sequence[Request], models: Models, sampling: SamplingOptions) -> list[Texts]:
    """Return the embeddings of all prompts; each different text is encoded once, and none that no step asks for."""
    wanted = []
    for request in requests:
        negative = is_guided(request, models.config, sampling)
        wanted.append((request.prompt, request.negative_prompt if negative else None))
    different = dict.fromkeys(text for pair in wanted for text in pair if text is not None)
    t5 = models.kept("t5", lambda: load_text_encoder(models.t5, models.device))
    encoded = {text: t5.encode([text])[0] for text in tqdm(different, desc="encoding prompts", unit="text")}
    return [Texts(encoded[prompt], encoded.get(negative)) for prompt, negative in wanted]


def denoise_all(
    requests: Sequence[Request],
    texts: Sequence[Texts],
    conditions: Sequence[Condition],
    models: Models,
    sampling: SamplingOptions,
    results: Sequence[Result],
    processes: Processes | None = None,
    watchers: Sequence[Watcher] = (),
    failures: Failures | None = None,
    approximation: Approximation | None = None,
) -> list[Tensor | None]:
    """Return the latents [16 f h w] of the requests, on the CPU; those that are wanted as files are written at once.

    failures: notes what keeps one from being made, which then is None; else it ends all.
    """

    def on_step(request: Request, step: Step, x: Tensor, clean: Tensor) -> None:
        for watcher in watchers:
            watcher.step(step, wanted_frames(request, clean[0]))
        progress.update()

    processes = processes or Processes()
    approximation = approximation or Approximation(models.step_cache, models.config, models.dit, processes)
    dit = models.load_dit([approximation.step(step_of(request, models.config, sampling)) for request in requests])
    if processes.count > 1:
        guided = any(is_guided(request, models.config, sampling) for request in requests)
        prepare(dit, partial(share_work, processes=processes, guided=guided, compiled=models.compiling.compile))
    latents: list[Tensor | None] = []
    steps = sum(request.steps - first_step(request, sampling.sample_solver) for request in requests)
    silent = not processes.is_first
    with (
        tqdm(total=steps, desc="denoising", unit="step", disable=silent) as progress,
        contextlib.nullcontext() if silent else kept_on_failure(latents, results),
        contextlib.ExitStack() as watching,
    ):
        for watcher in watchers:
            watching.enter_context(watcher)
        for request, text, condition, result in zip(requests, texts, conditions, results, strict=True):
            for watcher in watchers:
                watcher.begin(result)
            latent = None
            with failures.attempt(request) if failures else contextlib.nullcontext():
                width, height = output_size(request)
                frames = denoised_frames(request, models.config)
                drawn = partial(draw_noise, frames, width, height, request.seed, models.device, sampling.cpu_noise)
                noise = processes.first(drawn).to(models.device)
                x, first = start(request, sampling.sample_solver, noise, condition.video)
                run = partial(
                    denoise,
                    dit,
                    x,
                    text,
                    condition,
                    request.steps,
                    request.flow_shift,
                    guidance_of(request, models.config),
                    sampling,
                    first=first,
                    timesteps=request.timesteps,
                )
                made = approximation.denoise(request, partial(run, partial(on_step, request))).cpu()
                made = wanted_frames(request, made)
                if not bool(torch.isfinite(made).all()):
                    raise UserError(
                        f"--seed {request.seed}: the latents are not finite",
                        fix="use --dit weights in bf16, no --fp8, or a lower --guidance_scale",
                    )
                unwatched = partial(run, lambda step, x, clean: progress.update())
                approximation.compare(request, made, unwatched, partial(wanted_frames, request))
                latent = made
            if latent is not None and not silent:
                for path in filter(None, (result.files.latent, result.waiting)):
                    save_latent(path, latent, result.metadata)
            latents.append(latent)
    approximation.write_curve(requests, sampling.sample_solver)
    return latents


def share_work(dit: WanModel, processes: Processes, guided: bool, compiled: bool) -> None:
    """Make a model's predictions the common work of all processes."""
    share_out(dit, processes.rank, processes.count, guided, compiled)
    if auto := getattr(dit, "auto_swap", None):
        auto.alone = False


@contextlib.contextmanager
def kept_on_failure(
    latents: Sequence[Tensor | None], results: Sequence[Result], decoded: Sequence[Result] = ()
) -> Iterator[None]:
    """Write the latents of results that are not decoded if the body fails: each took minutes, and is small.

    latents, decoded: in the order of the results; the body may add to them.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk is what has failed already
            for latent, result in list(zip(latents, results, strict=False))[len(decoded) :]:
                if latent is not None and not (result.files.latent or result.waiting):
                    path = result.files.beside("_latent.safetensors")
                    save_latent(path, latent, result.metadata)
                    logger.warning("not decoded, but kept: continue with --latent_path %s", path)
        raise


def decode_all(
    latents: Sequence[Tensor],
    results: Sequence[Result],
    vae: WanVAE,
    fps: int,
    video_format: VideoFormat = MP4,
) -> None:
    """Decode latents [16 f h w] into the videos and pictures of their results, frame by frame."""
    decoded: list[Result] = []
    with (
        tqdm(total=sum(decoded_frame_count(latent) for latent in latents), desc="decoding", unit="frame") as progress,
        kept_on_failure(latents, results, decoded),
    ):
        for latent, result in zip(latents, results, strict=True):
            ten_bit = video_format.ten_bit and result.files.video is not None
            with frame_writer(result.files, result.frames, fps, result.metadata, video_format) as write:
                for pixels in vae.decode_chunks(latent[None]):
                    for frame in as_frames(pixels[0], 16 if ten_bit else 8):
                        write(frame)
                        progress.update()
            tell_written(result.files, result.frames)
            decoded.append(result)
            if result.waiting:
                result.waiting.unlink(missing_ok=True)


def as_frames(pixels: Tensor, bits: int = 8) -> np.ndarray:
    """Return pixels [3 F H W] in [-1, 1] as frames uint8 or, for 16 bits, uint16 [F H W 3], rounded."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * ((2**bits - 1) / 2)).round()
    return rearrange(levels, "c f h w -> f h w c").cpu().numpy().astype({8: np.uint8, 16: np.uint16}[bits])


def go_on(
    requests: Sequence[Request], results: Sequence[Result], models: Models, outputs: OutputOptions
) -> tuple[list[Request], list[Result]]:
    """Return the requests that no earlier run has made, with their results; decode what only waits for that."""
    requests, results, waiting = left_to_make(requests, results)
    if waiting:
        decode_all(*zip(*waiting, strict=True), models.load_vae(), outputs.fps, outputs.encoding())
    return requests, results
