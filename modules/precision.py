"""Which number format a DiT is trained in."""

import logging
import os

import torch

from utils.devices import FLOAT8, dtype_name
from utils.errors import UserError

logger = logging.getLogger(__name__)

_MIXED_PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


def mixed_precision(asked: str | None) -> tuple[str, str]:
    """Return the mixed precision that counts, and how it was asked for, to begin a complaint with.

    asked: the script's own option; None stands for what `accelerate launch` was told, which it passes on in the
    environment.
    """
    mixed = asked or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    where = f"--mixed_precision {mixed}" if asked else f"--mixed_precision {mixed} of accelerate launch"
    if mixed not in ("no", *_MIXED_PRECISION):
        raise UserError(f"{where}: is not supported", "use --mixed_precision bf16")
    return mixed, where


def frozen_precision(asked: str | None, file_dtype: torch.dtype, device: torch.device) -> tuple[str, torch.dtype]:
    """Return the mixed precision and the dtype that a frozen DiT computes in.

    "no" keeps the file's dtype on a GPU; on a CPU it means float32, which is faster there.
    """
    mixed, where = mixed_precision(asked)
    if mixed == "no":
        if device.type == "cpu":
            return mixed, torch.float32
        return mixed, torch.bfloat16 if file_dtype in FLOAT8 else file_dtype
    dtype = _MIXED_PRECISION[mixed]
    if file_dtype in (torch.float16, torch.bfloat16) and file_dtype != dtype:
        fit = "fp16" if file_dtype == torch.float16 else "bf16"
        raise UserError(f"{where}: the DiT's file holds {dtype_name(file_dtype)}", f"use --mixed_precision {fit} or no")
    if device.type == "cpu" and mixed == "fp16":
        raise UserError(f"{where}: training in float16 needs a GPU", "use --mixed_precision no")
    if device.type == "cpu":
        logger.warning("%s: bfloat16 is slow on most CPUs; --mixed_precision no computes in float32", where)
    return mixed, dtype


def trained_precision(asked: str | None, full_bf16: bool) -> tuple[str, torch.dtype]:
    """Return the mixed precision and the dtype of a DiT whose own weights are trained: float32, or all bfloat16."""
    mixed, where = mixed_precision(asked)
    if full_bf16:
        if mixed == "fp16" or asked == "no":
            raise UserError(
                f"--full_bf16: trains bfloat16 weights, but {where} was given", "use --mixed_precision bf16"
            )
        return "bf16", torch.bfloat16
    if mixed != "no":
        raise UserError(
            f"{where}: the weights are trained either in float32 or, with --full_bf16, in bfloat16",
            "add --full_bf16, or use --mixed_precision no",
        )
    return mixed, torch.float32
