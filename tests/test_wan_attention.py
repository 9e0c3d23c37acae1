"""One attention over several kernels; the optional libraries are played by doubles with their signatures."""

import re
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import wan.attention
from utils.errors import UserError
from wan.attention import (
    ATTENTION_MODES,
    KERNELS,
    attention,
    check_attention,
    describe_attention,
    kernel_order,
    sdpa_order,
)

OPTIONAL = [mode for mode, backend in ATTENTION_MODES.items() if backend.module]

PLAIN = """
import torch

def plain(q, k, v):
    weights = torch.einsum("blhd,bshd->bhls", q.double(), k.double()) * q.shape[-1] ** -0.5
    return torch.einsum("bhls,bshd->blhd", weights.softmax(-1), v.double()).to(q.dtype)

def check(*tensors):
    assert all(x.dtype in (torch.float16, torch.bfloat16) for x in tensors), [x.dtype for x in tensors]
"""
DOUBLES = {
    "flash_attn.py": """
        def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
            check(q, k, v)
            return plain(q, k, v)
        """,
    "flash_attn_interface.py": """
        def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
            check(q, k, v)
            return plain(q, k, v), None
        """,
    "sageattention.py": """
        def sageattn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False):
            check(q, k, v)
            assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
            starts = list(zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:]))
            assert all(b - a <= max_seqlen_q and d - c <= max_seqlen_k for a, b, c, d in starts)
            return torch.cat([plain(q[None, a:b], k[None, c:d], v[None, c:d])[0] for a, b, c, d in starts])
        """,
    "xformers/__init__.py": "",
    "xformers/ops.py": """
        def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0, scale=None):
            return plain(q, k, v)
        """,
}


@pytest.fixture
def doubles(tmp_path, monkeypatch):
    """Libraries with the signatures of the real ones, which compute softmax attention by its formula."""
    for name, source in DOUBLES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PLAIN + textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn_interface", "sageattention", "xformers", "xformers.ops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("flash_attn", "flash_attn_interface", "sageattention", "xformers", "xformers.ops"):
        sys.modules.pop(name, None)
    # Where older compilers keep the modules that a function imports.
    for name in [name for name in vars(wan.attention) if name.startswith("__import_")]:
        delattr(wan.attention, name)


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 3, 64, generator=generator).to(device, dtype) for n in (20, 33, 33))


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.einsum("blhd,bshd->bhls", q.double(), k.double()) * q.shape[-1] ** -0.5
    return torch.einsum("bhls,bshd->blhd", weights.softmax(-1), v.double())


@pytest.mark.parametrize("mode", ["torch", "sdpa"])
def test_torch_attention_is_the_softmax_formula_in_float32(mode):
    out = attention(*inputs(), mode=mode)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), formula(*inputs()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["torch", "flash2"])
def test_one_sample_after_the_other_is_the_same_as_all_at_once(mode, doubles):
    whole, split = (attention(*inputs(), mode=mode, split=split) for split in (False, True))
    torch.testing.assert_close(whole, split)


@pytest.mark.parametrize("mode", OPTIONAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_library_is_called_as_its_signature_wants_it(mode, dtype, doubles):
    check_attention(mode, f"--attn_mode {mode}")
    q, k, v = inputs(dtype)
    out = attention(q, k, v, mode=mode)
    assert out.dtype == dtype and out.shape == q.shape
    # Kernels for 16-bit formats see float32 input rounded to bfloat16.
    exact = mode == "xformers" and dtype == torch.float32
    tolerance = 1e-5 if exact else 2e-2
    torch.testing.assert_close(out.double(), formula(q, k, v), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", OPTIONAL)
def test_a_library_that_is_not_installed_is_named_with_its_pip_command(mode, monkeypatch):
    package = ATTENTION_MODES[mode].module.split(".")[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as error:
        check_attention(mode, f"--attn_mode {mode}")
    assert str(error.value).startswith(f"--attn_mode {mode}: {package} is not installed. Install it: pip install ")


def test_a_library_that_does_not_load_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(UserError, match="installed but does not load.*undefined symbol.*pip install flash-attn"):
        check_attention("flash2", "--flash_attn")


def test_torch_attention_needs_nothing():
    check_attention("torch", "--sdpa")
    check_attention("sdpa", "--sdpa")


def test_sageattention_refuses_to_lose_a_gradient(doubles):
    q, k, v = inputs()
    with pytest.raises(UserError, match="cannot be trained through"):
        attention(q.requires_grad_(), k, v, mode="sageattn")


# -------------------------------------------------------------------------------------- back-ends that are installed
def installed(mode: str) -> str:
    """Return the device on which a mode can be tried here, or skip the test."""
    module = ATTENTION_MODES[mode].module
    if module:
        pytest.importorskip(module, reason=f"{module} is not installed")
        if not torch.cuda.is_available():
            pytest.skip(f"{module} needs a CUDA device")
    return "cuda" if torch.cuda.is_available() else "cpu"


def computed(attend, *tensors: Tensor) -> list[Tensor]:
    """Return what an attention computes and its gradients for q, k and v, float64."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = attend(*tensors)
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype))
    return [x.double() for x in (out.detach(), *(tensor.grad for tensor in tensors))]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["torch", *OPTIONAL])
def test_each_installed_back_end_computes_the_plain_softmax_and_its_gradient(mode, dtype, split):
    tensors = inputs(dtype, installed(mode))
    exact = computed(formula, *(tensor.double() for tensor in tensors))
    tolerance = 1e-5 if dtype == torch.float32 and not ATTENTION_MODES[mode].half_only else 2e-2
    if mode == "sageattn":
        out = attention(*tensors, mode=mode, split=split).double()
        assert (out - exact[0]).norm() / exact[0].norm() < 5 * tolerance, "it computes in 8 bits"
        return
    found = computed(lambda *qkv: attention(*qkv, mode=mode, split=split), *tensors)
    for got, want in zip(found, exact, strict=True):
        assert (got - want).norm() / want.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_each_of_torchs_kernels_computes_the_plain_softmax_and_its_gradient(device, name, dtype):
    tensors = inputs(dtype, device)
    exact = computed(formula, *(tensor.double() for tensor in tensors))

    def attend(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(KERNELS[name].backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)

    try:
        found = computed(attend, *tensors)
    except RuntimeError as error:
        assert re.match("No (available kernel|viable backend)", str(error)), error
        pytest.skip(f"torch's {name} kernel does not take {dtype} on this {device}")
    for got, want in zip(found, exact, strict=True):
        assert (got - want).norm() / want.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


# ------------------------------------------------------------------------------------------- which of torch's kernels
def test_cudnn_comes_first_where_it_is_the_fastest_and_no_kernel_is_left_out():
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0)):
        assert kernel_order(capability)[0] == "flash"
    for capability in ((9, 0), (10, 0)):
        assert kernel_order(capability)[:2] == ("cuDNN", "flash")
    assert all(set(kernel_order(capability)) == set(KERNELS) for capability in ((8, 0), (9, 0)))


@pytest.mark.parametrize("capability", [(9, 0), (8, 9)])
def test_torch_tries_its_kernels_in_that_order_on_a_gpu_and_in_its_own_after_that(monkeypatch, capability):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    own = torch._C._get_sdp_priority_order()
    with sdpa_order(torch.device("cuda")):
        order = torch._C._get_sdp_priority_order()
        assert order[:4] == [int(KERNELS[name].backend) for name in kernel_order(capability)]
    assert torch._C._get_sdp_priority_order() == own
    with sdpa_order(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == own


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_that_the_log_names_is_the_one_that_runs(dtype):
    device = torch.device("cuda")
    text = describe_attention("torch", device, dtype, 128)
    qkv = (torch.randn(1, 256, 2, 128, device=device, dtype=dtype) for _ in "qkv")
    with torch.profiler.profile() as profile:
        attention(*qkv)
    marks = {"cuDNN": "cudnn", "flash": "flash", "memory-efficient": "efficient", "plain": "attention_math"}
    taken = next(name for name in marks if f"torch's {name} kernel" in text)
    assert any(marks[taken] in event.key for event in profile.key_averages())


@pytest.mark.parametrize("mode", ["torch", *sorted({*OPTIONAL} - {"sageattn"})])
def test_a_compiler_sees_each_back_end_as_one_piece(mode, doubles):
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    for bias in (None, torch.zeros(2, 33))[: 2 if mode == "torch" else 1]:
        tensors = inputs(torch.bfloat16)
        torch.testing.assert_close(compiled(*tensors, mode=mode, bias=bias), attention(*tensors, mode=mode, bias=bias))
