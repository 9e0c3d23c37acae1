"""DiT files: which model they hold, what is wrong with them, and the model they become."""

import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny
from tests.test_wan_model import distance, random_inputs
from utils.errors import UserError
from utils.safetensors_io import open_tensors
from wan.configs import TASKS
from wan.dit_file import DitOptions, check_dit, check_fp8, dit_dtype, dit_kind, dit_shape, task_kind
from wan.fp8 import FLOAT8, dequantize_weight
from wan.loading import build_dit, load_dit

T2V = TASKS["t2v-14B"]


@pytest.fixture
def saved(tmp_path):
    """Write weights to a file and return its path."""

    def save(weights: dict[str, Tensor], name: str = "dit.safetensors", heads: str | None = "3"):
        save_file(weights, tmp_path / name, {"num_heads": heads} if heads else None)
        return tmp_path / name

    return save


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    line = str(error.value)
    assert "\n" not in line
    return line


def same_velocity(model, reference) -> bool:
    given = random_inputs(reference)
    with torch.no_grad():
        return torch.equal(model(**given), reference(**given))


# ------------------------------------------------------------------------------------------------ what becomes of it
@pytest.mark.parametrize(
    "kind, task",
    [
        ("dit_t2v", "t2v-14B"),
        ("dit_t2v", "t2i-14B"),
        ("dit_t2v", "t2v-A14B"),
        ("dit_i2v", "i2v-14B"),
        ("dit_flf2v", "flf2v-14B"),
        ("dit_fun", "t2v-1.3B-FC"),
        ("dit_fun", "i2v-14B-FC"),
        ("dit_i2v_a14b", "i2v-A14B"),
    ],
)
def test_a_file_becomes_the_model_with_its_weights(models, kind, task):
    model = load_dit(models[kind], TASKS[task], torch.float32, "cpu", attn_mode="sdpa", split_attn=True)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.attn_mode, model.split_attn) == ("sdpa", True)
    assert same_velocity(model, build_dit(tiny.state_dict(kind), heads=3))
    assert check_dit(models[kind], TASKS[task]) == model.shape
    assert dit_kind(model.shape) == task_kind(TASKS[task])


def test_sizes_are_read_from_the_shapes_and_the_heads_from_the_metadata(models):
    with open_tensors(models["dit_flf2v"], "--dit") as file:
        shape = dit_shape(file)
    assert (shape.dim, shape.ffn_dim, shape.heads, shape.blocks) == (96, 192, 3, 2)
    assert (shape.in_channels, shape.out_channels, shape.text_dim, shape.freq_dim) == (36, 16, 64, 64)
    assert (shape.clip_dim, shape.image_tokens, shape.patch) == (1280, 514, (1, 2, 2))
    assert dit_shape(tiny.state_dict("dit_t2v", dim=256)).heads == 2
    assert dit_shape(tiny.state_dict("dit_t2v", dim=256), heads=4).heads == 4


def test_the_prefix_of_repackaged_files_is_taken_off(saved):
    weights = tiny.state_dict("dit_t2v")
    path = saved({f"model.diffusion_model.{name}": x for name, x in weights.items()})
    name = "blocks.1.ffn.2.weight"
    deltas = {name: lambda: torch.ones(96, 192)}
    model = load_dit(path, T2V, torch.float32, "cpu", deltas)
    assert torch.equal(model.state_dict()[name], weights[name] + 1)


def test_all_parts_are_read_whichever_is_named_and_the_dtype_is_found_in_any(saved):
    weights = {name: x.half() for name, x in tiny.state_dict("dit_t2v").items()}
    names = sorted(weights)
    parts = [names[:20], names[20:21], names[21:]]
    paths = [
        saved({name: weights[name] for name in part}, f"dit-{i + 1:05d}-of-00003.safetensors")
        for i, part in enumerate(parts)
    ]
    for path in paths:
        assert dit_dtype(path) == torch.float16
    model = load_dit(paths[1], T2V, torch.float32, "cpu")
    assert same_velocity(model, build_dit({name: x.float() for name, x in weights.items()}, heads=3))


def test_weights_are_cast_to_the_dtype_asked_for(models):
    model = load_dit(models["dit_t2v"], T2V, torch.bfloat16, "cpu")
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}


def test_deltas_are_added_in_float32_before_the_weight_is_rounded(saved):
    weights = {name: x.bfloat16() for name, x in tiny.state_dict("dit_t2v").items()}
    name = "blocks.0.self_attn.q.weight"
    delta = torch.full((96, 96), 1e-3)
    model = load_dit(saved(weights), T2V, torch.bfloat16, "cpu", {name: lambda: delta})
    merged = (weights[name].float() + delta).bfloat16()
    assert torch.equal(model.state_dict()[name], merged)
    assert not torch.equal(merged, weights[name] + delta.bfloat16())
    exact = load_dit(saved(weights), T2V, torch.float32, "cpu", {name: lambda: delta})
    assert torch.equal(exact.state_dict()[name], weights[name].float() + delta)


def test_deltas_are_added_before_the_weight_is_quantized(saved):
    weights = tiny.state_dict("dit_t2v")
    name = "blocks.0.ffn.2.weight"
    delta = torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
    path = saved(weights)
    merged = saved(weights | {name: weights[name] + delta}, "merged.safetensors")
    for scaled in (False, True):
        options = {"fp8": True, "fp8_scaled": scaled}
        attached = load_dit(path, T2V, torch.float32, "cpu", {name: lambda: delta}, **options)
        assert same_velocity(attached, load_dit(merged, T2V, torch.float32, "cpu", **options))


def test_a_delta_is_made_when_its_weight_is_read_and_only_once(models):
    calls = []
    names = ("blocks.0.self_attn.q.weight", "blocks.1.cross_attn.v.weight")
    deltas = {name: lambda name=name: calls.append(name) or torch.zeros(96, 96) for name in names}
    load_dit(models["dit_t2v"], T2V, torch.float32, "cpu", deltas)
    assert sorted(calls) == sorted(names)


def test_deltas_for_weights_that_the_model_lacks_are_an_error_that_names_them(models):
    deltas = {f"blocks.{i}.self_attn.q.weight": lambda: torch.zeros(96, 96) for i in range(5)}
    line = error_of(load_dit, models["dit_t2v"], T2V, torch.float32, "cpu", deltas)
    assert "LoRA changes weights that this model lacks: 3 tensors (blocks.2.self_attn.q.weight, blocks.3" in line


def test_a_delta_of_another_size_is_an_error(models):
    deltas = {"blocks.0.self_attn.q.weight": lambda: torch.zeros(128, 128)}
    line = error_of(load_dit, models["dit_t2v"], T2V, torch.float32, "cpu", deltas)
    assert "(128, 128) does not fit blocks.0.self_attn.q.weight of (96, 96)" in line


# ------------------------------------------------------------------------------------------------------- wrong kinds
@pytest.mark.parametrize(
    "kind, task, right",
    [
        ("dit_i2v", "t2v-14B", "use --task i2v-14B,"),
        ("dit_flf2v", "i2v-14B", "use --task flf2v-14B,"),
        ("dit_t2v", "i2v-14B", "use --task t2v-14B or t2v-1.3B or t2i-14B or t2v-A14B,"),
        ("dit_fun", "i2v-14B", "use --task t2v-1.3B-FC or t2v-14B-FC or i2v-14B-FC,"),
        ("dit_i2v_a14b", "i2v-14B", "use --task i2v-A14B,"),
        ("dit_i2v", "i2v-A14B", "use --task i2v-14B,"),
        ("dit_i2v", "t2v-14B-FC", "use --task i2v-14B,"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_right_task_named(models, kind, task, right):
    line = error_of(check_dit, models[kind], TASKS[task])
    assert line.startswith(f"--dit {models[kind]}: is ") and f"but --task is {task}. " in line
    assert right.removeprefix("use ") in line


def empty_dit(task: str, **changes: int) -> dict[str, Tensor]:
    """Return a published model's tensors with the bytes of one number, so that a file of them is small enough."""
    config = TASKS[task]
    table = tiny.dit_shapes(
        config.in_channels, config.clip, len(config.images) == 2, config.dim, config.ffn_dim, config.blocks
    )
    return {name: torch.zeros(1, dtype=torch.bfloat16).expand(shape) for name, shape in table.items()}


class EmptyFile:
    """Stands in for a weight file of published size, which would be too large to write."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors, self.metadata = tensors, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def keys(self):
        return self._tensors.keys()

    def shape(self, key: str):
        return tuple(self._tensors[key].shape)

    def get(self, key: str):
        return self._tensors[key]


@pytest.fixture
def published(monkeypatch):
    """Let any path name a model of published size."""

    def pretend(task: str) -> None:
        monkeypatch.setattr("wan.dit_file.open_tensors", lambda *_: EmptyFile(empty_dit(task)))

    return pretend


@pytest.mark.parametrize(
    "file, task, right",
    [
        ("i2v-14B", "t2v-14B", "i2v-14B"),
        ("t2v-1.3B", "i2v-14B", "t2v-1.3B"),
        ("t2v-14B", "i2v-14B", "t2v-14B or t2i-14B or t2v-A14B"),
        ("t2v-1.3B-FC", "t2v-1.3B", "t2v-1.3B-FC"),
        ("t2v-14B-FC", "t2v-14B", "t2v-14B-FC or i2v-14B-FC"),
    ],
)
def test_only_tasks_of_the_files_size_are_named_when_it_is_a_published_one(published, file, task, right):
    published(file)
    line = error_of(check_dit, "dit.safetensors", TASKS[task])
    assert f"Use --task {right}, or the weights for {task}." in line


def test_a_file_of_another_published_size_is_used_with_a_warning(published, caplog):
    published("t2v-1.3B")
    with caplog.at_level(logging.INFO):
        assert check_dit("dit.safetensors", T2V).heads == 12
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "--dit dit.safetensors: has the size of t2v-1.3B, --task is t2v-14B")
    ]


@pytest.mark.parametrize("task", ["t2v-14B", "t2i-14B", "t2v-A14B"])
def test_a_file_of_the_tasks_size_is_used_without_a_word(published, caplog, task):
    published("t2v-14B")
    with caplog.at_level(logging.INFO):
        check_dit("dit.safetensors", TASKS[task])
    assert not caplog.records


def test_a_file_of_unpublished_size_is_used_with_a_log_line(models, caplog):
    with caplog.at_level(logging.INFO):
        check_dit(models["dit_t2v"], T2V, "--dit_high_noise")
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert f"--dit_high_noise {models['dit_t2v']}: a model of unpublished size: 96 channels" in caplog.text


@pytest.mark.parametrize(
    "kind, is_a",
    [("vae", "the Wan2.1 VAE"), ("t5", "a T5 text encoder"), ("clip", "a CLIP image encoder")],
)
def test_another_part_of_wan_given_as_dit_is_named(models, kind, is_a):
    for call in (lambda path: check_dit(path, T2V), dit_dtype):
        line = error_of(call, models[kind])
        assert line.startswith(f"--dit {models[kind]}: this seems to be {is_a}, not a Wan DiT. Give the DiT's weights")


def renamed(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): x for name, x in weights.items()}


def nearly_dits() -> dict[str, tuple[dict[str, Tensor], str]]:
    """Return files that are nearly a DiT: their tensors, and what the line says of them."""
    weights = tiny.state_dict("dit_t2v")
    diffusers = renamed(renamed(weights, "self_attn", "attn1"), "text_embedding", "condition_embedder")
    ti2v = {name: torch.zeros(shape) for name, shape in tiny.dit_shapes(48, False).items()}
    ti2v |= {"head.head.weight": torch.zeros(192, 96), "head.head.bias": torch.zeros(192)}
    channels = {name: torch.zeros(shape) for name, shape in tiny.dit_shapes(20, False).items()}
    fewer = {name: x for name, x in weights.items() if "blocks.1.ffn" not in name}

    def only(name: str) -> dict[str, Tensor]:
        return {name: torch.ones(4, 96)}

    return {
        "diffusers": (diffusers, "is a DiT in the layout of diffusers. Use the file of the official"),
        "lora": (only("lora_unet_blocks_0_ffn_0.lora_down.weight"), "is a LoRA, not a DiT. Give it to --lora_weight"),
        "other lora": (only("diffusion_model.blocks.0.ffn.0.lora_A.weight"), "is a LoRA, not a DiT"),
        "fun 1.1": (weights | only("ref_conv.weight"), "is Fun-Control V1.1, which is not supported"),
        "vace": (weights | only("vace_blocks.0.before_proj.weight"), "is a VACE model, which is not supported"),
        "ti2v-5B": (ti2v, "is ti2v-5B of Wan2.2, which is not supported"),
        "more": (
            weights | only("x.weight"),
            "a variant of Wan that is not supported, it has 1 tensor (x.weight) besides",
        ),
        "fewer": (fewer, "4 missing: blocks.1.ffn.0.weight, blocks.1.ffn.0.bias, blocks.1.ffn.2.weight"),
        "shape": (weights | {"blocks.1.norm3.bias": torch.ones(95)}, "1 of the wrong shape: blocks.1.norm3.bias"),
        "channels": (
            channels,
            "no task has a model of 20 input channels and 16 output channels without an image branch",
        ),
        "unknown": (only("model.layer.weight"), "an unknown model (with model.layer.weight), not a Wan DiT"),
    }


@pytest.mark.parametrize("weights, says", nearly_dits().values(), ids=nearly_dits())
def test_a_file_that_is_nearly_a_dit_is_refused_for_what_it_is(saved, weights, says):
    path = saved(weights)
    line = error_of(check_dit, path, T2V)
    assert line.startswith(f"--dit {path}: ") and says in line
    assert error_of(load_dit, path, T2V, torch.float32, "cpu") == line


def test_a_truncated_file_is_called_truncated(models, tmp_path):
    path = tmp_path / "short.safetensors"
    path.write_bytes(models["dit_t2v"].read_bytes()[:-1000])
    assert "truncated" in error_of(check_dit, path, T2V)


def test_a_number_of_heads_that_cannot_be_is_refused(saved):
    weights = tiny.state_dict("dit_t2v")
    assert "num_heads = 'many'" in error_of(check_dit, saved(weights, heads="many"), T2V)
    assert "5 heads do not divide 96 channels" in error_of(check_dit, saved(weights, heads="5"), T2V)


# --------------------------------------------------------------------------------------------------------------- fp8
def float8(weights: dict[str, Tensor], dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in weights.items()}


def test_a_float8_file_is_used_as_it_is_with_fp8(saved):
    weights = float8(tiny.state_dict("dit_t2v"))
    path = saved(weights)
    assert dit_dtype(path) == torch.float8_e4m3fn
    model = load_dit(path, T2V, torch.float32, "cpu", fp8=True)
    name = "blocks.1.self_attn.o.weight"
    assert torch.equal(model.state_dict()[name].view(torch.uint8), weights[name].view(torch.uint8))
    reference = build_dit({name: x.float() for name, x in weights.items()}, heads=3)
    given = random_inputs(reference)
    with torch.no_grad():
        assert distance(model(**given), reference(**given)) < 1e-6


@pytest.mark.parametrize(
    "dtype, options, says",
    [
        (
            torch.float8_e4m3fn,
            (False, False),
            "holds float8 weights. Add --fp8, in training --fp8_base, or use the bf16",
        ),
        (torch.float8_e4m3fn, (True, True), "--fp8_scaled cannot make more exact. Use the bf16 or fp16 file"),
        (torch.float8_e5m2, (True, False), "holds float8_e5m2 weights, of the float8 formats only e4m3fn is supported"),
        (torch.bfloat16, (False, True), "--fp8_scaled: is a way of doing --fp8. Add --fp8, in training --fp8_base"),
        (torch.bfloat16, (False, False, True), "--fp8_fast: computes with the weights of --fp8_scaled. Add --fp8_"),
        (torch.bfloat16, (True, True, False, "nf4"), "--quantize nf4: holds the same weights as the fp8 options, in "),
    ],
)
def test_fp8_options_that_do_not_go_with_the_file_are_refused(saved, dtype, options, says):
    path = saved(float8(tiny.state_dict("dit_t2v"), dtype))
    assert says in error_of(check_fp8, path, *options)
    named = dict(zip(("fp8", "fp8_scaled", "fp8_fast", "quantize"), options, strict=False))
    assert says in error_of(load_dit, path, T2V, torch.float32, "cpu", **named)


@pytest.mark.parametrize("options", [(False, False), (True, False), (True, True)])
def test_fp8_options_go_with_a_bfloat16_file(saved, options):
    check_fp8(saved(float8(tiny.state_dict("dit_t2v"), torch.bfloat16)), *options)


def test_the_default_task_is_t2v_14b():
    assert DitOptions().task == "t2v-14B" and DitOptions().dit is None


def scaled_file(weights: dict[str, Tensor], style: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights as ComfyUI's fp8_scaled files hold them, and what they stand for."""
    file: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=FLOAT8)} if style == "old" else {}
    meant = {}
    for name, weight in weights.items():
        if weight.ndim != 2 or "blocks" not in name and "text_embedding" not in name:
            file[name] = meant[name] = weight
            continue
        rows = style == "rows"
        scale = (weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()) / 448
        file[name] = (weight / scale).clamp(-448, 448).to(FLOAT8)
        meant[name] = file[name].float() * scale
        layer = name.removesuffix(".weight")
        if style == "old":
            file[f"{layer}.scale_weight"], file[f"{layer}.scale_input"] = scale, torch.ones(())
        else:
            file[f"{layer}.weight_scale"] = scale
            file[f"{layer}.comfy_quant"] = torch.zeros(5, dtype=torch.uint8)
    return file, meant


@pytest.mark.parametrize("sizes", [{}, {"dim": 128, "ffn": 192}])
@pytest.mark.parametrize("style", ["old", "new", "rows"])
@torch.no_grad()
def test_files_with_scales_are_held_as_they_are(saved, style, sizes):
    file, meant = scaled_file(tiny.state_dict("dit_t2v", **sizes), style)
    prefixed = {"model.diffusion_model." + name: tensor for name, tensor in file.items()}
    heads = 4 if sizes else 3
    path = saved(prefixed, heads=str(heads))
    reference = build_dit(meant, heads)
    given = random_inputs(reference)
    for fp8_scaled in (False, True):
        model = load_dit(path, T2V, torch.float32, "cpu", fp8=True, fp8_scaled=fp8_scaled)
        assert torch.equal(model.blocks[0].ffn[0].weight.float(), file["blocks.0.ffn.0.weight"].float())
        assert distance(model(**given), reference(**given)) < 1e-6


def test_a_lora_is_added_to_what_scaled_weights_stand_for(saved):
    file, meant = scaled_file(tiny.state_dict("dit_t2v"), "old")
    name = "blocks.1.self_attn.q.weight"
    delta = torch.randn(meant[name].shape) * 0.05
    model = load_dit(saved(file), T2V, torch.float32, "cpu", {name: lambda: delta}, fp8=True)
    layer = model.blocks[1].self_attn.q
    held = dequantize_weight(layer.weight, layer.scale_weight, torch.float32)
    assert distance(held, meant[name] + delta) < 0.04


def test_scaled_files_need_the_fp8_option_and_scales_that_fit(saved):
    file, _ = scaled_file(tiny.state_dict("dit_t2v"), "old")
    assert "holds float8 weights. Add --fp8" in error_of(check_fp8, saved(file), False, False)
    path = saved(file | {"blocks.0.ffn.0.scale_weight": torch.ones(7)})
    line = error_of(load_dit, path, T2V, torch.float32, "cpu", fp8=True)
    assert "blocks.0.ffn.0.scale_weight holds 7 numbers, neither one nor one for each of 192 outputs" in line


# ----------------------------------------------------------------------------------------------------- memory and time
@pytest.mark.parametrize(
    "held", [{}, {"fp8": True}, {"fp8": True, "fp8_scaled": True}, {"quantize": "int8"}, {"quantize": "nf4"}]
)
def test_a_weight_taken_slice_by_slice_is_the_same_as_at_once(models, monkeypatch, held):
    deltas = {"blocks.0.ffn.2.weight": lambda: torch.ones(96, 192).cumsum(0) / 96}
    whole = load_dit(models["dit_t2v"], T2V, torch.float32, "cpu", deltas, **held)
    monkeypatch.setattr("wan.loading.SLICE", 1)
    sliced = load_dit(models["dit_t2v"], T2V, torch.float32, "cpu", deltas, **held)
    for (name, one), other in zip(whole.state_dict().items(), sliced.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


MEASURED = """
import re, sys, torch
from pathlib import Path
from wan.configs import TASKS
from wan.loading import load_dit

small, large = sys.argv[1:]
load_dit(small, TASKS["t2v-14B"], torch.bfloat16, "cpu", fp8=True)  # whatever is imported on the way
memory = lambda name: 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = memory("VmRSS")
model = load_dit(large, TASKS["t2v-14B"], torch.bfloat16, "cpu", fp8=True)
print(memory("VmHWM") - before, sum(x.nbytes for x in model.state_dict().values()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_hardly_more_memory_than_the_model(models, tmp_path):
    shapes = tiny.dit_shapes(16, False, dim=512, ffn=2048, blocks=10)
    path = tmp_path / "large.safetensors"
    save_file({name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}, path)
    command = [sys.executable, "-c", MEASURED, str(models["dit_t2v"]), str(path)]
    grown, size = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert size > 40e6 and path.stat().st_size > 1.8 * size
    assert grown < 1.15 * size + 20e6
