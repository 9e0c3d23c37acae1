"""Make videos and pictures from prompts.

python wan_generate_video.py --task t2v-1.3B --prompt "a cat walks on grass" --video_size 480 832 --save_path cat.mp4 \\
    --dit wan2.1_t2v_1.3B_bf16.safetensors --vae wan_2.1_vae.safetensors --t5 models_t5_umt5-xxl-enc-bf16.pth

For image to video add --task i2v-14B --clip PATH --image_path PATH. docs/wan.md walks through all tasks.
On several GPUs: torchrun --nproc_per_node 2 wan_generate_video.py ...
"""

from modules.downloads import DownloadOptions, download_published
from modules.generation import generate, go_on
from modules.generation_options import (
    GenerationCompileOptions,
    GenerationPairOptions,
    Models,
    RunOptions,
    SamplingOptions,
    generation_config,
)
from modules.generation_plan import check_generation, decode_files, plan_results
from modules.interactive import converse
from modules.lora_files import LoraOptions
from modules.merged_model import save_merged_model
from modules.official_folder import FolderOptions, from_folder
from modules.outputs import OutputOptions, check_outputs
from modules.prompts import PromptOptions, read_requests
from modules.repeating import stored_options, warn_of_changes
from modules.step_cache_options import StepCacheOptions
from utils.errors import UserError, run_script
from utils.options import parse_options
from utils.processes import Processes, joined
from wan.block_swap import SwapOptions
from wan.clip import ClipOptions
from wan.configs import TASKS
from wan.dit_file import DitOptions
from wan.t5 import T5Options
from wan.vae import VaeOptions


def main() -> None:
    with joined() as processes:
        if run := processes.first(lambda: plan_run(processes)):
            generate(*run, processes)


def plan_run(processes: Processes) -> tuple | None:
    """Return what generate() needs to know, checked; None where something else was to be done, and is."""
    options = parse_options(
        __doc__,
        PromptOptions,
        OutputOptions,
        SamplingOptions,
        LoraOptions,
        FolderOptions,
        DitOptions,
        GenerationPairOptions,
        VaeOptions,
        T5Options,
        ClipOptions,
        RunOptions,
        SwapOptions,
        GenerationCompileOptions,
        StepCacheOptions,
        DownloadOptions,
        below=stored_options,
    )
    prompts, outputs, sampling, lora, folder, dit, pair, vae, t5, clip, run, swap, compiling, cache, downloads = options
    if downloads.download:
        download_published(TASKS[dit.task], downloads.download)
        return None
    device = processes.device(run.device)
    dit, pair, vae, t5, clip = from_folder(folder.ckpt_dir, TASKS[dit.task], dit, pair, vae, t5, clip)
    config = generation_config(dit.task, pair)
    models = Models(config, device, dit, vae, t5, clip, lora, run, swap, compiling.resolved(), pair, cache)
    if lora.save_merged_model:
        save_merged_model(models, lora.save_merged_model)
        return None
    if outputs.latent_path:
        decode_files(models, outputs)
        return None
    if prompts.interactive:
        if processes.count > 1:
            raise UserError(f"--interactive: is not for {processes.count} processes", "start one")
        converse(prompts, models, sampling, outputs)
        return None
    requests = read_requests(prompts, models.config)
    if prompts.from_metadata:
        warn_of_changes(prompts.from_metadata, models)
    check_outputs(outputs, len(requests))
    check_generation(requests, models, sampling, outputs, processes.count)
    results = plan_results(requests, models, sampling, outputs, prompts.from_file if prompts.skip_existing else None)
    if prompts.skip_existing:
        requests, results = go_on(requests, results, models, outputs)
    return (requests, models, sampling, results, outputs) if requests else None


if __name__ == "__main__":
    run_script(main)
