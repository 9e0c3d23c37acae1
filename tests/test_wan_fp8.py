"""Linear weights as float8, cast or with scales."""

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.test_wan_model import distance, random_inputs, trained_gradients
from utils.safetensors_io import save_file_atomically
from wan.checkpointing import save_memory
from wan.configs import TASKS
from wan.fp8 import (
    FLOAT8,
    Float8Linear,
    cast_weight,
    dequantize_weight,
    is_quantized,
    quantize,
    quantize_weight,
    scale_name,
)
from wan.loading import build_dit, load_dit


@pytest.fixture
def loaded(tmp_path):
    """Load weights from a file with fp8 options, as the scripts do."""

    def load(weights: dict[str, Tensor], dtype: torch.dtype = torch.float32, **options):
        save_file_atomically(weights, tmp_path / "dit.safetensors", {"num_heads": "3"})
        return load_dit(tmp_path / "dit.safetensors", TASKS["t2v-14B"], dtype, "cpu", fp8=True, **options)

    return load


@pytest.mark.parametrize("kind", ["block", "channel", "tensor"])
def test_bytes_and_scales_are_those_of_musubi_tuner(golden, recipe, kind):
    case = recipe.cases("fp8", golden)[f"quantize_{kind}"]
    quantized, scale = quantize_weight(case["inputs"]["w"])
    assert torch.equal(quantized.view(torch.uint8), case["outputs"]["q"])
    assert torch.equal(scale, case["outputs"]["scale"].view_as(scale))


def test_the_weights_that_musubi_tuner_scales_are_scaled_and_no_others(golden, recipe):
    weights = recipe.state_dict("dit_t2v", golden)
    quantized = quantize(weights)
    scales = {name for name in quantized if name.endswith(".scale_weight")}
    assert sorted(scales) == recipe.cases("fp8", golden)["dit_t2v"]["scaled_keys"]
    for name, weight in weights.items():
        kept = scale_name(name) not in scales
        assert torch.equal(quantized[name], weight) if kept else quantized[name].dtype == FLOAT8


@pytest.mark.parametrize("task, count", [("t2v-1.3B", 300), ("t2v-14B", 400), ("i2v-14B", 480), ("t2v-1.3B-FC", 360)])
def test_all_linear_weights_of_the_blocks_are_quantized(task, count):
    config = TASKS[task]
    with torch.device("meta"):
        table = tiny.dit_shapes(config.in_channels, config.clip, blocks=config.blocks)
    assert sum(is_quantized(name) for name in table) == count


@torch.no_grad()
def test_the_velocity_with_scaled_weights_is_that_of_musubi_tuner(golden, recipe, loaded):
    case = recipe.cases("fp8", golden)["dit_t2v"]
    model = loaded(recipe.state_dict("dit_t2v", golden), fp8_scaled=True)
    given = case["inputs"]
    out = model(torch.stack(given["x"]), given["t"], given["context"])
    assert distance(out[0], case["outputs"]["out_0"]) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [128, 96])
def test_scaled_weights_are_nearer_to_the_weights_than_plain_ones(dtype, inputs):
    weight = torch.randn(64, inputs, generator=torch.Generator().manual_seed(0)) * 0.005
    quantized, scale = quantize_weight(weight, dtype)
    assert scale.dtype == dtype
    scaled = distance(dequantize_weight(quantized, scale, torch.float32), weight)
    plain = distance(dequantize_weight(cast_weight(weight), None, torch.float32), weight)
    assert scaled < 0.03 < 0.1 < plain


def test_what_is_beyond_the_range_saturates_and_zeros_stay_zeros():
    weight = torch.tensor([[1e6, -1e6, float("nan"), 0.0]])
    assert cast_weight(weight).float().tolist() == [[448.0, -448.0, 0.0, 0.0]]
    quantized, scale = quantize_weight(torch.zeros(2, 64))
    assert torch.equal(dequantize_weight(quantized, scale, torch.float32), torch.zeros(2, 64))
    assert scale.min() > 0


@pytest.mark.parametrize("scaled", [False, True])
def test_only_linear_weights_of_the_blocks_lose_precision(loaded, scaled):
    weights = tiny.state_dict("dit_t2v")
    model = loaded(weights, fp8_scaled=scaled)
    for name, tensor in model.state_dict().items():
        if name.endswith("scale_weight"):
            continue
        assert tensor.dtype == (FLOAT8 if is_quantized(name) else torch.float32), name
        if not is_quantized(name):
            assert torch.equal(tensor, weights[name])
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == 20 and all(type(layer) is Float8Linear for layer in layers)
    assert model.dtype == torch.float32


@pytest.mark.parametrize("scaled", [False, True])
@torch.no_grad()
def test_the_velocity_is_that_of_a_model_with_the_rounded_weights(loaded, scaled):
    weights = tiny.state_dict("dit_t2v")
    rounded = dict(weights)
    for name in filter(is_quantized, weights):
        pair = quantize_weight(weights[name]) if scaled else (cast_weight(weights[name]), None)
        rounded[name] = dequantize_weight(*pair, torch.float32)
    given = random_inputs(build_dit(weights, heads=3), batch=2)
    velocity = loaded(weights, fp8_scaled=scaled)(**given)
    assert torch.equal(velocity, build_dit(rounded, heads=3)(**given))
    assert 1e-3 < distance(velocity, build_dit(weights, heads=3)(**given)) < 0.2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_branches_on_float8_layers_get_the_gradients_they_get_on_the_rounded_weights(loaded, scaled, checkpointing):
    weights = tiny.state_dict("dit_t2v")
    rounded = dict(weights)
    for name in filter(is_quantized, weights):
        pair = quantize_weight(weights[name]) if scaled else (cast_weight(weights[name]), None)
        rounded[name] = dequantize_weight(*pair, torch.float32)
    model, reference = loaded(weights, fp8_scaled=scaled), build_dit(rounded, heads=3)
    save_memory(model, checkpointing)
    given = random_inputs(reference, batch=2)
    loss, gradients = trained_gradients(model, given)
    expected_loss, expected = trained_gradients(reference, given)
    assert torch.equal(loss, expected_loss)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert distance(gradient, wanted) < 1e-5


def test_the_backward_pass_keeps_no_copy_of_a_weight_in_another_dtype():
    layer = Float8Linear(128, 64, scaled=True).requires_grad_(False)
    layer.weight.data, scale = quantize_weight(torch.randn(64, 128))
    layer.scale_weight.copy_(scale)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.randn(3, 128, requires_grad=True))
    assert sum(x.numel() * x.element_size() for x in kept) == 64 * 128 + 64 * 2 * 4


@torch.no_grad()
def test_scales_are_held_and_weights_computed_in_the_dtype_of_the_model(loaded):
    model = loaded(tiny.state_dict("dit_t2v"), dtype=torch.bfloat16, fp8_scaled=True)
    assert model.dtype == torch.bfloat16
    assert model.blocks[0].ffn[0].scale_weight.dtype == torch.bfloat16
    given = random_inputs(model)
    exact = build_dit(tiny.state_dict("dit_t2v"), heads=3)
    assert distance(model(**given), exact(**given)) < 0.2
