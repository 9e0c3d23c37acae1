"""The low-rank branch and networks of it, held against recorded results and the dense formula."""

import itertools

import pytest
import torch
from torch import nn

from networks.formats import deltas
from networks.lora import Dropouts, LoRABranch, LoRANetwork, linear_layers, lora_name
from networks.lora_wan import create_network, create_network_from_weights
from utils.errors import UserError
from wan.checkpointing import save_memory
from wan.loading import build_dit


@pytest.fixture(params=["t2v", "i2v"])
def kind(request):
    return request.param


def _dit(recipe, kind):
    return build_dit(recipe.state_dict(f"dit_{kind}"), heads=3)


def _loss(model, inputs, noise=None, timestep=None):
    noise = inputs["noise"] if noise is None else noise
    timestep = inputs["t"] if timestep is None else timestep
    t = timestep.view(-1, 1, 1, 1, 1) / 1000
    noisy = (1 - t) * inputs["latents"] + t * noise
    out = model(noisy, timestep, inputs["context"], y=inputs.get("y"), image_features=inputs.get("clip_fea"))
    return nn.functional.mse_loss(out, noise - inputs["latents"]), out


def _relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("case", "multiplier"), [("forward", 1.0), ("forward_multiplier", -0.7)])
def test_an_attached_lora_gives_the_recorded_velocity(recipe, kind, case, multiplier):
    model, cases = _dit(recipe, kind), recipe.cases(f"lora_{kind}")
    create_network_from_weights(recipe.state_dict(f"lora_{kind}"), model, multiplier).attach(model)
    with torch.no_grad():
        _, out = _loss(model, cases["forward"]["inputs"])
    assert _relative(out, cases[case]["outputs"]["pred"]) <= 2e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_recorded_ones_with_and_without_checkpointing(recipe, kind, checkpointing):
    model, cases = _dit(recipe, kind), recipe.cases(f"lora_{kind}")
    network = create_network_from_weights(recipe.state_dict(f"lora_{kind}"), model)
    network.attach(model)
    save_memory(model, checkpointing)
    _loss(model, cases["forward"]["inputs"])[0].backward()
    want = {key[5:]: value for key, value in cases["gradients"]["outputs"].items() if key.startswith("grad/")}
    got = dict(network.named_parameters())
    assert sorted(got) == sorted(want)
    assert max(_relative(got[key].grad, value) for key, value in want.items()) <= 1e-4
    assert all(parameter.grad is None for parameter in model.parameters())


def test_four_adamw_steps_give_the_recorded_weights(recipe):
    model, cases = _dit(recipe, "t2v"), recipe.cases("lora_t2v")
    network = create_network_from_weights(recipe.state_dict("lora_t2v"), model)
    network.attach(model)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    losses = []
    for step in range(4):
        noise = recipe.tensor(
            {"kind": "gaussian", "name": f"lora_t2v/noise.step{step}", "shape": [2, 16, 2, 6, 8], "seed": 101}
        )
        timestep = torch.tensor([100.0 + 200 * step, 950.0 - 180 * step])
        loss, _ = _loss(model, cases["forward"]["inputs"], noise, timestep)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    outputs = cases["adamw_4_steps"]["outputs"]
    assert _relative(torch.tensor(losses), outputs["losses"]) <= 1e-4
    weights = network.state_dict()
    for key in [key for key in outputs if key.startswith("weight/")]:
        assert _relative(weights[key[7:]], outputs[key]) <= 1e-3


def test_an_attached_lora_equals_the_merged_weights(recipe, kind):
    lora, weights = recipe.state_dict(f"lora_{kind}"), recipe.state_dict(f"dit_{kind}")
    attached = build_dit(weights, heads=3)
    create_network_from_weights(lora, attached, 0.6).attach(attached)
    merged = build_dit(
        {**weights, **{key: weights[key] + delta() for key, delta in deltas([(lora, 0.6, "lora")]).items()}}, heads=3
    )
    inputs = recipe.cases(f"lora_{kind}")["forward"]["inputs"]
    with torch.no_grad():
        torch.testing.assert_close(_loss(attached, inputs)[1], _loss(merged, inputs)[1], atol=2e-5, rtol=1e-4)


def test_a_new_network_changes_nothing_and_detaching_restores_the_model(recipe):
    model, inputs = _dit(recipe, "t2v"), recipe.cases("lora_t2v")["forward"]["inputs"]
    with torch.no_grad():
        before = _loss(model, inputs)[1]
        network = create_network(model, dim=2, alpha=1)
        network.attach(model)
        torch.testing.assert_close(_loss(model, inputs)[1], before, rtol=0, atol=0)
        nn.init.normal_(network.lora_unet_blocks_0_ffn_2.lora_up.weight)
        assert not torch.equal(_loss(model, inputs)[1], before)
        network.detach()
        assert torch.equal(_loss(model, inputs)[1], before)
    assert not any("forward" in vars(layer) for layer in linear_layers(model).values())


def test_a_forward_set_on_the_layer_itself_is_wrapped_and_restored():
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: torch.ones(*x.shape[:-1], 3)
    own = layer.forward
    model = _block(layer)
    network = create_network(model, dim=2, alpha=2)
    nn.init.ones_(network.lora_unet_blocks_0_self_attn_q.lora_up.weight)
    network.attach(model)
    x = torch.randn(2, 4)
    branch = network.lora_unet_blocks_0_self_attn_q
    torch.testing.assert_close(layer(x), 1 + x @ branch.lora_down.weight.T @ branch.lora_up.weight.T)
    network.detach()
    assert layer.forward is own


def test_networks_beside_a_model_are_detached_in_any_order(recipe):
    model, inputs = _dit(recipe, "t2v"), recipe.cases("lora_t2v")["forward"]["inputs"]
    networks = [create_network(model, dim=2, alpha=2) for _ in range(3)]
    for parameter in (parameter for network in networks for parameter in network.parameters()):
        nn.init.normal_(parameter, std=0.05)

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            return _loss(model, inputs)[1]

    alone = {}
    for count in range(4):
        for chosen in itertools.combinations(networks, count):
            for network in chosen:
                network.attach(model)
            alone[chosen] = velocity()
            for network in chosen:
                network.detach()
    for order in itertools.permutations(networks):
        for network in networks:
            network.attach(model)
        for done, network in enumerate(order, 1):
            network.detach()
            left = tuple(other for other in networks if other not in order[:done])
            assert torch.equal(velocity(), alone[left])
        assert not any({"forward", "adapted"} & vars(layer).keys() for layer in linear_layers(model).values())


def _block(layer):
    """A model whose only transformer block holds one linear layer."""
    block = type("WanAttentionBlock", (nn.Module,), {})()
    block.self_attn = nn.Module()
    block.self_attn.q = layer
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_branch_computes_in_the_inputs_dtype_with_float32_weights(dtype):
    branch = LoRABranch(6, 5, rank=2, alpha=3)
    nn.init.normal_(branch.lora_up.weight)
    x = torch.randn(4, 6).to(dtype)
    out = branch(x)
    assert out.dtype == dtype and branch.lora_up.weight.dtype == torch.float32
    dense = x.float() @ branch.lora_down.weight.T @ branch.lora_up.weight.T * 1.5
    torch.testing.assert_close(out.float(), dense, rtol=0.05, atol=0.05 if dtype != torch.float32 else 1e-6)


def test_rank_dropout_drops_whole_ranks_per_sample_and_keeps_the_mean():
    torch.manual_seed(0)
    branch = LoRABranch(8, 8, rank=8, alpha=8, dropouts=Dropouts(rank=0.25))
    nn.init.eye_(branch.lora_down.weight)
    nn.init.eye_(branch.lora_up.weight)
    out = branch(torch.ones(2000, 3, 8))
    assert torch.equal(out[:, 0], out[:, 2])
    assert out.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(branch.eval()(torch.ones(2, 3, 8)), torch.ones(2, 3, 8))


def test_module_dropout_leaves_the_branch_out_at_its_probability():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    network = create_network(_block(layer), dim=1, alpha=1, args={"module_dropout": "0.3"})
    nn.init.ones_(network.lora_unet_blocks_0_self_attn_q.lora_up.weight)
    network.attach(_block(layer))
    x = torch.ones(1, 4)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    skipped = sum(torch.equal(layer(x), plain) for _ in range(1000))
    assert 250 < skipped < 350
    network.eval()
    assert not torch.equal(layer(x), plain)


def test_dropout_is_the_same_in_the_pass_that_checkpointing_repeats(recipe):
    grads = []
    for checkpointing in (False, True):
        model = _dit(recipe, "t2v")
        network = create_network_from_weights(
            recipe.state_dict("lora_t2v"), model, dropout=0.3, args={"rank_dropout": "0.2", "module_dropout": "0.3"}
        )
        network.attach(model)
        save_memory(model, checkpointing)
        torch.manual_seed(5)
        _loss(model, recipe.cases("lora_t2v")["forward"]["inputs"])[0].backward()
        grads.append({key: p.grad for key, p in network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) < 40
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad)


def test_scale_norms_shrinks_only_what_is_too_long():
    short, long = LoRABranch(6, 5, 2, 1), LoRABranch(6, 5, 2, 1)
    for branch, size in ((short, 0.1), (long, 3.0)):
        nn.init.normal_(branch.lora_up.weight, std=size)
    network = LoRANetwork({"lora_unet_a": short, "lora_unet_b": long})

    def product(branch):
        return branch.lora_up.weight @ branch.lora_down.weight * branch.scale

    torch.testing.assert_close(long.norm().float(), product(long).norm())
    kept = product(short).clone()
    direction = product(long) / product(long).norm()
    scaled, mean, largest = network.scale_norms(product(short).norm().item() * 1.5)
    assert scaled == 1 and largest == pytest.approx(product(long).norm().item(), rel=1e-5)
    assert mean == pytest.approx((product(long).norm() + product(short).norm()).item() / 2, rel=1e-5)
    torch.testing.assert_close(product(short), kept)
    torch.testing.assert_close(product(long), direction * product(short).norm() * 1.5)


def test_loraplus_gives_lora_up_its_own_learning_rate():
    network = create_network(_block(nn.Linear(4, 4)), args={"loraplus_lr_ratio": "4"})
    down, up = network.parameter_groups(0.1)
    assert (down["lr"], up["lr"], up["name"]) == (0.1, 0.4, "unet plus")
    assert up["params"] == [network.lora_unet_blocks_0_self_attn_q.lora_up.weight]
    assert [group["name"] for group in create_network(_block(nn.Linear(4, 4))).parameter_groups(0.1)] == ["unet"]


def test_a_lora_for_another_model_is_refused_in_one_line(recipe):
    model = _dit(recipe, "t2v")
    with pytest.raises(UserError, match=r"LoRA for another model: 4 of its 24 layers .*k_img.* Use the LoRA"):
        create_network_from_weights(recipe.state_dict("lora_i2v")).attach(model)
    wider = {key: torch.cat([value] * 2, -1) if "down" in key else value for key, value in _self_attn(recipe).items()}
    with pytest.raises(UserError, match="maps 192 to 96 channels, the model's layer 96 to 96"):
        create_network_from_weights(wider, model)


def _self_attn(recipe):
    return {key: value for key, value in recipe.state_dict("lora_t2v").items() if "self_attn_q" in key}


def test_names_are_the_dotted_path_with_underscores():
    assert lora_name("blocks.3.cross_attn.k_img") == "lora_unet_blocks_3_cross_attn_k_img"
