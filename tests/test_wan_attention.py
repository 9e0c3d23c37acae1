"""One attention over several kernels; the optional libraries are played by doubles with their signatures."""

import sys
import textwrap

import pytest
import torch

from utils.errors import UserError
from wan.attention import ATTENTION_MODES, attention, check_attention

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


@pytest.mark.gpu
@pytest.mark.parametrize("mode", OPTIONAL)
def test_an_installed_library_computes_what_torch_computes(mode):
    pytest.importorskip(ATTENTION_MODES[mode].module)
    tensors = inputs(torch.bfloat16, "cuda")
    torch.testing.assert_close(attention(*tensors, mode=mode), attention(*tensors), rtol=5e-2, atol=5e-2)
