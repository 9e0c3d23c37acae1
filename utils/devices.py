"""Devices and number formats by name."""

import gc

import psutil
import torch

from utils.errors import UserError
from utils.options import suggest

_DTYPES = {
    torch.bfloat16: ("bf16", "bfloat16"),
    torch.float16: ("fp16", "float16"),
    torch.float32: ("fp32", "float32", "float"),
    torch.float8_e4m3fn: ("fp8", "float8", "fp8_e4m3fn", "e4m3fn", "float8_e4m3fn"),
    torch.float8_e4m3fnuz: ("fp8_e4m3fnuz", "e4m3fnuz", "float8_e4m3fnuz"),
    torch.float8_e5m2: ("fp8_e5m2", "e5m2", "float8_e5m2"),
    torch.float8_e5m2fnuz: ("fp8_e5m2fnuz", "e5m2fnuz", "float8_e5m2fnuz"),
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype that a name such as bf16, float16 or fp8_e4m3fn stands for."""
    names = {alias: dtype for dtype, aliases in _DTYPES.items() for alias in aliases}
    if name.lower() not in names:
        raise UserError(f"dtype '{name}' is unknown", suggest(name, names) or f"choose from {', '.join(names)}")
    return names[name.lower()]


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without the module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def default_device(name: str | None = None) -> torch.device:
    """Return the named device, else CUDA where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown device", "use cuda, cuda:0 or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch finds no CUDA device", "leave --device out, or use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):  # what the builds of torch say without the device
        raise UserError(f"--device {name}: torch cannot compute on it here", "use cuda, cuda:0 or cpu") from None
    return device


def compute_dtype(file_dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Return the dtype that linear layers compute in: float16 or bfloat16 on a GPU, float32 on a CPU.

    Most CPUs are several times slower in 16-bit formats than in float32.
    """
    if torch.device(device).type == "cpu":
        return torch.float32
    return torch.float16 if file_dtype == torch.float16 else torch.bfloat16


def release_memory(device: torch.device | str) -> None:
    """Give memory of models that are no longer referenced back to the device."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def free_memory(device: torch.device | str) -> int:
    """Return the bytes that tensors on a device can still take; anywhere but on a GPU that is main memory."""
    device = torch.device(device)
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
