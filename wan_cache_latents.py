"""Cache the latents of every image and video of a dataset.

python wan_cache_latents.py --dataset_config data.toml --report
python wan_cache_latents.py --dataset_config data.toml --vae wan_2.1_vae.safetensors

The first tells what comes out of every file, the second encodes it. For image-to-video add
--clip models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, for first and last frame to video --flf2v as well. What
the dataset file may say is in docs/dataset_config.md. On several GPUs:
torchrun --nproc_per_node 2 wan_cache_latents.py ...
"""

import functools
from dataclasses import dataclass

import torch

from dataset.config import DatasetOptions, load_config
from modules.caching import CachingOptions
from modules.dataset_page import check_outputs, write_report
from modules.dataset_report import ReportOptions, examine
from modules.latent_caching import cache_latents
from modules.latent_encoding import I2V, I2V_WITHOUT_CLIP, ONE_FRAME, ONE_FRAME_WITHOUT_CLIP, T2V, load_latent_encoders
from modules.preview import PreviewOptions, preview
from utils.devices import parse_dtype
from utils.errors import UserError, run_script
from utils.files import require_file
from utils.identity import weights_identity
from utils.options import option, parse_options
from utils.processes import Processes, joined
from wan.clip import ClipOptions
from wan.vae import VaeOptions


@dataclass(frozen=True)
class LatentOptions:
    """what is cached beside the latents"""

    i2v: bool = option(False, "the first frame as condition, for image-to-video; --clip implies it")
    flf2v: bool = option(False, "the first and the last frame as condition, for flf2v-14B; needs --clip")
    one_frame: bool = option(False, "one-frame training: pictures with the control pictures that the dataset names")
    disable_cudnn_backend: bool = option(False, "do without cuDNN, which some AMD GPUs need")


def main() -> None:
    with joined() as processes:
        cache(processes)


def cache(processes: Processes) -> None:
    """Cache the share of this process, or all where it is alone."""
    groups = DatasetOptions, VaeOptions, ClipOptions, LatentOptions, CachingOptions, ReportOptions, PreviewOptions
    data, vae, clip, latents, caching, reporting, previewing = parse_options(__doc__, *groups)
    configs = load_config(data.dataset_config, caching.batch_size)
    if latents.one_frame:
        names = ONE_FRAME if clip.clip else ONE_FRAME_WITHOUT_CLIP
    elif latents.i2v or latents.flf2v or clip.clip:
        names = I2V if clip.clip else I2V_WITHOUT_CLIP
    else:
        names = T2V
    if latents.flf2v and latents.one_frame:
        raise UserError("--flf2v, --one_frame: are for different datasets", "choose one, and run once for each")
    if latents.flf2v and not clip.clip:
        raise UserError("--flf2v: the model sees CLIP features of both frames", "add --clip PATH")
    images = ("first", "last") if latents.flf2v else ("first",)
    dtype = parse_dtype(vae.vae_dtype or "bfloat16")
    if reporting.wanted:
        check_outputs(reporting)
        examined = functools.partial(
            examine, configs, names, dtype, caching.num_workers, bool(reporting.report_html), images
        )
        processes.first(lambda: write_report(examined(), reporting))
    if previewing.debug_mode:
        processes.first(lambda: preview(configs, previewing))
    if reporting.wanted or previewing.debug_mode:
        return
    require_file(vae.vae, "--vae", "the weights of the VAE")
    if clip.clip:
        require_file(clip.clip, "--clip", "the weights of the CLIP image encoder")
    torch.backends.cudnn.enabled = not latents.disable_cudnn_backend
    load = functools.partial(load_latent_encoders, vae, clip, dtype, processes.device(caching.device))
    weights = {"vae": vae.vae, "clip": clip.clip}
    models = {name: weights_identity(path, f"--{name}") for name, path in weights.items() if path}
    done = cache_latents(configs, load, dtype, caching, names, processes, models=models, images=images)
    done.report(caching.strict)


if __name__ == "__main__":
    run_script(main)
