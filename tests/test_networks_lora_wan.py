"""Which layers get a branch, and what the network arguments say."""

import json

import pytest
import torch

from networks.create import parse_network_args
from networks.lora_wan import create_network, create_network_from_weights, load_weights
from utils.errors import UserError
from wan.loading import build_dit


@pytest.fixture(scope="module")
def names(golden):
    return json.loads((golden / "lora_names.json").read_text())


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_the_default_layers_are_the_recorded_ones_in_their_order(recipe, names, kind):
    model = build_dit(recipe.state_dict(f"dit_{kind}"), heads=3)
    assert create_network(model).names == names[f"{kind}/default"]


def test_patterns_choose_the_recorded_layers(recipe, names):
    model = build_dit(recipe.state_dict("dit_t2v"), heads=3)
    cases = [value for value in names.values() if isinstance(value, dict) and "network_args" in value]
    assert len(cases) == 4
    for case in cases:
        assert create_network(model, args=case["network_args"]).names == case["modules"]


def test_defaults_are_rank_4_and_alpha_equal_to_the_rank(recipe):
    model = build_dit(recipe.state_dict("dit_t2v"), heads=3)
    branch = create_network(model).lora_unet_blocks_1_ffn_2
    assert (branch.rank, branch.alpha.item(), branch.scale) == (4, 4, 1)
    branch = create_network(model, dim=8, alpha=2).lora_unet_blocks_1_ffn_2
    assert (branch.rank, branch.alpha.item(), branch.scale) == (8, 2, 0.25)


def test_ranks_and_alphas_of_a_file_may_differ_from_layer_to_layer():
    weights = {}
    for name, rank, alpha in (("blocks_0_ffn_0", 2, 1.0), ("blocks_1_self_attn_o", 5, 10.0)):
        weights[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, 6)
        weights[f"lora_unet_{name}.lora_up.weight"] = torch.randn(3, rank)
        weights[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    network = create_network_from_weights(weights)
    assert network.lora_unet_blocks_0_ffn_0.scale == 0.5 and network.lora_unet_blocks_1_self_attn_o.scale == 2
    saved = network.state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], value) for key, value in weights.items())


def test_a_network_starts_from_the_weights_and_alphas_of_a_file(recipe, caplog):
    model = build_dit(recipe.state_dict("dit_t2v"), heads=3)
    lora = recipe.state_dict("lora_t2v")
    network = create_network(model, dim=4, alpha=1, args={"exclude_patterns": "[r'.*ffn.*']"})
    load_weights(network, lora)
    assert "0 layers start from zero, 4 layers of the file are not used" in caplog.text
    assert all(torch.equal(value, lora[key]) for key, value in network.state_dict().items())
    assert network.lora_unet_blocks_0_self_attn_q.scale == 0.5
    with pytest.raises(UserError, match="has rank 4, the network rank 8. Add --dim_from_weights, or use --network_dim"):
        load_weights(create_network(model, dim=8), lora)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            {"rank_dropuot": "0.1"},
            "--network_args rank_dropuot: unknown network argument. Did you mean 'rank_dropout'?",
        ),
        ({"rank_dropout": "often"}, "--network_args rank_dropout=often: not a number."),
        ({"module_dropout": "1"}, "--network_args module_dropout=1: must be from 0 to below 1."),
        ({"exclude_patterns": "ffn"}, "--network_args exclude_patterns=ffn: not a list of regular expressions."),
        ({"include_patterns": "['(']"}, "--network_args include_patterns=['(']: not a regular expression (missing ),"),
        ({"loraplus_lr_ratio": "0"}, "--network_args loraplus_lr_ratio=0: must be greater than 0."),
    ],
)
def test_a_wrong_network_argument_is_named_in_one_line(args, line):
    with pytest.raises(UserError) as error:
        parse_network_args(args)
    assert str(error.value).startswith(line)


def test_excluding_every_layer_is_an_error(recipe):
    model = build_dit(recipe.state_dict("dit_t2v"), heads=3)
    with pytest.raises(UserError, match="all 20 layers are excluded. Patterns must match whole names such as blocks.0"):
        create_network(model, args={"exclude_patterns": "[r'.*']"})


def test_equal_signs_and_quotes_in_patterns_are_read_as_python():
    options = parse_network_args({"exclude_patterns": "[r'a=b', \"c'd\"]", "verbose": "True"})
    assert [pattern.pattern for pattern in options.exclude_patterns] == ["a=b", "c'd"] and options.verbose
