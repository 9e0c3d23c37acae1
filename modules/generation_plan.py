"""What a generation run will do: checked before the first model loads, named file by file, described for metadata."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata as installed
from pathlib import Path
from typing import Any

import toml

from modules.approximation import Approximation
from modules.clips import read_clip
from modules.conditions import read_control
from modules.generation import decode_all, is_guided, skipped_blocks
from modules.generation_options import Models, SamplingOptions
from modules.lora_files import LoraFile, check_loras
from modules.outputs import OUTPUT_TYPES, OutputOptions, Result, check_outputs, load_latent, plan_files
from modules.prompts import MAX_PIXELS, PATCH_PIXELS, Request
from modules.resuming import stem_of, with_latents_kept
from modules.sizes import decoded_frame_count, latent_size, output_frames, output_size
from modules.solvers import sigma_schedule
from modules.step_cache_options import check_step_cache
from modules.video_to_video import log_start
from utils.errors import UserError
from utils.files import require_file
from utils.identity import file_hash, weights_identity
from utils.options import given_options
from utils.safetensors_io import open_tensors
from wan.attention import check_attention
from wan.block_swap import check_swap
from wan.compiling import check_compile
from wan.configs import WanConfig
from wan.dit_file import check_dit, check_fp8
from wan.fp8 import check_fp8_fast
from wan.model import WanShape
from wan.pair import check_pair
from wan.parallel import split_of
from wan.quantize import check_quantize
from wan.rope import THETA, riflex_frequency, temporal_pairs
from wan.tokenizer import load_tokenizer
from wan.vae import check_vae
from wan.weights import describe, wrong_kind

logger = logging.getLogger(__name__)

TRAINED_FRAMES = 21  # latent frames of the videos that Wan was trained on, which have 81


# --------------------------------------------------------------------------------------------------------- checks
def check_generation(
    requests: Sequence[Request],
    models: Models,
    sampling: SamplingOptions,
    outputs: OutputOptions,
    processes: int = 1,
) -> None:
    """Raise UserError for whatever would otherwise be found out after a model has loaded; log what will be made.

    processes: how many are to make each video together.
    """
    check_attention(models.run.attn_mode, f"--attn_mode {models.run.attn_mode}")
    check_compile(models.compiling, models.device)
    _check_sampling(sampling)
    shape = check_dit(models.dit.dit, models.config)
    run = models.run
    check_fp8(models.dit.dit, run.fp8 or run.fp8_scaled, run.fp8_scaled, run.fp8_fast, run.quantize)
    if run.fp8_fast:
        check_fp8_fast(models.device)
    check_quantize(run.quantize, shape, models.device)
    check_swap(models.swap, shape.blocks)
    check_step_cache(models.step_cache, [request.steps for request in requests], processes)
    for request in requests:
        Approximation(models.step_cache, models.config, models.dit).settings(request, shape)
        if models.step_cache.calibrate_magcache and request.video:
            where = f"--calibrate_magcache {models.step_cache.calibrate_magcache}"
            raise UserError(f"{where}: --video_path leaves out steps, which are to be measured", "leave that out")
    _check_riflex(requests, models, shape)
    split_of(processes, shape.heads, any(is_guided(request, models.config, sampling) for request in requests))
    blocks = [block for block in skipped_blocks(sampling) if not 0 <= block < shape.blocks]
    if blocks:
        raise UserError(
            f"--slg_layers {sampling.slg_layers}: there is no block {blocks[0]}",
            fix=f"this DiT's blocks are 0 to {shape.blocks - 1}",
        )
    check_pair(
        models.pair,
        *(models.dit.dit, shape, models.config),
        *(run.fp8 or run.fp8_scaled, run.fp8_scaled, run.fp8_fast, run.quantize),
    )
    _check_loras(models, shape)
    _check_encoders(models, shape)
    if needs_vae(models.config, outputs) or any(request.video for request in requests):
        # Whole, too: it may be needed only after the long denoising.
        check_vae(models.vae.vae)
    for name, path in models.files().items():  # those that are given without need are told of in the metadata
        if path is not None:
            require_file(path, f"--{name}", "weights")
    for request in requests:
        check_request(request, models.config, sampling)


def check_request(request: Request, config: WanConfig, sampling: SamplingOptions) -> None:
    """Raise UserError for what of a single request would fail later; log what will be made."""
    sigma_schedule(sampling.sample_solver, request.steps, request.flow_shift, request.timesteps)
    _check_zero_star(request, sampling)
    _check_start_image(request)
    if request.control is not None:
        read_control(request.control, request.frames, PATCH_PIXELS, PATCH_PIXELS)
    if request.video is not None:
        read_clip(request.video, output_frames(request, config), *[PATCH_PIXELS] * 2, "--video_path")
    _log_request(request, config)
    log_start(request, sampling.sample_solver)


def needs_vae(config: WanConfig, outputs: OutputOptions) -> bool:
    """Return whether anything is encoded to latents or decoded from them."""
    parts, _ = OUTPUT_TYPES[outputs.output_type]
    return bool(config.images) or config.control or parts != ("latent",) or bool(outputs.preview)


def _check_start_image(request: Request) -> None:
    width, height = output_size(request)
    if max(width, height) > MAX_PIXELS:
        raise UserError(
            f"--image_path {request.image}: a video in its shape would be {width} wide and {height} high, and the "
            f"model's positions end at {MAX_PIXELS} pixels",
            fix="crop the picture",
        )


def _check_sampling(sampling: SamplingOptions) -> None:
    ratio = sampling.cfg_apply_ratio
    if ratio is not None and not 0 <= ratio <= 1:
        raise UserError(f"--cfg_apply_ratio {ratio}: must be from 0 to 1", fix="0.5 leaves out every other step")
    if sampling.cfg_skip_mode != "none" and ratio is None:
        logger.warning("--cfg_skip_mode %s: ignored without --cfg_apply_ratio", sampling.cfg_skip_mode)
    if ratio is not None and sampling.cfg_skip_mode == "none":
        logger.warning("--cfg_apply_ratio %s: ignored without --cfg_skip_mode", ratio)
    if sampling.slg_mode and not skipped_blocks(sampling):
        logger.warning("--slg_mode %s: ignored without --slg_layers", sampling.slg_mode)
    if sampling.slg_layers and not sampling.slg_mode:
        logger.warning("--slg_layers %s: ignored without --slg_mode", sampling.slg_layers)
    for name in ("slg_start", "slg_end"):
        if not 0 <= getattr(sampling, name) <= 1:
            raise UserError(
                f"--{name} {getattr(sampling, name)}: must be from 0 to 1", fix="it is a share of the steps"
            )
    if not math.isfinite(sampling.slg_scale):
        raise UserError(f"--slg_scale {sampling.slg_scale}: not a usable number", fix="the default is 3.0")
    zero_steps = sampling.cfg_zero_init_steps
    if not sampling.cfg_zero_star and zero_steps != SamplingOptions().cfg_zero_init_steps:
        logger.warning("--cfg_zero_init_steps %d: ignored without --cfg_zero_star", zero_steps)


def _check_riflex(requests: Sequence[Request], models: Models, shape: WanShape) -> None:
    index = models.run.riflex_freq_index
    if index is None:
        return
    pairs = temporal_pairs(shape.dim // shape.heads)
    if not 1 <= index <= pairs:
        raise UserError(
            f"--riflex_freq_index {index}: this DiT's frequencies along time are 1 to {pairs}", "leave it out, or use 6"
        )
    for request in requests:
        frames, *_ = latent_size(output_frames(request, models.config), request.width, request.height)
        period = 2 * math.pi * THETA ** ((index - 1) / pairs)
        logger.info(
            "--riflex_freq_index %d: a period of %.1f latent frames becomes %.1f for the %d of this video",
            *(index, period, 2 * math.pi / riflex_frequency(frames), frames),
        )
        if frames <= TRAINED_FRAMES:
            logger.warning(
                "--riflex_freq_index %d: is for videos longer than the model was trained on; %d frames are %d latent "
                "frames, no more than its %d",
                *(index, request.frames, frames, TRAINED_FRAMES),
            )


def _check_zero_star(request: Request, sampling: SamplingOptions) -> None:
    zero_steps = sampling.cfg_zero_init_steps
    if not sampling.cfg_zero_star:
        return
    if not 0 <= zero_steps < request.steps:
        raise UserError(
            f"--cfg_zero_init_steps {zero_steps}: must be from 0 to {request.steps - 1}, fewer than the "
            f"{request.steps} steps",
            fix="the default is 1" if request.steps > 1 else "use 0, or more --infer_steps",
        )
    if request.guidance_scale == request.guidance_scale_high_noise == 1:
        logger.warning("--cfg_zero_star: with --guidance_scale 1 nothing is left of it but the first steps")


def _check_loras(models: Models, shape: WanShape) -> None:
    """Raise UserError for LoRA files that do not go with the models they are for."""
    low, high = models.lora.files(), models.lora.high_noise_files()
    for files in (low, high):
        check_loras(files, shape, models.config)
    if high and models.pair.dit_high_noise is None:
        raise UserError("--lora_weight_high_noise: is for --dit_high_noise", "use --lora_weight, or add that")
    if models.pair.dit_high_noise is not None and bool(low) != bool(high):
        lacking = "--lora_weight_high_noise" if low else "--lora_weight"
        logger.warning("%s: not given, so one of the two models runs without a LoRA", lacking)
    if models.lora.lycoris:
        logger.info("--lycoris: files of LyCORIS are known by their keys")


def _check_encoders(models: Models, shape: WanShape) -> None:
    """Raise UserError unless --t5 and, where it is needed, --clip are what they should be."""
    with open_tensors(models.t5.t5, "--t5", "the weights of the text encoder") as weights:
        keys, where = weights.keys(), f"--t5 {models.t5.t5}"
        if describe(keys) != "a T5 text encoder":
            raise wrong_kind(where, weights, "umT5's text encoder", "use models_t5_umt5-xxl-enc-bf16.pth")
        widths = [weights.shape(key)[1] for key in keys if key.endswith(("token_embedding.weight", "shared.weight"))]
    if widths and widths[0] != shape.text_dim:
        raise UserError(
            f"{where}: makes features of {widths[0]} channels, the DiT takes {shape.text_dim}",
            fix="use the text encoder that belongs to the DiT",
        )
    if models.t5.t5_tokenizer is not None:
        load_tokenizer(models.t5.t5_tokenizer)
    if models.config.clip and models.config.images:
        with open_tensors(models.clip.clip, "--clip", "the weights of the CLIP image encoder") as weights:
            if describe(weights.keys()) != "a CLIP image encoder":
                wanted, fix = "the CLIP image encoder", "use the CLIP file that docs/wan.md names"
                raise wrong_kind(f"--clip {models.clip.clip}", weights, wanted, fix)


def _log_request(request: Request, config: WanConfig) -> None:
    asked = f"--video_size {request.height} {request.width}: {request.height} high, {request.width} wide"
    width, height = output_size(request)
    if (width, height) != (request.width, request.height):
        asked += f"; in the shape of the start image {height} high, {width} wide"
    if request.one_frame:
        asked += f"; one frame at {request.one_frame.target} in time"
    frames = output_frames(request, config)
    logger.info(
        "%s, %d frame%s, %d steps, shift %g, guidance %g, seed %d",
        asked,
        frames,
        "s" * (frames > 1),
        request.steps,
        request.flow_shift,
        request.guidance_scale,
        request.seed,
    )


# -------------------------------------------------------------------------------------------------------- results
def plan_results(
    requests: Sequence[Request],
    models: Models,
    sampling: SamplingOptions,
    outputs: OutputOptions,
    lines: Path | None = None,
) -> list[Result]:
    """Return where each request's latent goes, with the metadata that say how it was made.

    lines: the file that they are lines of, after which and what is in them their files are to be named.
    """
    kept = [max(output_frames(request, models.config) - outputs.trim_tail_frames, 1) for request in requests]
    run = {} if outputs.no_metadata and lines is None else describe_run(models, sampling)
    if run:
        run["options"] |= outputs.repeated()
    described = [{**describe_request(request, models, sampling), **run} for request in requests]
    stems = [] if lines is None else [stem_of(lines, each) for each in described]
    files = plan_files(outputs, list(zip([request.seed for request in requests], kept, strict=True)), stems=stems)
    results = [
        Result(places, frames, None if outputs.no_metadata else metadata)
        for metadata, places, frames in zip(described, files, kept, strict=True)
    ]
    return results if lines is None else with_latents_kept(results)


def describe_request(request: Request, models: Models, sampling: SamplingOptions) -> dict[str, Any]:
    """Return a request as metadata; the names are musubi-tuner's where it has one."""
    described = {
        "seeds": request.seed,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.height,
        "width": request.width,
        "video_length": request.frames,
        "infer_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "flow_shift": request.flow_shift,
    }
    if models.config.boundary is not None:
        described["guidance_scale_high_noise"] = request.guidance_scale_high_noise
    if request.timesteps:
        described["timesteps"] = "".join(f"{timestep:.10g}," for timestep in request.timesteps)
    pictures = {"image_path": request.image, "end_image_path": request.end_image, "control_path": request.control}
    if request.video is not None:
        pictures["video_path"], described["strength"] = request.video, request.strength
    described.update({name: str(path.absolute()) for name, path in pictures.items() if path is not None})
    if request.one_frame:
        controls = request.one_frame.controls
        described["one_frame_inference"] = str(request.one_frame)
        described["control_image_path"] = [str(control.picture.absolute()) for control in controls]
        if masks := [str(control.mask.absolute()) for control in controls if control.mask]:
            described["control_image_mask_path"] = masks
    return described | Approximation(models.step_cache, models.config, models.dit).describe(request)


def describe_run(models: Models, sampling: SamplingOptions) -> dict[str, Any]:
    """Return what all requests of a run have in common, as metadata: weights by name, LoRA files also by hash."""
    defaults = SamplingOptions()
    described = {
        "task": models.config.name,
        "sample_solver": sampling.sample_solver,
        **{name: value for name, value in vars(sampling).items() if value != getattr(defaults, name)},
        "dit": models.dit.dit.name,
        "vae": models.vae.vae.name if models.vae.vae else None,
        "t5": models.t5.t5.name,
        "clip": models.clip.clip.name if models.clip.clip else None,
        "attn_mode": models.run.attn_mode,
        "fp8": ("scaled" if models.run.fp8_scaled else "plain") if models.run.fp8 or models.run.fp8_scaled else None,
        "residual_dtype": models.dit.residual_dtype if models.dit.residual_dtype != "float32" else None,
        "fp8_fast": models.run.fp8_fast or None,
        "quantize": models.run.quantize,
        "riflex_freq_index": models.run.riflex_freq_index,
        "lora": describe_loras(models.lora.files()),
        **describe_pair(models),
        "software": software(),
        # By which --from_metadata makes it again, and knows whether the weights are the same.
        "options": {
            name: value for group in (sampling, *models.groups()) for name, value in given_options(group).items()
        },
        "weights": {
            name: weights_identity(path, f"--{name}") for name, path in models.files().items() if path is not None
        },
    }
    return {name: value for name, value in described.items() if value not in (None, [])}


def describe_pair(models: Models) -> dict[str, Any]:
    """Return what is to be said of the second model of Wan2.2, where there is one."""
    if models.pair.dit_high_noise is None:
        return {}
    return {
        "dit_high_noise": models.pair.dit_high_noise.name,
        "timestep_boundary": models.config.boundary,
        "lora_high_noise": describe_loras(models.lora.high_noise_files()),
    }


def describe_loras(files: Sequence[LoraFile]) -> list[dict[str, Any]]:
    """Return LoRA files by name and hash, with what of them counts."""
    return [
        {
            "file": file.path.name,
            "sha256": file_hash(file.path),
            "multiplier": file.multiplier,
            **({"include": file.include.pattern} if file.include else {}),
            **({"exclude": file.exclude.pattern} if file.exclude else {}),
        }
        for file in files
    ]


def software() -> str:
    """Return what a file says of the program that made it."""
    return f"wan-tuner {project_version()}"


def project_version() -> str:
    """Return the version of this code: of the checkout it runs from, else of the installed package."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        return toml.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    return installed.version("wan-tuner")


# -------------------------------------------------------------------------------------------------- saved latents
def decode_files(models: Models, outputs: OutputOptions) -> None:
    """Decode the latents of --latent_path, whose metadata go on into the files."""
    if "latent" in OUTPUT_TYPES[outputs.output_type][0]:
        raise UserError(f"--output_type {outputs.output_type}: the latent is there already", fix="use video or images")
    check_outputs(outputs, len(outputs.latent_path))
    loaded = [load_latent(path) for path in outputs.latent_path]
    check_vae(models.vae.vae)
    kept = [max(decoded_frame_count(latent) - outputs.trim_tail_frames, 1) for latent, _ in loaded]
    seeds = [metadata.get("seeds") for _, metadata in loaded]
    # Whatever else the metadata of a stranger's file say must not become part of a path.
    named = [(seed if isinstance(seed, int) else 0, frames) for seed, frames in zip(seeds, kept, strict=True)]
    planned = plan_files(outputs, named, outputs.latent_path)
    results = [
        Result(replace(files, latent=path), frames, None if outputs.no_metadata else metadata)
        for files, path, frames, (_, metadata) in zip(planned, outputs.latent_path, kept, loaded, strict=True)
    ]
    decode_all([latent for latent, _ in loaded], results, models.load_vae(), outputs.fps, outputs.encoding())
