"""torch.compile for the DiT's blocks: whether it can be done here, and doing it."""

import importlib.util
import logging
import os
import shutil
import sys
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from utils.errors import UserError
from utils.options import option, suggest
from wan.attention import sdpa_order
from wan.model import WanAttentionBlock, WanModel

logger = logging.getLogger(__name__)

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DYNAMIC = {"true": True, "false": False, "auto": None}


@dataclass(frozen=True)
class CompileOptions:
    """torch.compile"""

    compile: bool = option(False, "compile the DiT's blocks: faster steps after a first one that takes minutes")
    compile_backend: str = option("inductor", "which compiler, of those that torch knows")
    compile_mode: str = option("default", "what inductor spends time on", choices=MODES)
    compile_dynamic: str = option(
        "auto", "one version for all sizes; auto: from the second size on", choices=tuple(DYNAMIC)
    )
    compile_fullgraph: bool = option(False, "fail where a block cannot be compiled as a whole")
    compile_cache_size_limit: int = option(
        32, "versions of a block to compile, for sizes, batches and samples, after which it runs uncompiled"
    )

    def resolved(self) -> "CompileOptions":
        """Return what is asked for, by whichever of the options."""
        for field in fields(CompileOptions):
            if not self.compile and getattr(self, field.name) != field.default:
                logger.warning("--%s: ignored without --compile", field.name)
        return CompileOptions(**{field.name: getattr(self, field.name) for field in fields(CompileOptions)})


def check_compile(options: CompileOptions, device: torch.device) -> None:
    """Raise UserError for what would fail in the first step: no such backend, no compiler that it needs."""
    if not options.compile:
        return
    limit, backend = options.compile_cache_size_limit, options.compile_backend
    if limit < 1:
        raise UserError(f"--compile_cache_size_limit {limit}: must be at least 1", "leave it out for 32")
    known = torch._dynamo.list_backends(None)
    if backend not in known:
        usual = ", ".join(torch._dynamo.list_backends())
        raise UserError(
            f"--compile_backend {backend}: is not one that torch {torch.__version__} knows",
            suggest(backend, known) or f"use one of {usual}",
        )
    if backend == "inductor":
        lacking, fix = _cuda_compiler() if device.type == "cuda" else _cpp_compiler()
        if lacking:
            raise UserError(f"--compile: inductor needs {lacking}", f"{fix}, or leave --compile out")
    elif options.compile_mode != "default":
        raise UserError(
            f"--compile_mode {options.compile_mode}: is a mode of inductor, not of {backend}", "leave one of them out"
        )


def _cpp_compiler() -> tuple[str, str]:
    """Return what inductor lacks on a CPU, and how to get it; empty words for nothing."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError):
        if sys.platform == "win32":
            fix = "install the Build Tools for Visual Studio and start from its x64 command prompt"
        else:
            fix = "install one, e.g. apt install g++, or name yours in the variable CXX"
        return "a C++ compiler on a CPU, and none was found", fix
    return "", ""


def _cuda_compiler() -> tuple[str, str]:
    """Return what inductor lacks on a CUDA device, and how to get it; empty words for nothing."""
    if importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return "triton on a GPU, which is not installed", f"pip install {package}"
    # triton builds its launchers with a C compiler; that for Windows brings one along.
    if sys.platform != "win32" and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return (
            "a C compiler to launch its kernels on a GPU, and none was found",
            "install one, e.g. apt install gcc, or name yours in the variable CC",
        )
    return "", ""


def compile_blocks(model: WanModel, options: CompileOptions) -> None:
    """Make the model's blocks compute compiled, each version once for all of them; nothing is compiled yet.

    What is compiled is the class's function, with the block as an argument, whose weights may be anywhere at each call.
    """
    torch._dynamo.config.cache_size_limit = options.compile_cache_size_limit
    compiled = torch.compile(
        WanAttentionBlock.compute,
        backend=options.compile_backend,
        mode=options.compile_mode if options.compile_backend == "inductor" else None,
        dynamic=DYNAMIC[options.compile_dynamic],
        fullgraph=options.compile_fullgraph,
    )
    for block in model.blocks:
        block.compute = partial(_compute, compiled, block)


def _compute(compiled, block: WanAttentionBlock, x: Tensor, modulation: Tensor, rope: Tensor, *how) -> Tensor:
    # Rotary factors as pairs of real numbers: compilers make no code for complex ones.
    with sdpa_order(x.device):
        return compiled(block, x, modulation, torch.view_as_real(rope), *how)
