"""One attention() over several kernels; the optional libraries are imported here and nowhere else."""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.devices import dtype_name
from utils.errors import UserError


def attention(
    q: Tensor, k: Tensor, v: Tensor, mode: str = "torch", split: bool = False, bias: Tensor | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias) v for each head: [B L H D], in the dtype of q.

    q [B L H D]; k, v [B S H D]; bias [B S], which only the torch mode can add. split: one sample of the batch after
    the other, for the smaller peak in memory.
    """
    if split and len(q) > 1:
        biases = [None] * len(q) if bias is None else bias.split(1)
        rows = zip(q.split(1), k.split(1), v.split(1), biases, strict=True)
        return torch.cat([attention(*row, mode=mode, bias=row_bias) for *row, row_bias in rows])
    backend = ATTENTION_MODES[mode]
    if bias is not None:
        assert can_add_bias(mode), f"{mode} attention cannot add a bias"
        return _torch(q, k, v, bias[:, None, None].to(q.dtype))
    if backend.half_only and q.dtype not in (torch.float16, torch.bfloat16):
        return backend.run(q.bfloat16(), k.bfloat16(), v.bfloat16()).to(q.dtype)
    return backend.run(q, k, v)


def can_add_bias(mode: str) -> bool:
    """Return whether attention() takes a bias in this mode."""
    return ATTENTION_MODES[mode].run is _torch


def check_attention(mode: str, option: str) -> None:
    """Raise UserError when the library behind an attention mode cannot be imported."""
    backend = ATTENTION_MODES[mode]
    if not backend.module:
        return
    try:
        importlib.import_module(backend.module)
    except ModuleNotFoundError as error:
        package = backend.module.split(".")[0]
        if error.name and error.name.split(".")[0] != package:
            raise UserError(f"{option}: {package} needs {error.name}, which is not installed", backend.fix) from None
        raise UserError(f"{option}: {package} is not installed", backend.fix) from None
    except (ImportError, OSError, RuntimeError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{option}: {backend.module} is installed but does not load ({why})",
            f"it may have been built for another torch than {torch.__version__}; {backend.fix}",
        ) from None


def kernel_order(capability: tuple[int, int]) -> tuple[str, ...]:
    """Return the names of torch's kernels in the order to try them in on a GPU of this compute capability.

    A kernel that cannot take the tensors, such as float32 or those with a bias, is passed over.
    """
    return _CUDNN_FIRST if capability in _BEST_WITH_CUDNN else _FLASH_FIRST


def sdpa_order(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which torch tries its kernels in the order that suits the device.

    Code to be compiled must be called in it: in the compiled code itself it does nothing, since torch 2.6 would trace
    it without the order.
    """
    if device.type != "cuda" or torch.version.hip or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    names = kernel_order(torch.cuda.get_device_capability(device))
    return sdpa_kernel([KERNELS[name].backend for name in names], set_priority=True)


def describe_attention(mode: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return which kernel videos will be attended to by, for the log."""
    if ATTENTION_MODES[mode].run is not _torch:
        return mode
    if device.type != "cuda" or torch.version.hip:
        return "torch's own"
    capability = torch.cuda.get_device_capability(device)
    names = kernel_order(capability)
    tensor = torch.empty(1, 1, 256, head_dim, dtype=dtype, device=device)
    params = cuda.SDPAParams(tensor, tensor, tensor, None, 0.0, False, False)
    taken = next((name for name in names if KERNELS[name].usable(params)), names[-1])
    gpu = "compute capability {}.{}".format(*capability)
    return f"torch's {taken} kernel, the first of {', '.join(names)} that takes {dtype_name(dtype)} ({gpu})"


def _torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    with sdpa_order(q.device):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias)
    return out.transpose(1, 2)


# Imported where they are called, by statements, which torch.compile can follow.
def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def _sageattn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        # The kernel has no backward and would cut the gradient off without a word.
        raise UserError("sageattn cannot be trained through", "train with sdpa, xformers, flash2 or flash3")
    # Through the entry for ragged batches: the other one has given NaN on image-to-video input.
    from sageattention import sageattn_varlen

    starts = [
        torch.arange(len(x) + 1, dtype=torch.int32, device=x.device) * x.shape[1]  # where each sample begins
        for x in (q, k)
    ]
    out = sageattn_varlen(*(x.flatten(0, 1) for x in (q, k, v)), *starts, q.shape[1], k.shape[1])
    return out.view_as(q)


def _flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # its first releases return the log-sum-exp too


@dataclass(frozen=True)
class Backend:
    """A kernel, the module it needs and how to get that, and whether it computes in 16-bit formats alone."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    module: str = ""
    fix: str = ""
    half_only: bool = False


@dataclass(frozen=True)
class Kernel:
    """One of torch's own kernels, and what tells whether it takes some tensors."""

    backend: SDPBackend
    usable: Callable[[cuda.SDPAParams], bool]


KERNELS = {
    "cuDNN": Kernel(SDPBackend.CUDNN_ATTENTION, cuda.can_use_cudnn_attention),
    "flash": Kernel(SDPBackend.FLASH_ATTENTION, cuda.can_use_flash_attention),
    "memory-efficient": Kernel(SDPBackend.EFFICIENT_ATTENTION, cuda.can_use_efficient_attention),
    "plain": Kernel(SDPBackend.MATH, lambda params: True),
}
_CUDNN_FIRST = ("cuDNN", "flash", "memory-efficient", "plain")
_FLASH_FIRST = ("flash", "memory-efficient", "cuDNN", "plain")
# Data-center Hopper and Blackwell, for which torch's flash kernel, FlashAttention 2, is not made: cuDNN's is 1.5 times
# as fast there. On others, consumer Blackwell among them, it is the slower one.
_BEST_WITH_CUDNN = {(9, 0), (10, 0), (10, 3)}

_TORCH = Backend(_torch)
_FLASH2 = Backend(_flash2, "flash_attn", "install it: pip install flash-attn --no-build-isolation", half_only=True)
_FLASH3 = "git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper"
ATTENTION_MODES: dict[str, Backend] = {
    "torch": _TORCH,
    "sdpa": _TORCH,
    "xformers": Backend(_xformers, "xformers.ops", "install it: pip install xformers"),
    "sageattn": Backend(_sageattn, "sageattention", "install it: pip install sageattention", half_only=True),
    "flash": _FLASH2,
    "flash2": _FLASH2,
    "flash3": Backend(
        _flash3, "flash_attn_interface", f'install it: pip install --no-build-isolation "{_FLASH3}"', half_only=True
    ),
}
