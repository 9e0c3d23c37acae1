"""LoHa and LoKr: branches and networks, held against dense formulas, files that others write, and the merged model."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from networks import loha, lokr, lora_wan
from networks.create import parse_network_args
from networks.formats import deltas, to_default, to_other
from networks.loha import LoHaBranch
from networks.lokr import LoKrBranch, smaller_part
from networks.lora import Branch, Dropouts
from tests.test_networks_lora import _block, _loss
from utils.errors import UserError
from wan.checkpointing import save_memory
from wan.loading import build_dit

NETWORKS = {"loha": loha, "lokr": lokr}


def dense(branch: Branch) -> Tensor:
    """Return what a branch adds to its layer's weight, by the formulas of the papers."""
    weights = dict(branch.named_parameters())
    alpha, rank = branch.alpha.item(), branch.rank
    if isinstance(branch, LoHaBranch):
        w1 = torch.einsum("or,ri->oi", weights["hada_w1_a"], weights["hada_w1_b"])
        w2 = torch.einsum("or,ri->oi", weights["hada_w2_a"], weights["hada_w2_b"])
        return alpha / rank * w1 * w2
    if "lokr_w2" in weights:
        return torch.kron(weights["lokr_w1"], weights["lokr_w2"])
    return alpha / rank * torch.kron(weights["lokr_w1"], weights["lokr_w2_a"] @ weights["lokr_w2_b"])


@torch.no_grad()
def randomized(module: nn.Module, std: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


BRANCHES = {
    "loha": lambda **more: LoHaBranch(12, 20, 3, 2.0, **more),
    "lokr": lambda **more: LoKrBranch(12, 20, 2, 3.0, **more),  # w1 [4 3], w2 [5 4] of rank 2
    "whole": lambda **more: LoKrBranch(12, 20, 3, 2.0, **more),
}


@pytest.fixture(params=BRANCHES)
def branch(request) -> Branch:
    return randomized(BRANCHES[request.param]())


def test_the_cases_are_of_low_rank_and_whole():
    assert not BRANCHES["lokr"]().whole and BRANCHES["whole"]().whole


@pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 3, 2)])
def test_a_branch_and_its_gradients_are_those_of_the_dense_matrix(branch, shape):
    branch.double()
    x = torch.randn(*shape, 12, dtype=torch.float64, requires_grad=True)
    want = -0.7 * x @ dense(branch).T
    got = branch(x, -0.7)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(want)
    inputs = [x, *branch.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, inputs, direction) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, *_: branch(x), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_branch_computes_in_the_inputs_dtype_with_float32_weights(branch, dtype):
    x = torch.randn(7, 12).to(dtype).requires_grad_()
    out = branch(x)
    out.float().square().sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert {parameter.grad.dtype for parameter in branch.parameters()} == {torch.float32}
    want = x.float() @ dense(branch).T
    assert (out.float() - want).norm() <= 0.02 * want.norm()


def test_a_branch_keeps_its_input_and_small_factors_alone_for_the_backward_pass(branch):
    x, kept = torch.randn(70, 12, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        branch(x)
    assert any(tensor is x for tensor in kept)
    assert max(tensor.numel() for tensor in kept if tensor is not x) <= 60  # not 20 x 12, nor 70 x 20


def test_norms_are_those_of_the_dense_matrix_and_shrinking_scales_it(branch):
    torch.testing.assert_close(branch.norm().float(), dense(branch).norm())
    before = dense(branch).clone()
    branch.shrink(0.3)
    torch.testing.assert_close(dense(branch), 0.3 * before)


def test_a_branch_is_compiled_whole(branch):
    x = torch.randn(7, 12, requires_grad=True)
    grads = []
    for run in (branch, torch.compile(branch, backend="aot_eager", fullgraph=True)):
        run(x).square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in branch.parameters())])
        x.grad = None
        branch.zero_grad()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------------------------------------- dropout
@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("dropouts", [Dropouts(neuron=0.25), Dropouts(rank=0.25)])
def test_dropout_keeps_the_mean_and_stops_outside_of_training(kind, dropouts):
    torch.manual_seed(0)
    branch = randomized(BRANCHES[kind](dropouts=dropouts))
    x = torch.randn(1, 12)
    want = x @ dense(branch).T
    with torch.no_grad():
        drawn = torch.stack([branch(x) for _ in range(3000)])
        assert not torch.equal(drawn[0], drawn[1])
        error = (drawn.mean(0) - want).norm() / want.norm()
        assert error < 5 * drawn.std(0).norm() / want.norm() / math.sqrt(3000)
        torch.testing.assert_close(branch.eval()(x), want)


def test_rank_dropout_of_a_loha_leaves_out_whole_ranks():
    torch.manual_seed(0)
    branch = randomized(LoHaBranch(12, 20, 3, 3.0, Dropouts(rank=0.5)))
    w1 = [branch.hada_w1_a[:, r : r + 1] @ branch.hada_w1_b[r : r + 1] for r in range(3)]
    w2 = branch.hada_w2_a @ branch.hada_w2_b
    x = torch.eye(12)
    for _ in range(5):
        got = branch(x).T
        possible = [2 * sum((w1[r] for r in range(3) if n >> r & 1), torch.zeros(20, 12)) * w2 for n in range(8)]
        assert any(torch.allclose(got, one, atol=1e-5) for one in possible)


# ------------------------------------------------------------------------------------------------------ shapes of LoKr
@pytest.mark.parametrize(
    ("size", "factor", "part"),
    [
        *((128, -1, 8), (512, -1, 16), (5120, -1, 64), (13824, -1, 108), (1536, -1, 32), (97, -1, 1), (36, -1, 6)),
        *((128, 4, 4), (128, 32, 4), (5120, 16, 16), (96, 7, 6), (96, 1, 1), (96, 1000, 8), (96, 96, 1)),
    ],
)
def test_dimensions_are_split_as_other_programs_split_them(size, factor, part):
    assert smaller_part(size, factor) == part


@pytest.mark.parametrize(("rank", "whole"), [(9, False), (10, True)])
def test_w2_is_of_low_rank_only_where_that_is_smaller_than_half_its_longer_side(rank, whole):
    branch = LoKrBranch(64, 320, rank, 5.0)  # w1 [16 8], w2 [20 8]
    assert branch.whole == whole and branch.scale == (1.0 if whole else 5 / rank)
    shapes = {"lokr_w1": (16, 8)}
    shapes |= {"lokr_w2": (20, 8)} if whole else {"lokr_w2_a": (20, rank), "lokr_w2_b": (rank, 8)}
    assert {name: tuple(parameter.shape) for name, parameter in branch.named_parameters()} == shapes


# ----------------------------------------------------------------------------------------------------------- networks
@pytest.fixture(params=["t2v", "i2v"])
def kind(request):
    return request.param


@pytest.fixture(params=NETWORKS)
def module(request) -> ModuleType:
    return NETWORKS[request.param]


def _dit(recipe, kind="t2v"):
    return build_dit(recipe.state_dict(f"dit_{kind}"), heads=3)


def trained(module: ModuleType, model: nn.Module, **more) -> nn.Module:
    return randomized(module.create_network(model, **{"dim": 3, "alpha": 2, **more}))


def test_a_new_network_changes_nothing_and_covers_the_layers_of_a_lora(recipe, module, kind):
    model, inputs = _dit(recipe, kind), recipe.cases(f"lora_{kind}")["forward"]["inputs"]
    network = module.create_network(model, 3, 2)
    assert network.names == lora_wan.create_network(model).names
    with torch.no_grad():
        before = _loss(model, inputs)[1]
        network.attach(model)
        torch.testing.assert_close(_loss(model, inputs)[1], before, rtol=0, atol=0)


def test_an_attached_network_equals_the_weights_merged_from_its_file(recipe, module, kind):
    weights, inputs = recipe.state_dict(f"dit_{kind}"), recipe.cases(f"lora_{kind}")["forward"]["inputs"]
    attached = build_dit(weights, heads=3)
    network = trained(module, attached)
    network.multiplier = 0.6
    network.attach(attached)
    plain = _loss(_dit(recipe, kind), inputs)[1]
    with torch.no_grad():
        want = _loss(attached, inputs)[1]
        assert (want - plain).norm() > 0.05 * plain.norm()
        for file in (network.state_dict(), to_other(network.state_dict()), to_default(to_other(network.state_dict()))):
            added = deltas([(file, 0.6, "file")])
            assert len(added) == len(network.names)
            merged = build_dit({**weights, **{key: weights[key] + delta() for key, delta in added.items()}}, heads=3)
            torch.testing.assert_close(_loss(merged, inputs)[1], want, atol=2e-5, rtol=1e-4)
    assert to_default(to_other(network.state_dict())).keys() == network.state_dict().keys()


def test_gradients_are_the_same_with_checkpointing_and_dropout(recipe, module):
    grads = []
    for checkpointing in (False, True):
        model = _dit(recipe)
        args = {"rank_dropout": "0.2", "module_dropout": "0.3"}
        network = trained(module, model, dropout=0.3, args=args)
        network.attach(model)
        save_memory(model, checkpointing)
        torch.manual_seed(5)
        _loss(model, recipe.cases("lora_t2v")["forward"]["inputs"])[0].backward()
        grads.append({key: p.grad for key, p in network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and 0 < len(grads[0]) < len(list(network.parameters()))
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-5, atol=1e-8)


def test_a_network_goes_on_from_a_file_with_its_shapes_and_alphas(recipe, module):
    model = _dit(recipe)
    saved = trained(module, model, dim=2, alpha=3, args={"factor": "4"} if module is lokr else None).state_dict()
    again = module.create_network_from_weights(to_other(saved), model)
    assert again.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in again.state_dict().items())
    for name, branch in again.branches():
        (delta,) = deltas(
            [({key: value for key, value in saved.items() if key.startswith(f"{name}.")}, 1, "")]
        ).values()
        torch.testing.assert_close(dense(branch), delta())
    with pytest.raises(UserError, match="has rank 2, the network rank 1. Add --dim_from_weights, or use --network_dim"):
        module.load_weights(module.create_network(model, 1), saved)
    same = module.create_network(model, 2, args={"factor": "4"} if module is lokr else None)
    module.load_weights(same, saved)
    assert all(torch.equal(value, saved[key]) for key, value in same.state_dict().items())


def test_other_factors_of_the_same_rank_are_named(recipe):
    model = _dit(recipe)
    saved = lokr.create_network(model, 2, args={"factor": "4"}).state_dict()
    with pytest.raises(UserError, match=r"is made of other factors: \{'lokr_w1': \(4, 4\).*Add --dim_from_weights"):
        lokr.load_weights(lokr.create_network(model, 2), saved)


@pytest.mark.parametrize(("there", "here"), [("loha", "lora_wan"), ("lokr", "loha"), ("lora_wan", "lokr")])
def test_a_file_of_another_kind_names_the_module_that_trains_it(recipe, there, here):
    modules = {**NETWORKS, "lora_wan": lora_wan}
    model = _dit(recipe)
    saved = modules[there].create_network(model).state_dict()
    for use in (
        lambda: modules[here].create_network_from_weights(saved, model),
        lambda: modules[here].load_weights(modules[here].create_network(model), saved),
    ):
        with pytest.raises(UserError, match=f"not a plain .* Use --network_module networks.{there}."):
            use()


def test_a_lokr_whose_w1_is_of_low_rank_can_be_merged_but_not_trained_on():
    name = "lora_unet_blocks_0_ffn_0"
    parts = {"w1_a": (2, 1), "w1_b": (1, 3), "w2": (4, 5)}
    file = {f"{name}.lokr_{part}": torch.randn(shape) for part, shape in parts.items()}
    assert len(deltas([(file, 1.0, "file")])) == 1
    with pytest.raises(UserError, match="it has blocks.0.ffn.0.lokr_w1_a. It can be merged .* but not trained on"):
        lokr.create_network_from_weights(file)


def test_loraplus_speeds_up_the_factors_that_start_at_zero(module):
    network = module.create_network(_block(nn.Linear(64, 64)), 2, args={"loraplus_lr_ratio": "4"})
    slow, fast = network.parameter_groups(0.1)
    assert (slow["lr"], fast["lr"]) == (0.1, 0.4)
    assert len(fast["params"]) == 1 and not fast["params"][0].any()
    assert all(parameter.any() for parameter in slow["params"])
    assert len(slow["params"]) + 1 == len(list(network.parameters()))


def test_factor_is_an_argument_of_lokr_alone():
    assert parse_network_args({"factor": "8"}, LoKrBranch).factor == 8
    for args, line in (({"factor": "0"}, "must be at least 1, or -1"), ({"factor": "half"}, "not a number")):
        with pytest.raises(UserError, match=line):
            parse_network_args(args, LoKrBranch)
    with pytest.raises(UserError, match="--network_args factor: unknown network argument"):
        parse_network_args({"factor": "8"}, LoHaBranch)
