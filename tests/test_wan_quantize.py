"""Linear weights in the 8-bit and 4-bit formats of bitsandbytes."""

import sys

import pytest
import torch
from torch import nn

from networks.lora import linear_layers
from tests import tiny
from tests.test_wan_fp8 import assert_same_gradients
from tests.test_wan_model import distance, random_inputs
from utils.errors import UserError
from wan.checkpointing import save_memory
from wan.configs import TASKS
from wan.fp8 import is_quantized
from wan.loading import build_dit, load_dit
from wan.model import WanShape
from wan.quantize import FORMATS, Int8Linear, NF4Linear, check_quantize

functional = pytest.importorskip("bitsandbytes.functional")
SHAPE = WanShape(dim=96, ffn_dim=192, heads=3, blocks=2, in_channels=16)


@pytest.fixture
def loaded(models):
    return lambda name, **options: load_dit(
        models["dit_t2v"], TASKS["t2v-14B"], torch.float32, "cpu", quantize=name, **options
    )


def decoded(layer: nn.Linear) -> torch.Tensor:
    return layer.decode(layer.weight, layer.scale_weight, torch.float32)


def test_weights_are_held_and_read_as_bitsandbytes_does():
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(0)) * 0.02
    layer = Int8Linear(192, 64, device="meta")
    integers, largest, _ = functional.int8_vectorwise_quant(weight)
    held, scale = layer.encode(weight)
    assert torch.equal(held, integers)
    torch.testing.assert_close(
        layer.decode(held, scale, torch.float32), functional.int8_vectorwise_dequant(integers, largest)
    )
    layer = NF4Linear(192, 64, device="meta")
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    held, scale = layer.encode(weight)
    assert torch.equal(held.flatten(), packed.flatten()) and held.shape == layer.weight.shape
    assert torch.equal(layer.decode(held, scale, torch.float32), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("name, error", [("int8", 0.01), ("nf4", 0.11)])
@torch.no_grad()
def test_the_velocity_is_that_of_a_model_with_the_rounded_weights(loaded, name, error):
    weights, model = tiny.state_dict("dit_t2v"), loaded(name)
    for own, weight in filter(lambda item: is_quantized(item[0]), weights.items()):
        rounded = decoded(model.get_submodule(own.removesuffix(".weight")))
        assert 0 < distance(rounded, weight) < error
        weights[own] = rounded
    given = random_inputs(model, batch=2)
    assert torch.equal(model(**given), build_dit(weights, heads=3)(**given))
    assert model.dtype == torch.float32


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_branches_get_the_gradients_they_get_on_the_rounded_weights(loaded, name, checkpointing):
    weights, model = tiny.state_dict("dit_t2v"), loaded(name)
    rounded = {own: decoded(model.get_submodule(own.removesuffix(".weight"))) for own in filter(is_quantized, weights)}
    reference = build_dit(weights | rounded, heads=3)
    save_memory(model, checkpointing)
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("name, bits", [("int8", 8.5), ("nf4", 4.6)])
def test_a_lora_finds_the_layers_and_they_take_as_few_bits_as_promised(loaded, name, bits):
    layers = linear_layers(loaded(name)).values()
    assert len(layers) == 20 and all(type(layer) is FORMATS[name] for layer in layers)
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    held = sum(layer.weight.nbytes + layer.scale_weight.nbytes for layer in layers)
    assert 8 * held / sum(layer.in_features * layer.out_features for layer in layers) < bits


def test_the_backward_pass_keeps_the_bytes_and_no_decoded_copy(loaded):
    layer, kept = loaded("nf4").blocks[0].ffn[0], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.randn(3, 96, requires_grad=True))
    assert sum(x.nbytes for x in kept) == 96 * 192 // 2 + 96 * 192 // 64 * 4


@pytest.mark.parametrize("name", FORMATS)
def test_what_bitsandbytes_cannot_do_is_one_line(monkeypatch, name):
    check_quantize(None, SHAPE, torch.device("cpu"))
    check_quantize(name, SHAPE, torch.device("cpu"))
    monkeypatch.setattr(FORMATS[name], "encode", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel")))
    with pytest.raises(UserError, match=f"^--quantize {name}: bitsandbytes [0-9.]+ does not work on cpu. Pip install"):
        check_quantize(name, SHAPE, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=f"^--quantize {name}: bitsandbytes is not installed. Pip install"):
        check_quantize(name, SHAPE, torch.device("cpu"))


def test_sizes_that_do_not_divide_into_blocks_are_one_line():
    shape = WanShape(dim=12, ffn_dim=20, heads=2, blocks=2, in_channels=16)
    with pytest.raises(UserError, match="^--quantize nf4: weights of 12 and 20 channels .* Use --quantize int8"):
        check_quantize("nf4", shape, torch.device("cpu"))
    check_quantize("int8", shape, torch.device("cpu"))
