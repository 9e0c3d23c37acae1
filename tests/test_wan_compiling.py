"""Compiled blocks: the same as uncompiled ones, one compilation for all of them, and what is refused."""

import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from modules.generation_options import GenerationCompileOptions
from modules.train_options import TrainingCompileOptions
from networks.lora import LoRABranch, LoRANetwork, targets_in
from tests.test_wan_block_swap import Late, swapped_blocks
from tests.test_wan_model import distance, model_of, random_inputs
from utils.errors import UserError, run_script
from utils.options import parse_options
from wan.checkpointing import save_memory
from wan.compiling import CompileOptions, check_compile, compile_blocks
from wan.fp8 import quantize, use_float8_linears
from wan.model import WanModel
from wan.streaming import CudaDevice

BLOCKS = 3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgetting():
    """Start with nothing compiled, so that compilations can be counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def compiled(model: WanModel, backend: str = "aot_eager", **options) -> WanModel:
    compile_blocks(model, CompileOptions(compile=True, compile_backend=backend, compile_fullgraph=True, **options))
    return model


def quantized(model: WanModel) -> WanModel:
    """Return a model with its blocks' linear weights as scaled float8."""
    weights = quantize(model.state_dict())
    with torch.device("meta"):
        use_float8_linears(model.blocks, scaled=True)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def with_lora(model: WanModel) -> LoRANetwork:
    """Attach the same random LoRA to all linear layers of a model's blocks."""
    torch.manual_seed(5)
    network = LoRANetwork({x.name: LoRABranch(x.inputs, x.outputs, rank=4, alpha=2) for x in targets_in(model)})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    network.train().attach(model)
    return network


def step(model: WanModel, network: LoRANetwork, given: dict) -> list[Tensor]:
    """Return the loss of a training step and its gradients."""
    network.zero_grad()
    loss = model(**given).square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in network.parameters())]


# -------------------------------------------------------------------------------------------------- the same results
@pytest.mark.parametrize(("kind", "swapped"), [("dit_t2v", 2), ("dit_flf2v", 0)])
@torch.inference_mode()
def test_velocities_are_the_same_bits_from_one_compilation_for_all_blocks(kind, swapped):
    with torch.inference_mode(False):
        plain, model = model_of(kind, blocks=BLOCKS), compiled(model_of(kind, blocks=BLOCKS))
        if swapped:
            swapped_blocks(model, swapped, 2, Late())
    given = random_inputs(plain, batch=2)
    want = plain(**given)
    assert torch.equal(model(**given), want)
    context = model.context(given.pop("text"), given.pop("image_features"), reused=True)
    for _ in range(2):
        assert torch.equal(model(**given, text=context), want)
    assert len(context.keys_values) == BLOCKS
    assert compilations() == 1


@pytest.mark.parametrize(("checkpointing", "swapped", "fp8"), [(False, 2, False), (True, 0, True)])
def test_a_lora_gets_the_same_bits_of_gradients_from_two_compilations_for_all_blocks(checkpointing, swapped, fp8):
    """Two, because what goes into the first block needs no gradient."""
    make = quantized if fp8 else lambda model: model
    plain, model = (make(model_of("dit_t2v", blocks=BLOCKS)) for _ in range(2))
    compiled(model)
    if swapped:
        swapped_blocks(model, swapped, 2, Late())
    for each in (plain, model):
        save_memory(each, checkpointing)
    networks, given = (with_lora(plain), with_lora(model)), random_inputs(plain, batch=2)
    want = step(plain, networks[0], given)
    assert all(gradient.abs().max() > 0 for gradient in want)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(model, networks[1], given), want, strict=True))
    assert compilations() == 2


@torch.inference_mode()
def test_from_the_second_size_on_one_compilation_serves_all_sizes():
    with torch.inference_mode(False):
        plain, model = model_of("dit_t2v"), compiled(model_of("dit_t2v"))
    for rows, grid in ((9, (3, 6, 8)), (20, (1, 8, 8)), (31, (2, 4, 6)), (70, (3, 10, 4))):
        given = random_inputs(plain, grid=grid, rows=(rows,))
        assert torch.equal(model(**given), plain(**given))
    assert compilations() == 2


@torch.inference_mode()
def test_no_complex_number_reaches_the_compiler():
    """Inductor makes no code for them, and warns."""
    seen = []

    def looking(graph: torch.fx.GraphModule, _):
        seen.extend(node.meta["example_value"] for node in graph.graph.nodes if "example_value" in node.meta)
        return graph.forward

    torch._dynamo.register_backend(looking, name="looking")
    with torch.inference_mode(False):
        model = compiled(model_of("dit_t2v"), "looking")
    model(**random_inputs(model))
    tensors = [value for value in seen if isinstance(value, Tensor)]
    assert len(tensors) > 40 and not any(value.is_complex() for value in tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("swapped", [0, 2])
def test_on_a_gpu_inductor_computes_the_same_up_to_rounding(swapped):
    plain, model = (model_of("dit_t2v", torch.bfloat16, blocks=BLOCKS).cuda() for _ in range(2))
    compiled(model, "inductor")
    if swapped:
        swapped_blocks(model, swapped, 2, CudaDevice(torch.device("cuda"), pinned=True))
    given = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in random_inputs(plain).items()}
    with torch.inference_mode():
        want = plain(**given)
        for _ in range(2):
            assert distance(model(**given), want) < 1e-2
    want, got = (step(each, with_lora(each).cuda(), given) for each in (plain, model))
    for gradient, other in zip(got, want, strict=True):
        assert distance(gradient, other) < 5e-2


# ---------------------------------------------------------------------------------------------------------- refusals
def refused(device: torch.device = CPU, **options) -> str:
    with pytest.raises(UserError) as error:
        check_compile(CompileOptions(compile=True, **options), device)
    return str(error.value)


def test_a_backend_that_torch_does_not_know_is_named_with_the_nearest():
    assert refused(compile_backend="inducter").startswith("--compile_backend inducter: is not one that torch")
    assert refused(compile_backend="inducter").endswith("knows. Did you mean 'inductor'?")
    assert "Use one of cudagraphs, inductor" in refused(compile_backend="ofi")


def test_what_other_options_cannot_mean_is_refused():
    line = "--compile_mode max-autotune: is a mode of inductor, not of aot_eager. Leave one of them out."
    assert refused(compile_backend="aot_eager", compile_mode="max-autotune") == line
    assert (
        refused(compile_cache_size_limit=0) == "--compile_cache_size_limit 0: must be at least 1. Leave it out for 32."
    )


@pytest.mark.skipif(sys.platform == "win32", reason="compilers are found otherwise there")
def test_inductor_without_a_compiler_is_refused_before_a_model_loads(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "triton", None)
    line = "--compile: inductor needs a C++ compiler on a CPU, and none was found. Install one, e.g. apt install g++,"
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert refused().startswith(line) and refused().endswith("or leave --compile out.")
    check_compile(CompileOptions(compile=True, compile_backend="aot_eager"), CPU)
    check_compile(CompileOptions(), CPU)

    package = tmp_path / "triton"
    gpu = torch.device("cuda")
    monkeypatch.syspath_prepend(tmp_path)
    assert refused(device=gpu).startswith(
        "--compile: inductor needs triton on a GPU, which is not installed. Pip install"
    )
    monkeypatch.delitem(sys.modules, "triton")
    package.mkdir()
    (package / "__init__.py").touch()
    check_compile(CompileOptions(compile=True), gpu)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(device=gpu).startswith(
        "--compile: inductor needs a C compiler to launch its kernels on a GPU, and none"
    )


def test_what_a_compiler_refuses_in_the_first_step_ends_a_script_in_one_line(monkeypatch, capsys):
    model = compiled(model_of("dit_t2v"), "tvm")
    monkeypatch.setattr("utils.errors.set_up_logging", lambda: None)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        run_script(lambda: model(**random_inputs(model)))
    printed = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert printed[-1].startswith(
        (
            "script.py: error: a block of the DiT could not be compiled (ImportError: Please inst",
            "script.py: error: a block of the DiT could not be compiled (ModuleNotFoundError: No module",  # torch 2.6
        )
    )


# ------------------------------------------------------------------------------------------------ ways to ask for it
def asked(group: type[CompileOptions], *words: str) -> CompileOptions:
    return parse_options("doc", group, argv=words)[0].resolved()


def test_the_older_options_mean_the_same():
    new = ("--compile", "--compile_backend", "aot_eager", "--compile_dynamic", "true", "--compile_fullgraph")
    want = CompileOptions(True, "aot_eager", "default", "true", True)
    for group in (GenerationCompileOptions, TrainingCompileOptions):
        assert asked(group, *new) == want
        assert asked(group) == CompileOptions()
    old = ("--compile", "--compile_args", "aot_eager", "default", "True", "True")
    assert asked(GenerationCompileOptions, *old) == want and want.compile_cache_size_limit == 32
    old = ("--dynamo_backend", "AOT_EAGER", "--dynamo_mode", "default", "--dynamo_dynamic", "--dynamo_fullgraph")
    assert asked(TrainingCompileOptions, *old) == want
    assert asked(TrainingCompileOptions, "--dynamo_backend", "no") == CompileOptions()
    with pytest.raises(UserError, match="--compile_args: DYNAMIC is flase. Did you mean 'false'?"):
        asked(GenerationCompileOptions, "--compile", "--compile_args", "inductor", "default", "flase", "false")


def test_options_without_the_one_they_belong_to_are_ignored_with_a_warning(caplog):
    words = ("--compile_args", "inductor", "default", "False", "False")
    assert asked(GenerationCompileOptions, *words) == CompileOptions()
    assert not asked(TrainingCompileOptions, "--compile_mode", "max-autotune", "--dynamo_fullgraph").compile
    assert asked(TrainingCompileOptions, "--compile", "--dynamo_backend", "EAGER").compile_backend == "inductor"
    for line in (
        "--compile_args: ignored without --compile",
        "--compile_mode: ignored without --compile",
        "--dynamo_fullgraph: ignored without --dynamo_backend",
        "--dynamo_backend: ignored beside --compile",
    ):
        assert line in caplog.text
