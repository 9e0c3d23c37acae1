"""Linear weights as float8, cast or with scales."""

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.test_wan_model import distance, random_inputs, trained_gradients
from utils.errors import UserError
from utils.safetensors_io import save_file_atomically
from wan.checkpointing import save_memory
from wan.configs import TASKS
from wan.fp8 import (
    FLOAT8,
    FastFloat8Linear,
    Float8Linear,
    cast_weight,
    check_fp8_fast,
    dequantize_weight,
    is_quantized,
    product_of_float8,
    quantize,
    quantize_weight,
    round_rows,
    scale_name,
    takes_row_scales,
)
from wan.loading import build_dit, load_dit
from wan.model import WanModel

CPU = torch.device("cpu")
needs_float8_product = pytest.mark.skipif(
    takes_row_scales(CPU) is None, reason=f"torch {torch.__version__} multiplies no float8 matrices on a CPU"
)


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


def assert_same_gradients(model: WanModel, reference: WanModel) -> None:
    """Hold that branches on a model's linear layers get the gradients that they get on those of the reference."""
    given = random_inputs(reference, batch=2)
    loss, gradients = trained_gradients(model, given)
    expected_loss, expected = trained_gradients(reference, given)
    assert torch.equal(loss, expected_loss)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert distance(gradient, wanted) < 1e-5


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
    assert_same_gradients(model, reference)


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


# ----------------------------------------------------------------------------------------------------------- fp8_fast
@pytest.fixture
def product():
    """Tokens [70 64] of which some are a thousand times larger, a weight [48 64] with rows as different, a bias."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((70, 64), (48, 64), (48,)))
    x[::7] *= 1000
    weight[::5] /= 1000
    return x, weight, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_as_well_as_their_own_size_allows(product, dtype):
    x = product[0].to(dtype)
    rounded, scale = round_rows(x)
    assert rounded.dtype == FLOAT8 and torch.equal(scale, 2 ** scale.log2().round())
    errors = [distance(one, other) for one, other in zip(rounded.float() * scale, x.float(), strict=True)]
    assert max(errors) < 0.04
    assert torch.equal(round_rows(torch.zeros(2, 16, dtype=dtype))[0].float(), torch.zeros(2, 16))
    assert rounded.float().isfinite().all() and rounded.float().abs().amax() <= 448


@needs_float8_product
@pytest.mark.parametrize("row_scales", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_product_of_float8_matrices_is_that_of_the_rounded_numbers(product, row_scales, biased):
    if row_scales and not takes_row_scales(CPU):
        pytest.skip(f"torch {torch.__version__} takes no scales of rows on a CPU")
    x, weight, bias = product
    (rounded, x_scale), (held, scale) = round_rows(x), quantize_weight(weight, torch.float32, block=None)
    out = product_of_float8(rounded, x_scale, held, scale, bias if biased else None, row_scales)
    exact = (rounded.float() * x_scale) @ (held.float() * scale).T + (bias if biased else 0)
    assert out.dtype == torch.bfloat16
    assert max(distance(one, other) for one, other in zip(out.T, exact.T, strict=True)) < 0.01


@needs_float8_product
@torch.no_grad()
def test_inner_blocks_multiply_float8_and_the_first_and_the_last_compute_as_always(loaded):
    weights = tiny.state_dict("dit_t2v", blocks=4)
    model = loaded(weights, fp8_scaled=True, fp8_fast=True)
    layers = [[x for x in block.modules() if isinstance(x, nn.Linear)] for block in model.blocks]
    assert all(type(layer) is FastFloat8Linear for block in layers for layer in block)
    assert [{layer.fast for layer in block} for block in layers] == [{False}, {True}, {True}, {False}]
    name = "blocks.1.ffn.0.weight"
    assert torch.equal(model.blocks[1].ffn[0].scale_weight, weights[name].abs().amax(1, keepdim=True) / 448)
    given = random_inputs(model)
    velocity, exact = model(**given), build_dit(weights, heads=3)(**given)
    for layer in (layer for block in layers for layer in block):
        layer.fast = False
    assert 1e-3 < distance(velocity, exact) < 0.1
    assert distance(model(**given), exact) < distance(velocity, exact)


def test_a_layer_whose_sizes_the_product_does_not_take_computes_as_always():
    layer = FastFloat8Linear(64, 24)
    layer.bias.data = torch.randn(24)
    layer.weight.data, layer.scale_weight = quantize_weight(torch.randn(24, 64), torch.float32, block=None)
    x = torch.randn(2, 5, 64)
    expected = nn.functional.linear(x, dequantize_weight(layer.weight, layer.scale_weight, x.dtype), layer.bias)
    assert not layer.fast and torch.equal(layer(x), expected)


@needs_float8_product
@torch.no_grad()
def test_float8_weights_of_a_file_are_multiplied_as_they_are(loaded):
    weights = {name: x.to(FLOAT8) if is_quantized(name) else x for name, x in tiny.state_dict("dit_t2v").items()}
    model = loaded(weights, fp8_fast=True)
    assert all(torch.equal(layer.scale_weight, torch.ones_like(layer.scale_weight)) for layer in fast_layers(model))
    assert torch.equal(model.blocks[1].ffn[0].weight.float(), weights["blocks.1.ffn.0.weight"].float())


def fast_layers(model) -> list[FastFloat8Linear]:
    return [layer for layer in model.modules() if isinstance(layer, FastFloat8Linear)]


def test_a_card_without_products_of_float8_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older card")
    takes_row_scales.cache_clear()
    with pytest.raises(UserError, match="^--fp8_fast: an older card has no product of float8 matrices, which needs"):
        check_fp8_fast(torch.device("cuda"))
    takes_row_scales.cache_clear()


def test_a_torch_without_products_of_float8_on_a_cpu_is_refused_in_one_line(monkeypatch):
    def lacking(*arguments, **more):
        raise NotImplementedError("Could not run 'aten::_scaled_mm' with arguments from the 'CPU' backend.")

    monkeypatch.setattr(torch, "_scaled_mm", lacking)
    takes_row_scales.cache_clear()
    with pytest.raises(UserError, match="^--fp8_fast: torch .* on cpu has no product of float8 matrices, which needs"):
        check_fp8_fast(CPU)
    takes_row_scales.cache_clear()


@pytest.mark.gpu
def test_the_product_on_a_gpu_is_that_on_the_cpu(product):
    x, weight, bias = product
    row_scales = takes_row_scales(torch.device("cuda"))
    if row_scales is None:
        pytest.skip("no float8 on this GPU")
    arguments = (*round_rows(x), *quantize_weight(weight, torch.float32, block=None), bias)
    expected = product_of_float8(*arguments, row_scales=False)
    for scales in {row_scales, False}:
        out = product_of_float8(*(tensor.cuda() for tensor in arguments), scales)
        assert distance(out.cpu(), expected) < 0.01
