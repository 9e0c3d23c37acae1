"""Block swap of weights in training, on doubles of the device: the same bits as without it, and what travels when."""

import gc
import weakref
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import tiny
from tests.test_wan_model import random_inputs
from wan.block_exchange import exchange_blocks
from wan.block_swap import packed_bytes, streamed_blocks
from wan.checkpointing import save_memory
from wan.loading import build_dit
from wan.model import WanModel
from wan.streaming import CpuDevice, CudaDevice

BLOCKS = 4
EVERY_WAY = [(swapped, slots) for swapped in range(1, BLOCKS + 1) for slots in range(1, swapped + 1)]
# Fused or not, batches in a step, with gradient checkpointing or not.
HOW = [(True, 1, False), (True, 1, True), (False, 1, False), (False, 2, True)]


class LateBothWays(CpuDevice):
    """The slowest GPU, and what it has been asked for.

    What is being copied is not a number until somebody waits for it, or for a later copy. In main memory it is not
    until everything has settled, although copies that come later find it there.
    """

    def __init__(self):
        self.bytes_on_device = self.bytes_copied = self.bytes_returned = 0
        self.homes: dict[int, Tensor] = {}  # by address
        self.arrived: dict[int, Tensor] = {}  # what copies find there, where that is newer
        self.begun: list[tuple[Tensor, Tensor]] = []
        self.done = 0

    def home(self, size: int) -> Tensor:
        home = super().home(size).fill_(255)
        self.homes[home.data_ptr()] = home
        return home

    def slot(self, size: int) -> Tensor:
        self.bytes_on_device += size
        return super().slot(size).fill_(255)

    def copy(self, slot: Tensor, home: Tensor) -> int:
        # What is to leave the slot is read before others arrive there, but not sooner than it has to be.
        for i, (there, here) in enumerate(self.begun[self.done :], self.done):
            if here.untyped_storage().data_ptr() == slot.data_ptr():
                self.begun[i] = there, here.clone()
        self.bytes_copied += home.nbytes
        self.begun.append((slot.fill_(255), self.arrived.get(home.data_ptr(), home)))
        return len(self.begun)

    def back(self, pairs) -> None:
        for home, tensor in pairs:
            self.bytes_returned += home.nbytes
            address = home.untyped_storage().data_ptr()
            if address not in self.arrived:
                self.arrived[address] = torch.empty_like(self.homes[address]).copy_(self.homes[address])
            start = home.data_ptr() - address
            place = self.arrived[address][start : start + home.nbytes]
            self.begun.append((place.view(home.dtype).view(home.shape), tensor))
            home.view(torch.uint8).fill_(255)  # NaN in all formats

    def wait(self, copy: int) -> None:
        for there, here in self.begun[self.done : copy]:
            there.copy_(here)
        self.done = max(self.done, copy)

    def settle(self) -> None:
        self.wait(len(self.begun))
        for address, values in self.arrived.items():
            self.homes[address].copy_(values)
        self.arrived = {}


class Apart(TorchDispatchMode):
    """Fails where anything but a copy between them would meet main memory: as a GPU would."""

    def __init__(self, device: LateBothWays):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in (
            "aten::detach",
            "aten::empty_like",
            "aten::copy_",
            "aten::fill_",
        ):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            met = self.device.homes.keys() & {tensor.untyped_storage().data_ptr() for tensor in tensors}
            assert not met, f"{func} of what is in main memory"
        return out


class Run:
    """The training of a small DiT by an optimizer, like modules/trainer.py but for its data and options."""

    def __init__(
        self, fused: bool, checkpointing: bool = False, dtype=torch.float32, make=torch.optim.AdamW, device="cpu"
    ):
        self.model = build_dit(weights(), heads=3, dtype=dtype).to(device)
        save_memory(self.model, checkpointing)
        self.fused, self.make = fused, make
        self.exchange = self.device = None

    def swap(self, swapped: int, slots: int, device: CpuDevice | None = None) -> "Run":
        self.device = device or LateBothWays()
        numbers = streamed_blocks(BLOCKS, swapped)
        self.exchange = exchange_blocks(self.model, numbers, slots, self.device, self.fused)
        return self

    def start(self) -> "Run":
        self.parameters = list(self.model.requires_grad_(True).parameters())
        self.optimizer = self.make(self.parameters, lr=1e-2)
        self.swapped = [p for block in self.exchange.parameters for p in block] if self.exchange else []
        for parameter in self.parameters if self.fused else self.swapped:
            parameter.register_post_accumulate_grad_hook(self.gradient)
        return self

    def gradient(self, parameter: nn.Parameter) -> None:
        if self.fused:
            self.update([parameter])
        else:
            self.exchange.stow(parameter)

    def update(self, parameters: list[nn.Parameter]) -> None:
        if self.exchange:
            self.exchange.update(parameters, self.optimizer.state, lambda _: self.optimizer.step())
        else:
            self.optimizer.step()
            for parameter in parameters:
                parameter.grad = None

    def backward(self, batches: int = 1) -> None:
        for number in range(batches):
            self.model(**inputs(self.model, number)).square().mean().backward()

    def step(self, batches: int = 1) -> None:
        self.backward(batches)
        if not self.fused:
            self.update(self.parameters)

    def weights(self) -> list[Tensor]:
        if self.exchange:
            self.exchange.settle()
        return [parameter.detach().clone() for parameter in self.parameters]

    def traffic(self) -> tuple[int, int]:
        """Return the bytes that went to the device and back so far, as the device counted them."""
        counted = self.device.bytes_copied, self.device.bytes_returned
        assert counted == (self.exchange.bytes_copied, self.exchange.bytes_returned)
        return counted

    def state_bytes(self) -> int:
        """Return what the optimizer's states of a block take."""
        states = [self.optimizer.state[parameter] for parameter in self.exchange.parameters[0]]
        return packed_bytes(value for state in states for value in state.values() if value.ndim)


@cache
def weights() -> dict[str, Tensor]:
    return tiny.state_dict("dit_t2v", blocks=BLOCKS)


def inputs(model: WanModel, seed: int = 0) -> dict:
    given = random_inputs(model, batch=2, grid=(1, 4, 6), rows=(3, 5), seed=seed)
    return {**given, "x": given["x"].to(model.device)}


def equal(run: Run, other: Run) -> bool:
    return all(torch.equal(a, b) for a, b in zip(run.weights(), other.weights(), strict=True))


# ---------------------------------------------------------------------------------------------------- the same bits
@pytest.mark.parametrize(("fused", "batches", "checkpointing"), HOW)
def test_weights_are_the_same_bits_however_many_blocks_are_swapped(fused, batches, checkpointing):
    plain = Run(fused, checkpointing).start()
    for _ in range(2):
        plain.step(batches)
    for swapped, slots in EVERY_WAY:
        run = Run(fused, checkpointing).swap(swapped, slots).start()
        for _ in range(2):
            run.step(batches)
        assert equal(run, plain), (swapped, slots)
        assert all(parameter.grad is None for parameter in run.parameters)


@pytest.mark.parametrize(("fused", "batches", "checkpointing"), HOW)
def test_nothing_but_copies_meets_main_memory(fused, batches, checkpointing):
    run = Run(fused, checkpointing).swap(3, 2).start()
    with Apart(run.device):
        for _ in range(2):
            run.step(batches)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "AdamW8bit"])
def test_whatever_an_optimizer_remembers_travels_with_its_block(name, fused):
    # Adagrad makes its states before the first step, SGD has none, AdamW8bit has some of which all weights share.
    kind = getattr(torch.optim, name, None) or getattr(pytest.importorskip("bitsandbytes").optim, name)
    plain, run = Run(fused, make=kind).start(), Run(fused, make=kind).swap(3, 1).start()
    for each in (plain, run):
        for _ in range(3):
            each.step()
    assert equal(run, plain)


def test_pictures_between_steps_and_steps_without_a_backward_pass_disturb_nothing():
    for fused in (True, False):
        plain, run = Run(fused).start(), Run(fused).swap(3, 2).start()
        for _ in range(2):
            plain.step()
            run.step()
            given = inputs(plain.model, seed=7)
            with torch.inference_mode():
                x, timestep = given["x"], given["timestep"]
                passes = [{"text": given["text"]}, {"text": given["text"][::-1]}]
                want, got = (each.model.velocities(x, timestep, passes) for each in (plain, run))
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
                assert torch.equal(run.model(**given, skip_blocks=(1,)), plain.model(**given, skip_blocks=(1,)))
            run.model(**given)  # its backward pass never comes
        assert equal(run, plain)
        assert not any(home.is_inference() for home in run.device.homes.values())


@pytest.mark.parametrize("fused", [False, True])
def test_weights_and_gradients_can_be_read_at_every_moment_once_copies_are_done(fused):
    plain, run = Run(fused).start(), Run(fused).swap(4, 1).start()
    for _ in range(2):
        for each in (plain, run):
            each.backward(2 - fused)
        run.exchange.settle()
        for one, other in zip(plain.parameters, run.parameters, strict=True):
            assert torch.equal(one, other)
            assert other.grad is None if fused else torch.equal(one.grad, other.grad)
        if not fused:
            for each in (plain, run):
                each.update(each.parameters)
            assert equal(run, plain)
    assert list(run.model.state_dict()) == list(plain.model.state_dict())


# ------------------------------------------------------------------------------------------------------ what travels
def steady_traffic(run: Run, batches: int = 1) -> tuple[int, int]:
    """Return the bytes that a step copies to the device and back once states have a home."""
    for _ in range(2):
        run.step(batches)
    before = run.traffic()
    run.step(batches)
    return tuple(after - earlier for after, earlier in zip(run.traffic(), before, strict=True))


@pytest.mark.parametrize(
    ("swapped", "slots", "checkpointing"), [*((*way, False) for way in EVERY_WAY), (3, 1, True), (4, 2, True)]
)
def test_a_fused_step_takes_weights_there_twice_and_back_once_and_states_once(swapped, slots, checkpointing):
    run = Run(True, checkpointing).swap(swapped, slots).start()
    there, back = steady_traffic(run)
    block, states = run.exchange.block_bytes, run.state_bytes()
    turned = swapped - slots  # blocks that a pass does not find where the last one has ended
    leaving = min(swapped, 2 * turned)
    assert there == 2 * turned * block + leaving * states
    assert back == leaving * (block + states)
    assert run.device.bytes_on_device <= slots * (block + states)


@pytest.mark.parametrize(("swapped", "slots"), EVERY_WAY)
def test_a_step_that_is_not_fused_takes_gradients_away_and_to_the_update(swapped, slots):
    run = Run(False).swap(swapped, slots).start()
    there, back = steady_traffic(run)
    block, states = run.exchange.block_bytes, run.state_bytes()
    turned = swapped - slots
    leaving = min(swapped, 2 * turned)
    assert there == (leaving + 2 * turned) * block + turned * block + leaving * states
    assert back == leaving * (block + states) + turned * block
    assert run.device.bytes_on_device <= slots * (2 * block + states)


def test_each_further_batch_takes_weights_there_twice_and_gradients_both_ways():
    (there, back), (more_there, more_back) = (
        steady_traffic(Run(False).swap(4, 1).start(), batches) for batches in (1, 2)
    )
    block = Run(False).swap(4, 1).exchange.block_bytes
    # Weights forward and backward but for the last and the first block, which stay; the sums of all four gradients.
    assert more_there - there == (3 + 3 + 4) * block and more_back - back == 4 * block


def bytes_on_device(run: Run) -> int:
    """Return what weights, gradients, states and slots take outside of main memory."""
    kept = [(p.data, p.grad, *run.optimizer.state.get(p, {}).values()) for p in run.parameters]
    tensors = [value for values in kept for value in values if isinstance(value, Tensor) and value.ndim]
    rooms = [room.data for slot in run.exchange._slots for room in slot.rooms.values()]
    storages = [tensor.untyped_storage() for tensor in (*tensors, *rooms)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if address not in run.device.homes)


@pytest.mark.parametrize(("swapped", "slots"), [(4, 1), (4, 2), (3, 2)])
@pytest.mark.parametrize("fused", [True, False])
def test_the_device_holds_no_more_than_the_blocks_that_stay_the_slots_and_one_gradient(fused, swapped, slots):
    run, peak = Run(fused).swap(swapped, slots), 0

    def gradient(parameter):
        nonlocal peak
        peak = max(peak, bytes_on_device(run))
        Run.gradient(run, parameter)
        peak = max(peak, bytes_on_device(run))

    run.gradient = gradient
    run.start()
    for _ in range(3):
        run.step()
        peak = max(peak, bytes_on_device(run))
    away = {parameter for block in run.exchange.parameters for parameter in block}
    resident = sum(p.nbytes for p in run.parameters if p not in away)
    for_each = 3 if fused else 4  # weight, two moments, gradient
    largest = max(p.nbytes for p in run.parameters)
    block = (1 if fused else 2) * run.exchange.block_bytes + run.state_bytes()
    assert peak <= for_each * resident + slots * block + largest


def test_a_fused_backward_pass_holds_one_gradient_and_the_states_of_the_blocks_on_the_device():
    run, alive = Run(True).swap(4, 2), []

    def gradient(parameter):
        alive.append(sum(p.grad is not None for p in run.parameters))
        Run.gradient(run, parameter)
        states = [value for state in run.optimizer.state.values() for value in state.values() if value.ndim]
        away = [value for value in states if value.untyped_storage().data_ptr() in run.device.homes]
        if len(alive) > len(run.parameters):
            swapped = len(run.exchange.parameters[0]) * 2  # two moments for each weight of a block
            assert len(away) >= 2 * swapped

    run.gradient = gradient
    run.start()
    for _ in range(2):
        run.step()
    assert set(alive) == {1}


def test_gradients_of_the_other_blocks_wait_in_main_memory():
    run = Run(False).swap(4, 2).start()
    run.backward()
    at_home = [p.grad.untyped_storage().data_ptr() in run.device.homes for p in run.swapped]
    assert at_home == [False] * (len(at_home) // 2) + [True] * (len(at_home) // 2)
    assert [p.data.untyped_storage().data_ptr() in run.device.homes for p in run.swapped] == at_home


def test_a_model_goes_when_nobody_needs_it_even_if_a_backward_pass_never_came():
    run = Run(fused=True).swap(3, 2)
    run.model.requires_grad_(True)(**inputs(run.model))
    gone = weakref.ref(run.model), weakref.ref(run.exchange)
    del run
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


# ----------------------------------------------------------------------------------------------------------- a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(
    ("fused", "make"), [(True, torch.optim.AdamW), (False, torch.optim.AdamW), (True, torch.optim.Adagrad)]
)
def test_on_a_gpu_the_weights_are_the_same(fused, make, pinned, checkpointing):
    plain = Run(fused, checkpointing, make=make, device="cuda").start()
    for _ in range(3):
        plain.step()
    for swapped, slots in EVERY_WAY:
        run = Run(fused, checkpointing, make=make, device="cuda")
        run.swap(swapped, slots, CudaDevice(torch.device("cuda"), pinned)).start()
        for _ in range(3):
            run.step()
        for one, other in zip(run.weights(), plain.weights(), strict=True):
            torch.testing.assert_close(one.cuda(), other)
        assert sum(p.device.type == "cuda" for p in run.swapped) == slots * len(run.exchange.parameters[0])
