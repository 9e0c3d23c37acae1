"""The options that all training runs have, by subject."""

import logging
from dataclasses import dataclass

from accelerate.utils import DynamoBackend

from dataset.config import DatasetOptions
from modules.checkpoints import MetadataOptions, SavingOptions
from modules.ema import EmaOptions
from modules.flow_matching import TimestepOptions
from modules.hub import HubOptions
from modules.losses import LossOptions
from modules.optimizers import OptimizerOptions
from modules.samples import SampleOptions
from modules.states import StateOptions
from modules.validation import ValidationOptions
from utils.options import option
from wan.block_swap import SwapOptions
from wan.clip import ClipOptions
from wan.compiling import MODES, CompileOptions
from wan.dit_file import DitOptions
from wan.pair import PairOptions
from wan.quantize import FORMATS
from wan.t5 import T5Options
from wan.vae import VaeOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOptions:
    """the training run"""

    max_train_steps: int = option(1600, "optimizer steps to train")
    max_train_epochs: int | None = option(None, "epochs to train, instead of a number of steps")
    gradient_accumulation_steps: int = option(1, "batches that an optimizer step averages over")
    seed: int | None = option(None, "of everything random (default: drawn, and logged)")
    allow_stale: bool = option(
        False, "train although captions were changed after their texts were cached, or latents have no text cache"
    )
    max_data_loader_n_workers: int = option(8, "processes that read caches, at most one a CPU core; 0: none")
    persistent_data_loader_workers: bool = option(False, "keep these processes from epoch to epoch")
    max_nan_steps: int = option(5, "stop after so many steps in a row whose loss is no finite number; each is left out")


@dataclass(frozen=True)
class PrecisionOptions:
    """precision and memory"""

    mixed_precision: str | None = option(
        None,
        "number format of the DiT: bf16 or fp16; no for that of its file, in fine-tuning for float32 "
        "(default: accelerate's setting)",
        choices=("no", "fp16", "bf16"),
    )
    fp8_base: bool = option(False, "for a LoRA: hold the DiT's linear weights as float8 (e4m3fn), half their memory")
    fp8_scaled: bool = option(False, "with --fp8_base: with a scale for every 64 weights, which is more exact")
    quantize: str | None = option(
        None, "for a LoRA: hold them as bitsandbytes does, instead of as float8", choices=tuple(FORMATS)
    )
    gradient_checkpointing: bool = option(
        False, "keep only the inputs of blocks and compute all else again in the backward pass: much less memory"
    )
    gradient_checkpointing_cpu_offload: bool = option(
        False, "with --gradient_checkpointing: these inputs wait in main memory, for little time"
    )
    gradient_checkpointing_keep_attention: bool = option(
        False,
        "with --gradient_checkpointing: keep the results of self-attention too, half a block's input or as much again: "
        "videos train faster",
    )


@dataclass(frozen=True)
class AttentionOptions:
    """attention, --sdpa unless another is asked for"""

    sdpa: bool = option(False, "torch's own")
    flash_attn: bool = option(False, "flash-attn 2")
    flash3: bool = option(False, "flash-attn 3")
    xformers: bool = option(False, "xformers")
    sage_attn: bool = option(False, "refused: sage attention cannot be trained through")
    split_attn: bool = option(False, "one video of a batch after the other, for less memory")


@dataclass(frozen=True)
class TrainingCompileOptions(CompileOptions):
    """torch.compile"""

    dynamo_backend: str = option(
        "NO",
        "the older --compile and --compile_backend in one; NO: neither",
        choices=[backend.value for backend in DynamoBackend],
        parse=str.upper,
        metavar="NAME",
    )
    dynamo_mode: str | None = option(None, "the same as --compile_mode, for --dynamo_backend", choices=MODES)
    dynamo_fullgraph: bool = option(False, "the same as --compile_fullgraph, for --dynamo_backend")
    dynamo_dynamic: bool = option(False, "the same as --compile_dynamic true, for --dynamo_backend")

    def resolved(self) -> CompileOptions:
        given = self.dynamo_backend != "NO"
        if self.compile or not given:
            for name in ("dynamo_backend",) * given + ("dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic"):
                if getattr(self, name):
                    why = "beside --compile" if self.compile else "without --dynamo_backend"
                    logger.warning("--%s: ignored %s", name, why)
            return super().resolved()
        return CompileOptions(
            compile=True,
            compile_backend=self.dynamo_backend.lower(),
            compile_mode=self.dynamo_mode or "default",
            compile_dynamic="true" if self.dynamo_dynamic else self.compile_dynamic,
            compile_fullgraph=self.dynamo_fullgraph,
            compile_cache_size_limit=self.compile_cache_size_limit,
        )


@dataclass(frozen=True)
class ProcessOptions:
    """several GPUs, and how they compute"""

    ddp_timeout: int | None = option(None, "minutes that processes wait for each other (default: 360)")
    ddp_gradient_as_bucket_view: bool = option(False, "accepted without effect")
    ddp_static_graph: bool = option(False, "accepted without effect")
    cuda_allow_tf32: bool = option(False, "round the factors of float32 products to TF32: faster, not as exact")
    cuda_cudnn_benchmark: bool = option(False, "let cuDNN try which of its algorithms is the fastest")


@dataclass(frozen=True)
class ShowOptions:
    """looking before training"""

    show_timesteps: str | None = option(
        None, "show how the timesteps will be distributed, for each dataset, and stop", choices=("image", "console")
    )


@dataclass(frozen=True)
class UnusedOptions:
    """accepted from older command lines, without effect on Wan"""

    guidance_scale: float = option(1.0, "of another model; the metadata of files tells it")
    img_in_txt_in_offloading: bool = option(False, "of another model")


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training run, but for what is trained."""

    dit: DitOptions
    pair: PairOptions
    data: DatasetOptions
    training: TrainingOptions
    precision: PrecisionOptions
    swap: SwapOptions
    attention: AttentionOptions
    timesteps: TimestepOptions
    loss: LossOptions
    validation: ValidationOptions
    ema: EmaOptions
    optimizer: OptimizerOptions
    saving: SavingOptions
    metadata: MetadataOptions
    samples: SampleOptions
    vae: VaeOptions
    t5: T5Options
    clip: ClipOptions
    compiling: TrainingCompileOptions
    states: StateOptions
    hub: HubOptions
    processes: ProcessOptions
    show: ShowOptions
    unused: UnusedOptions
