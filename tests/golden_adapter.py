"""Lends this project's functions to tests/golden/check_golden.py, which holds them against the original code.

Thin on purpose: names and shapes are translated, nothing is computed here, and the paths are those of the scripts.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset.buckets import choose_bucket
from dataset.config import load_config
from dataset.media import at_16_fps, resize_to_bucket  # noqa: F401
from dataset.media import frame_windows as windows_of
from modules import (
    conditions,
    flow_matching,
    generation,
    guidance,
    latent_caching,
    latent_encoding,
    one_frame,
    prompts,
    sizes,
    solvers,
)
from modules.caching import CachingOptions
from modules.generation_options import SamplingOptions
from modules.text_caching import cache_texts
from networks import formats, lora_wan
from utils.safetensors_io import save_file_atomically
from wan import clip, fp8, loading, t5, tokenizer, vae
from wan.checkpointing import save_memory
from wan.clip import ImageEncoder
from wan.configs import TASKS
from wan.t5 import TextEncoder


# ---------------------------------------------------------------------------------------------------- networks
def make_dit(config, state_dict, dtype):
    return loading.build_dit(state_dict, heads=config["num_heads"], dtype=dtype)


def dit_forward(model, x, t, context, seq_len, clip_fea=None, y=None, f_indices=None, skip_block_indices=None):
    """A batch of one size goes through as one; samples of several sizes, which no script mixes, one by one."""
    more = {"image_features": clip_fea, "skip_blocks": skip_block_indices or ()}
    if len({sample.shape for sample in x}) == 1:
        y = None if y is None else torch.stack(list(y))
        return list(model(torch.stack(list(x)), t, context, y=y, frame_indices=f_indices, **more))
    assert y is None and f_indices is None
    return [model(x[i][None], t[i : i + 1], context[i : i + 1], **more)[0] for i in range(len(x))]


def attach_lora(model, state_dict, alpha, multiplier=1.0):
    network = lora_wan.create_network_from_weights(state_dict, model, multiplier)
    network.attach(model)
    return dict(network.named_parameters())


def set_gradient_checkpointing(model, enabled):
    save_memory(model, enabled)


def merge_lora(state_dict, loras, multipliers):
    deltas = formats.deltas([(lora, multiplier, "LoRA") for lora, multiplier in zip(loras, multipliers, strict=True)])
    task = TASKS["i2v-14B" if "img_emb.proj.0.weight" in state_dict else "t2v-14B"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "dit.safetensors")
        save_file_atomically(state_dict, path, {"num_heads": "3"})
        return loading.load_dit(path, task, torch.float32, "cpu", deltas).state_dict()


def quantize_fp8(state_dict):
    return fp8.quantize(state_dict)


def make_vae(config, state_dict, dtype):
    return vae.build_vae(state_dict, dtype)


def vae_encode(model, video):
    return model.encode(video[None])[0]


def vae_decode(model, latent):
    return model.decode(latent[None])[0]


def make_t5(config, state_dict, dtype):
    return t5.build_t5(state_dict, dtype)


def t5_encode(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


def tokenize(tokenizer_dir, prompts, max_length):
    return tokenizer.tokenize(tokenizer.load_tokenizer(tokenizer_dir), prompts, max_length)


def make_clip(config, state_dict, dtype):
    return clip.build_clip(state_dict, dtype, heads=config["vision_heads"])


def clip_image_features(model, image):
    return ImageEncoder(model).encode(image[:, 0][None])[0]


# ---------------------------------------------------------------------------------------------------- sampling
class Sampler:
    def __init__(self, name, steps, shift):
        self.stepper = solvers.Stepper(name, steps, shift)
        self.timesteps = self.stepper.timesteps

    def step(self, model_output, t, sample):
        return self.stepper.step(model_output, sample)


def make_sampler(name, steps, shift):
    return Sampler(name, steps, shift)


def guidance_pattern(steps, cfg_skip_mode, cfg_apply_ratio, slg_mode, slg_start, slg_end):
    return guidance.guidance_pattern(steps, cfg_skip_mode, cfg_apply_ratio, slg_mode, slg_start, slg_end)


def sample(model, noise, cond, null, solver, steps, shift, guidance, slg_layers=None, **options):
    layers = None if slg_layers is None else ",".join(map(str, slg_layers))
    sampling = SamplingOptions(sample_solver=solver, slg_layers=layers, **options)
    texts = generation.Texts(cond["context"][0], null["context"][0])
    y = cond["y"][0] if "y" in cond else None
    condition = conditions.Condition(y, cond.get("clip_fea"))
    return generation.denoise(model, noise, texts, condition, steps, shift, guidance, sampling)


def conditioning(vae, task, pictures, args, text_dim):
    """Without an end image flf2v is refused in a request, so that one is put together here."""
    config, paths = TASKS[task], {name: Path(path) for name, path in pictures.items()}
    height, width = args["video_size"]
    one, controls = args.get("one_frame_inference"), [paths[name] for name in args.get("control_image_path") or ()]
    request = prompts.Request(
        prompt="",
        negative_prompt="",
        width=width,
        height=height,
        frames=args["video_length"],
        steps=1,
        flow_shift=1,
        guidance_scale=1,
        guidance_scale_high_noise=1,
        seed=args["seed"],
        image=paths.get(args.get("image_path")),
        end_image=paths.get(args.get("end_image_path")),
        control=paths.get(args.get("control_path")),
        one_frame=one_frame.make_one_frame(one, controls, (), config) if one else None,
    )
    made = request.one_frame
    size = sizes.denoised_frames(request, config), *sizes.output_size(request)
    noise = generation.draw_noise(*size, request.seed, torch.device("cpu"), args.get("cpu_noise", False))
    return {
        "y": conditions.encode_condition(request, vae, config),
        "noise": noise,
        "tokens": noise[0].numel() // 4,
        "f_indices": [made.indices] if made else None,
        "result_position": made.place if made else None,
    }


# -------------------------------------------------------------------------------------------------------- data
def bucket_resolution(resolution, enable_bucket, no_upscale, image_size):
    return choose_bucket(resolution, enable_bucket, no_upscale, image_size)


def frame_windows(video_frames, frame_extraction, target_frames, frame_stride=1, frame_sample=1, max_frames=129):
    return windows_of(video_frames, frame_extraction, target_frames, frame_stride, frame_sample, max_frames)


def resample_frames(source_fps, video_frames, start, end):
    kept = at_16_fps(range(video_frames), source_fps)
    return [frame for time, frame in kept if (start or 0) <= time and (end is None or time < end)]


def write_caches(toml_path, vae, t5, tokenizer_dir, clip=None, i2v=False, one_frame=False):
    configs = load_config(toml_path)
    encoders = latent_encoding.LatentEncoders(vae, clip and ImageEncoder(clip))
    names = latent_encoding.ONE_FRAME if one_frame else latent_encoding.I2V if i2v else latent_encoding.T2V
    options = CachingOptions(num_workers=1)
    latent_caching.cache_latents(configs, lambda: encoders, torch.float32, options, names)
    if t5 is not None:
        encoder = TextEncoder(t5, tokenizer.load_tokenizer(tokenizer_dir))
        cache_texts(configs, lambda: encoder, options, torch.float32)


# -------------------------------------------------------------------------------------------------- LoRA files
def lora_module_names(model, network_args):
    return lora_wan.create_network(model, args=network_args).names


def convert_lora(input_path, output_path, target, diffusers_prefix=None):
    command = [sys.executable, ROOT / "convert_lora.py", "--input", input_path, "--output", output_path]
    prefix = ["--diffusers_prefix", diffusers_prefix] if diffusers_prefix else []
    subprocess.run([*command, "--target", target, *prefix], check=True, capture_output=True)


def parse_training_prompt(line):
    return prompts.parse_training_prompt(line)


def parse_inference_prompt(line):
    return prompts.parse_inference_prompt(line)


def parse_one_frame(text):
    target, controls = one_frame.parse_one_frame("" if text == "default" else text)
    parsed = one_frame.OneFrame(target, tuple(one_frame.Control(index, None) for index in controls))
    return target, controls, parsed.indices, parsed.place


def timesteps_from_uniform(u, args, height, width):
    options = flow_matching.TimestepOptions(**args)
    t = flow_matching.sample_timesteps(options, len(u), height, width, torch.Generator(), uniforms=u)
    return t * 1000, t
