"""LoRA files in diffusers: loaded by its own loaders, its DiT gives what ours gives with the LoRA attached."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import convert_lora
from networks import loha, lora_wan
from networks.formats import to_default, to_diffusers
from tests import tiny
from tests.diffusers_dit import diffusers_dit, padded
from tests.test_wan_model import random_inputs
from utils.errors import UserError
from utils.safetensors_io import save_file_atomically
from wan.loading import build_dit

pytest.importorskip("peft")


@pytest.fixture(params=["dit_t2v", "dit_i2v"])
def case(request, tmp_path, monkeypatch):
    """Our DiT with a LoRA, its inputs, diffusers' DiT, and a function that converts the LoRA's file."""
    weights = tiny.state_dict(request.param, seed=1)
    model = build_dit(weights, heads=3)
    torch.manual_seed(0)
    network = lora_wan.create_network(model, 4, 2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_file_atomically(network.state_dict(), tmp_path / "lora.safetensors")

    def converted(*more: str):
        output = tmp_path / "converted.safetensors"
        words = ["--input", tmp_path / "lora.safetensors", "--output", output, "--target", *more]
        monkeypatch.setattr(sys, "argv", ["convert_lora.py", *map(str, words)])
        convert_lora.main()
        return output

    return model, network, random_inputs(model), diffusers_dit(weights, model.shape), converted


@torch.no_grad()
def compare(model, network, given, theirs):
    """Assert that the LoRA, which is loaded in theirs and attached to ours now, changes both in the same way."""
    plain = model(**given)
    network.attach(model)
    ours = model(**given)
    x = given["x"] if given["y"] is None else torch.cat([given["x"], given["y"]], dim=1)
    other = theirs(x, given["timestep"], padded(given["text"]), given["image_features"], return_dict=False)[0]
    assert (ours - plain).norm() > 0.1 * plain.norm()
    assert (ours - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("prefix", [None, "mine"])
def test_the_dit_loads_the_file_of_target_diffusers(case, prefix):
    model, network, given, theirs, converted = case
    more = ["--diffusers_prefix", prefix] if prefix else []
    theirs.load_lora_adapter(str(converted("diffusers", *more)), prefix=prefix or "transformer")
    compare(model, network, given, theirs)


@pytest.mark.parametrize("target", ["other", "diffusers"])
def test_the_pipeline_loads_both_kinds(case, target):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    model, network, given, theirs, converted = case
    pipeline = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), theirs)
    pipeline.load_lora_weights(str(converted(target)))
    compare(model, network, given, theirs)


def test_layer_names_of_diffusers_are_read_back(case):
    _, network, *_, converted = case
    file = load_file(converted("diffusers"))
    assert all(key.startswith("transformer.blocks.") for key in file)
    assert to_default(file).keys() == network.state_dict().keys()


def test_layers_outside_of_blocks_have_their_names_too():
    names = {
        **{f"text_embedding.{n}": f"condition_embedder.text_embedder.linear_{1 + n // 2}" for n in (0, 2)},
        **{f"time_embedding.{n}": f"condition_embedder.time_embedder.linear_{1 + n // 2}" for n in (0, 2)},
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "head.head": "proj_out",
    }
    for ours, theirs in names.items():
        file = {f"{ours}.lora_A.weight": torch.ones(1, 2), f"{ours}.lora_B.weight": torch.ones(2, 1)}
        assert sorted(to_diffusers(file, "")) == [f"{theirs}.lora_A.weight", f"{theirs}.lora_B.weight"]


def test_what_diffusers_does_not_load_is_refused():
    network = loha.create_network(build_dit(tiny.state_dict("dit_t2v"), heads=3))
    with pytest.raises(UserError, match="hada_w1_a: diffusers loads plain LoRAs alone. Use --target other"):
        to_diffusers(network.state_dict())
