"""Training by several processes: what `accelerate launch` asks for, what of it can be had, and how all of them end."""

import contextlib
import logging
import os
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env, patch_environment
from torch.distributed.fsdp import CPUOffloadPolicy

from modules.run_logs import Tracking
from modules.train_options import ProcessOptions, TrainOptions
from modules.trained import Trained
from utils.devices import default_device
from utils.errors import UserError
from wan.model import WanModel
from wan.shards import Shards

logger = logging.getLogger(__name__)

_WAIT = timedelta(hours=6)  # the others wait for samples and files of the first process, longer than the usual minutes


def join(options: ProcessOptions) -> PartialState:
    """Return what is known of this process and those that were launched with it."""
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise UserError(
                f"accelerate launch: {engine} is not available", "use --multi_gpu, or --use_fsdp to share out the DiT"
            )
    if options.ddp_timeout is not None and options.ddp_timeout < 1:
        raise UserError(f"--ddp_timeout {options.ddp_timeout}: must be at least 1 minute")
    wait = _WAIT if options.ddp_timeout is None else timedelta(minutes=options.ddp_timeout)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or default_device().type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=wait)
    if not state.is_main_process:
        logging.disable(logging.WARNING)
    for name in ("ddp_gradient_as_bucket_view", "ddp_static_graph"):
        if getattr(options, name):
            logger.warning("--%s: has no effect, gradients are averaged without DistributedDataParallel", name)
    if options.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if options.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    return state


def sharding(
    options: TrainOptions, trained: Trained, processes: int, device: torch.device
) -> FullyShardedDataParallelPlugin | None:
    """Return how `accelerate launch --use_fsdp` wants the DiT to be shared out; None where it does not.

    Raises UserError for what cannot be trained so.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if processes == 1:
        logger.warning("accelerate launch --use_fsdp: one process alone has nobody to share the DiT with")
        return None
    launched = "accelerate launch --use_fsdp"
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise UserError(
            f"{launched}: torch {torch.__version__} shares out weights on GPUs alone",
            "leave it out, or install a newer torch",
        )
    if not trained.beside:
        raise UserError(
            f"{launched}: shares out weights that stay as they are, fine-tuning changes them",
            "train a LoRA, or use --multi_gpu with --blocks_to_swap",
        )
    given = {
        "--fp8_base": options.precision.fp8_base,
        f"--quantize {options.precision.quantize}": options.precision.quantize,
        "--blocks_to_swap": options.swap.blocks_to_swap,
        "--dit_high_noise": options.pair.dit_high_noise,
        "--compile": options.compiling.resolved().compile,
    }
    for name in (name for name, value in given.items() if value):
        raise UserError(f"{name}: cannot be had with {launched}", "leave one of them out")
    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, KeyError) as error:
        raise UserError(f"{launched}: {str(error).splitlines()[0]}") from None
    if reshards(plugin) is None:
        raise UserError(f"{launched}: knows no such strategy here", "use --fsdp_reshard_after_forward true or false")
    if plugin.activation_checkpointing:
        raise UserError(f"{launched} --fsdp_activation_checkpointing: is not used", "use --gradient_checkpointing")
    return plugin


def reshards(plugin: FullyShardedDataParallelPlugin) -> bool | None:
    """Return whether weights are given up after the forward pass, by the names of FSDP2 or FSDP1; None: by others."""
    asked = plugin.reshard_after_forward if plugin.sharding_strategy is None else plugin.sharding_strategy
    return asked if isinstance(asked, bool) else {"FULL_SHARD": True, "SHARD_GRAD_OP": False}.get(asked.name)


def offloads(plugin: FullyShardedDataParallelPlugin) -> bool:
    """Return whether the parts of weights are to be held in main memory, said in the way of FSDP2 or of FSDP1."""
    return isinstance(plugin.cpu_offload, CPUOffloadPolicy) or getattr(plugin.cpu_offload, "offload_params", False)


def make_accelerator(steps: int, dtype: torch.dtype, state: PartialState, tracking: Tracking) -> Accelerator:
    """Return the accelerator; steps: gradient accumulation."""
    # It would shard what it is told to prepare: the DiT is sharded here, and what is trained is whole.
    with patch_environment(accelerate_use_fsdp="false"):
        return Accelerator(
            cpu=state.device.type == "cpu",
            gradient_accumulation_steps=steps,
            # No autocast, the DiT does without; gradients of float16 are scaled, or the small ones would be lost.
            mixed_precision="fp16" if dtype == torch.float16 else "no",
            log_with=list(tracking.names) or None,
            project_dir=tracking.folder,
        )


def load_shared(
    load: Callable[[torch.device | str], WanModel], plugin: FullyShardedDataParallelPlugin, accelerator: Accelerator
) -> Shards:
    """Return the DiT that `load` puts on a device, shared out by all processes.

    Where accelerate is to save main memory, the processes of a machine load one after the other.
    """
    shards = Shards(accelerator.device, reshards(plugin), offloads(plugin) and accelerator.device.type != "cpu")
    turns = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if not plugin.cpu_ram_efficient_loading:
        turns = 1
    for turn in range(turns):
        if turn == accelerator.local_process_index % turns:
            shards.shard(load("cpu"))
        accelerator.wait_for_everyone()
    shards.prepare()
    return shards


def only_here(shards: Shards | None, accelerator: Accelerator) -> contextlib.AbstractContextManager:
    """Return what the first process runs the DiT in by itself; the others lend it their parts meanwhile, if any."""
    if shards is None:
        return contextlib.nullcontext()
    if accelerator.is_main_process:
        return shards.led()
    shards.follow()
    return contextlib.nullcontext()
