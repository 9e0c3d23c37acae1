"""Blocks that keep less for the backward pass: the same bits as those that keep all, and how many bytes less."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from networks.lora_wan import create_network
from tests import tiny
from tests.test_wan_block_swap import Late, detach_branches, swapped_blocks
from tests.test_wan_model import distance, model_of, random_inputs, trained_gradients
from wan.checkpointing import Offload, Run, offloading, run_again_later, run_lean, save_memory
from wan.loading import build_dit
from wan.model import WanModel, call
from wan.recompute import saving
from wan.streaming import CpuDevice, CudaDevice

BLOCKS = 4
WAYS = {
    "lean": lambda: run_lean,
    "leaner": lambda: partial(run_lean, layers=True),
    "checkpointed": lambda: run_again_later,
    "attention kept": lambda: partial(run_again_later, keep_attention=True),
    "offloaded": lambda: partial(run_again_later, offload=Offload(Waiting)),
}


class Waiting(CpuDevice):
    """The slowest GPU: a copy is done when somebody waits for it or for a later one. Copies are in `log`, by size."""

    def __init__(self, log: list | None = None):
        self.log = [] if log is None else log
        self.homes: list[int] = []
        self.begun: list[tuple[Tensor, Tensor]] = []

    def home(self, size: int) -> Tensor:
        home = super().home(size)
        self.homes.append(home.data_ptr())
        return home

    def copy(self, slot: Tensor, home: Tensor) -> int:
        self.log.append(("back", self.homes.index(home.data_ptr()), home.nbytes))
        slot.fill_(255)
        self.begun.append((slot, home))
        return len(self.begun)

    def back(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for home, x in pairs:
            self.log.append(("away", self.homes.index(home.data_ptr()), home.nbytes))
            self.begun.append((home, x.clone()))

    def wait(self, copy: int) -> None:
        for to, of in self.begun[:copy]:
            to.copy_(of)
        self.begun[:copy] = [(torch.empty(0), torch.empty(0))] * copy


def same_bits(first: tuple[Tensor, list[Tensor]], second: tuple[Tensor, list[Tensor]]) -> bool:
    pairs = zip([first[0], *first[1]], [second[0], *second[1]], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------------------------------------------- the same bits
@pytest.mark.parametrize("way", WAYS)
def test_a_loras_gradients_are_the_same_bits(way):
    for kind, dtype, residual, batch in (
        ("dit_t2v", torch.float32, torch.float32, 2),
        ("dit_i2v", torch.float32, torch.float32, 1),
        ("dit_t2v", torch.bfloat16, torch.float32, 2),
        ("dit_i2v", torch.bfloat16, torch.bfloat16, 1),
    ):
        results = []
        for run in (call, WAYS[way]()):
            model = model_of(kind, dtype)
            model.run_block, model.residual_dtype = run, residual
            results.append(trained_gradients(model, random_inputs(model, batch=batch)))
        assert all(gradient.abs().max() > 0 for gradient in results[0][1])
        assert same_bits(*results), (kind, dtype, residual)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradients_of_all_weights_are_the_same_bits(way):
    results = []
    for run in (call, WAYS[way]()):
        model = model_of("dit_i2v").requires_grad_(True)
        model.run_block = run
        loss = model(**random_inputs(model, batch=2)).square().mean()
        loss.backward()
        results.append((loss, [parameter.grad for parameter in model.parameters()]))
    assert same_bits(*results)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_lora_drops_at_random_is_dropped_again(way):
    results = []
    for run in (call, WAYS[way]()):
        model = model_of("dit_t2v")
        torch.manual_seed(2)
        network = create_network(model, 4, 4, 0.3, args={"rank_dropout": "0.2", "module_dropout": "0.3"}).train()
        for _, branch in network.branches():
            torch.nn.init.normal_(branch.lora_up.weight)
        network.attach(model)
        model.run_block = run
        loss = model(**random_inputs(model)).square().mean()
        after = torch.rand(1)
        loss.backward()
        gradients = [torch.zeros(1) if p.grad is None else p.grad for p in network.parameters()]
        results.append((loss, [*gradients, after, torch.rand(1)]))  # the random numbers of others are not disturbed
    assert same_bits(*results)


@pytest.mark.parametrize("way", ["leaner", "attention kept", "offloaded"])
def test_it_goes_with_swapped_blocks(way):
    results = []
    for run, swapped in ((call, 0), (WAYS[way](), 3)):
        model = model_of("dit_t2v", blocks=BLOCKS)
        model.run_block = run
        if swapped:
            ring = swapped_blocks(model, swapped, 1, Late())
        results.append(trained_gradients(model, random_inputs(model, batch=2)))
    assert same_bits(*results) and ring.loads == 1 + 2 * (swapped - 1)


@pytest.mark.parametrize("way", WAYS)
def test_several_passes_may_wait_for_one_backward_pass_and_it_may_come_twice(way):
    results = []
    for run in (call, WAYS[way]()):
        model = model_of("dit_t2v")
        model.run_block = run
        xs = [random_inputs(model, seed=seed)["x"].requires_grad_() for seed in range(2)]
        loss = sum(model(**{**random_inputs(model), "x": x}).square().mean() for x in xs)
        if way != "attention kept":  # what torch keeps for that is there once
            loss.backward(retain_graph=True)
        loss.backward()
        results.append((loss, [x.grad / x.grad.abs().max() for x in xs]))
    assert same_bits(*results)


# -------------------------------------------------------------------------------------------------------- how little
def kept_units(run, ffn: int, dtype: torch.dtype, residual: torch.dtype = torch.float32) -> float:
    """Return what a block of a LoRA's training keeps, in activations [S D] of the dtype, S being large.

    The difference that a third block makes; all storages of that size and more that are alive when the loss is there:
    not the keys and values of 512 rows of text, nor one number a token, nor low-rank activations, nor weights.
    """
    dim, grid, totals = 128, (2, 32, 48), []
    tokens = grid[0] * grid[1] * grid[2] // 4
    for blocks in (2, 3):
        weights = tiny.state_dict("dit_t2v", dim=dim, ffn=ffn, blocks=blocks)
        model = build_dit({name: tensor.to(dtype) for name, tensor in weights.items()}, 2, dtype)
        model.residual_dtype = residual
        if run:
            run(model)
        network = create_network(model, 4, 4, None)
        network.attach(model)
        alive: dict[int, tuple[StorageWeakRef, int]] = {}

        def watch(tensor: Tensor, alive=alive) -> None:
            storage = tensor.untyped_storage()
            alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

        with saving(watch):
            loss = model(**random_inputs(model, grid=grid, rows=(9,)))
        sizes = [size for storage, size in alive.values() if not storage.expired()]
        totals.append(sum(size for size in sizes if size >= tokens * dim * dtype.itemsize))
        del loss
    return (totals[1] - totals[0]) / (tokens * dim * dtype.itemsize)


LEAN = partial(save_memory, checkpointing=False)


@pytest.mark.parametrize(("ffn", "name"), [(346, "14B"), (746, "1.3B")])
def test_a_block_keeps_at_most_13_activations_instead_of_28(ffn, name):
    assert kept_units(None, ffn, torch.bfloat16) > 26
    # x (two for float32), q, k, v and what attention makes of them; cross-attention's result; ffn/dim of the MLP. 14B:
    # also the outputs of o, and q and o of cross-attention.
    assert kept_units(LEAN, ffn, torch.bfloat16) == pytest.approx((10 if name == "14B" else 7) + ffn / 128, abs=0.01)
    assert kept_units(LEAN, ffn, torch.bfloat16) <= 13
    assert kept_units(LEAN, ffn, torch.bfloat16, torch.bfloat16) <= 12
    assert kept_units(LEAN, ffn, torch.float32) <= 12


def test_a_checkpointed_block_keeps_its_input_or_nothing():
    checkpointed = partial(save_memory, checkpointing=True)
    assert kept_units(checkpointed, 346, torch.bfloat16) == 0  # not seen by autograd's hooks: held beside them
    model = model_of("dit_t2v", blocks=BLOCKS)
    offload = Offload(CpuDevice)
    save_memory(model, True, offload)
    given = random_inputs(model)
    tokens: list[weakref.ref] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: tokens.append(weakref.ref(args[0])))
    loss = model(**{**given, "x": given["x"].requires_grad_()}).sum()
    assert [bool(x()) for x in tokens] == [False] * BLOCKS and offload.bytes_away == BLOCKS * model.token_bytes(
        given["x"]
    )
    del loss


def test_a_checkpointed_block_in_its_turn_keeps_what_a_lean_one_does(monkeypatch):
    model, sizes = model_of("dit_t2v", dim=192, ffn=192), []
    save_memory(model, checkpointing=True)
    create_network(model, 4, 4, None).attach(model)
    run_again = Run._run_again

    def measured(self: Run) -> None:
        run_again(self)
        storages = {tensor.untyped_storage()._cdata: tensor for tensor in self.saved.values() if tensor.ndim > 2}
        sizes.append(sum(tensor.nbytes for tensor in storages.values()) / (192 * 192 * 4))

    monkeypatch.setattr(Run, "_run_again", measured)
    model(**random_inputs(model, grid=(3, 16, 16), rows=(3,))).sum().backward()
    assert len(sizes) == 2 and 9 < sizes[0] == sizes[1] < 12  # x, 8 of attention, 1 of the MLP; text


@pytest.mark.parametrize("way", WAYS)
def test_what_is_kept_goes_with_the_loss_or_the_backward_pass(way):
    model, seen = model_of("dit_t2v"), []
    model.run_block = WAYS[way]()
    for name in ("self_attn.v", "ffn.0"):
        layer = model.blocks[1].get_submodule(name)
        layer.register_forward_hook(lambda layer, args, out: seen.append(weakref.ref(out)))
    given = random_inputs(model)
    given["x"].requires_grad_()
    gc.disable()  # without waiting for it
    loss = model(**given).sum()
    del loss
    assert not any(tensor() for tensor in seen)
    loss = model(**given).sum()
    loss.backward()
    assert len(seen) >= 4 and not any(tensor() for tensor in seen)
    gc.enable()


# ---------------------------------------------------------------------------------------------------- what runs again
class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(part in name and "backward" not in name for name in self.names)


def backward_operators(way: str) -> Operators:
    model = model_of("dit_t2v", blocks=1)
    model.run_block = WAYS[way]()
    given = random_inputs(model)
    loss = model(**{**given, "x": given["x"].requires_grad_()}).sum()
    with Operators() as seen:
        loss.backward()
    return seen


def test_attention_runs_again_only_where_it_is_not_kept():
    attentions = {way: backward_operators(way).count("attention") for way in WAYS}
    assert attentions == {"lean": 0, "leaner": 0, "checkpointed": 2, "attention kept": 1, "offloaded": 2}


def test_large_products_run_again_only_where_they_are_not_kept():
    products = {way: backward_operators(way).count("addmm") for way in WAYS}
    # Of the 10 layers of a block, cross-attention's k and v see no tokens here; the MLP's last product is not needed.
    assert products == {"lean": 0, "leaner": 3, "checkpointed": 9, "attention kept": 9, "offloaded": 9}


def test_without_gradients_blocks_just_run():
    model, plain = model_of("dit_t2v"), model_of("dit_t2v")
    offload = Offload(CpuDevice)
    given = random_inputs(model)
    for run in (run_lean, partial(run_again_later, offload=offload)):
        model.run_block = run
        with torch.inference_mode():
            assert torch.equal(model(**given), plain(**given))
    assert offload.bytes_away == 0


# -------------------------------------------------------------------------------------------------------- offloading
def train_offloaded(model: WanModel, **sizes) -> None:
    given = random_inputs(model, **sizes)
    model(**{**given, "x": given["x"].requires_grad_()}).sum().backward()


def test_inputs_leave_in_order_and_come_back_one_ahead_of_the_backward_pass():
    model, log = model_of("dit_t2v", blocks=BLOCKS), []
    offload = Offload(partial(Waiting, log))
    save_memory(model, True, offload)
    for block, number in zip(model.blocks, range(BLOCKS), strict=True):
        block.register_forward_pre_hook(lambda *_, number=number: log.append(("run", number)))
    size = model.token_bytes(random_inputs(model)["x"])
    train_offloaded(model)
    events = [event[:2] for event in log]
    assert events[: 2 * BLOCKS] == [(what, i) for i in range(BLOCKS) for what in ("away", "run")]
    back = [("back", 3), ("back", 2), ("run", 3), ("back", 1), ("run", 2), ("back", 0), ("run", 1), ("run", 0)]
    assert events[2 * BLOCKS :] == back
    assert offload.bytes_away == offload.bytes_back == BLOCKS * size


def test_places_in_main_memory_are_used_again_and_grow_with_the_largest_video():
    model, devices = model_of("dit_t2v", blocks=BLOCKS), []
    save_memory(model, True, Offload(lambda: devices.append(Waiting()) or devices[-1]))
    for grid in ((3, 6, 8), (3, 6, 8), (1, 6, 8)):
        train_offloaded(model, grid=grid)
        given = random_inputs(model, grid=grid)
        model(**{**given, "x": given["x"].requires_grad_()})  # the backward pass never comes
    assert [len(device.homes) for device in devices] == [BLOCKS]
    train_offloaded(model, grid=(4, 6, 8))
    assert [len(device.homes) for device in devices] == [BLOCKS, BLOCKS]


def test_on_a_cpu_offloading_works_and_says_that_it_saves_nothing(caplog):
    model = model_of("dit_t2v")
    save_memory(model, True, offloading(torch.device("cpu")))
    train_offloaded(model)
    assert "--gradient_checkpointing_cpu_offload: saves nothing on a CPU" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["lean", "leaner", "checkpointed", "attention kept", "offloaded"])
@pytest.mark.parametrize("swapped", [0, 3])
def test_on_a_gpu_gradients_are_the_same(way, swapped):
    device, results = torch.device("cuda"), []
    given = random_inputs(model_of("dit_t2v"), batch=2)
    given["x"] = given["x"].to(device)
    offloaded = partial(run_again_later, offload=offloading(device))
    for run in (call, offloaded if way == "offloaded" else WAYS[way]()):
        model = model_of("dit_t2v", torch.bfloat16, blocks=BLOCKS).to(device)
        model.run_block = run
        if swapped:
            swapped_blocks(model, swapped, 1, CudaDevice(device, pinned=True))
        for _ in range(2):
            results.append(trained_gradients(model, given))
            detach_branches(model)
    for _, got in results[1:]:
        for want, gradient in zip(results[0][1], got, strict=True):
            assert distance(gradient, want) < 1e-2
