"""--blocks_to_swap auto on a CPU that pretends to have little memory."""

import re
import sys

import pytest
import torch
from torch import Tensor

from tests.live_bytes import LiveBytes
from tests.test_wan_block_swap import guided_inputs
from tests.test_wan_block_swap import load as load
from utils.errors import UserError
from wan.auto_swap import AutoSwap, auto_recommended, choose_swap, smallest_swap
from wan.block_swap import AUTO, SwapOptions, slots_for, stream_blocks, streamed_blocks
from wan.fp8 import Float8Linear
from wan.memory import Step, step_bytes, weight_bytes
from wan.model import WanShape
from wan.streaming import CpuDevice

GB = 10**9
SHAPE = WanShape(5120, 13824, 40, 40, 16)


class Small(CpuDevice):
    """A device with so many bytes, of which main memory takes none."""

    def __init__(self, live: LiveBytes, capacity: float = float("inf")):
        self.live, self.capacity = live, capacity

    def free(self) -> int:
        return min(self.capacity - self.live.now, sys.maxsize - 1)

    def home(self, size: int) -> Tensor:
        with self.live.elsewhere():
            return super().home(size)


def automatic(model, device: Small, slots: int | None = None) -> AutoSwap:
    auto = AutoSwap(stream_blocks(model, [], 0, device), slots)
    auto.watch(model)
    return auto


# --------------------------------------------------------------------------------------------------------- choosing
@pytest.mark.parametrize(
    ("free", "want"),
    [(100, 0), (50, 0), (49.9, 3), (49, 3), (48.9, 4), (40.9, 12), (11, 40), (1, 40)],
)
def test_the_smallest_number_that_fits_is_chosen_and_all_where_none_does(free, want, monkeypatch):
    monkeypatch.setattr("wan.auto_swap._MARGIN", 1)
    assert smallest_swap(40, 1, None, lambda swapped: 10, free) == want
    for swapped in range(1, 40):
        fits = smallest_swap(40, 1, 3, lambda swapped: 10, 50 - swapped + 3) if swapped > 3 else swapped
        assert fits == swapped
        assert slots_for(swapped, 3) == min(swapped, 3)


def test_what_is_chosen_fits_and_one_block_less_does_not(caplog):
    caplog.set_level("INFO")
    block, rest = weight_bytes(SHAPE, torch.bfloat16)
    steps = [Step((1, 60, 104)), Step((21, 60, 104), passes=2)]
    chosen = {}
    for free in (80, 24, 16, 12):
        device = Small(LiveBytes(), free * GB)
        swap = choose_swap(SwapOptions(AUTO), SHAPE, torch.bfloat16, device, steps)
        chosen[free] = swap.blocks_to_swap
        taken = rest + max(step_bytes(SHAPE, step, torch.bfloat16, waiting=block) for step in steps)
        if 0 < chosen[free] < 40:
            left = free * GB / 1.05 - taken - (40 - chosen[free] + 2) * block
            assert 0 <= left < block
    assert chosen[80] == 0 and 0 < chosen[24] < chosen[16] < chosen[12] <= 40
    assert f"--blocks_to_swap auto: {chosen[24]} of 40 blocks; free are 24.00 GB" in caplog.text


def test_float8_weights_and_pictures_need_fewer_blocks_swapped():
    device = Small(LiveBytes(), 16 * GB)

    def swapped(step: Step, fp8: bool = False) -> int:
        make = Float8Linear if fp8 else None
        return choose_swap(SwapOptions(AUTO), SHAPE, torch.bfloat16, device, [step], make).blocks_to_swap

    video, picture = Step((21, 60, 104)), Step((1, 60, 104))
    assert swapped(video) > swapped(video, fp8=True)
    assert swapped(video) > swapped(picture) > swapped(picture, fp8=True)


def test_on_a_cpu_nothing_is_swapped(load, caplog):
    caplog.set_level("INFO")
    model = load(swap=SwapOptions(AUTO), steps=[Step((1, 8, 8))])
    assert model.auto_swap.ring.numbers == []
    assert "--blocks_to_swap auto: none, swapping saves nothing on a CPU" in caplog.text
    assert "--blocks_to_swap: saves" not in caplog.text


# ------------------------------------------------------------------------------------------------- out of memory
@pytest.mark.parametrize("slots", [None, 1])
@torch.inference_mode()
def test_a_step_that_runs_out_of_memory_is_computed_with_more_blocks_swapped_bit_by_bit(load, caplog, slots):
    with torch.inference_mode(False):
        plain = load()
    inputs = guided_inputs(plain, grid=(3, 20, 8))
    want = plain.velocities(*inputs)
    with LiveBytes() as live:
        with torch.inference_mode(False):
            model = load()
        device = Small(live)
        auto = automatic(model, device, slots)
        resident = live.now
        live.capacity = live.now + 350_000  # less than a step takes beside all weights
        velocities = model.velocities(*inputs)
        assert len(auto.ring.numbers) > len(auto.ring.slots) and live.now < resident
        again = model.velocities(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(velocities, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
    line = r"not enough GPU memory \(CUDA out of memory. Tried to allocate 0.\d\d MiB\): "
    assert re.search(line + r"--blocks_to_swap auto swaps \d blocks instead of 0", caplog.text)


@torch.inference_mode()
def test_what_no_swap_can_help_is_one_line(load):
    with LiveBytes() as live:
        with torch.inference_mode(False):
            model = load()
        inputs = guided_inputs(model)
        auto = automatic(model, Small(live))
        live.capacity = live.now - 2 * auto.ring.block_bytes + 1000  # all but two slots, and no activations
        with pytest.raises(UserError, match=r"with all 4 blocks swapped. Use float8 weights, a smaller") as error:
            model.velocities(*inputs)
    assert len(auto.ring.numbers) == 4 and "\n" not in str(error.value)


def test_each_attempt_swaps_twice_as_many_more_and_at_least_what_was_asked_for(load):
    model = load()
    auto = automatic(model, CpuDevice(), 1)
    size = auto.ring.block_bytes
    line = "CUDA out of memory. Tried to allocate {:.2f} MiB. GPU 0 has ..."
    auto.widen(line.format(0.5 * size / 2**20))
    assert len(auto.ring.numbers) == 2 and auto.ring.numbers == [1, 3]
    auto.widen("CUBLAS_STATUS_ALLOC_FAILED")
    assert auto.ring.numbers == [0, 1, 2, 3]
    other = automatic(load(), CpuDevice(), 1)
    other.widen(line.format(2.5 * size / 2**20))
    assert other.ring.numbers == [0, 1, 2, 3]


def test_one_of_several_processes_does_not_try_again(load):
    auto = automatic(load(), CpuDevice(), 1)
    auto.alone = False
    with pytest.raises(
        UserError, match="several processes cannot try again. Give --blocks_to_swap a number, more than 0"
    ):
        auto.widen("CUDA out of memory. Tried to allocate 1.00 MiB. GPU 0 has ...")


def test_other_errors_pass_and_what_was_changed_is_restored_before_another_attempt(load):
    auto, log = automatic(load(), CpuDevice()), []

    def compute() -> str:
        log.append("computed")
        if len(log) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 bytes. GPU 0 ...")
        return "result"

    assert auto.retry(compute, lambda: log.append("restored")) == "result"
    assert log == ["computed", "restored", "computed"]
    with pytest.raises(RuntimeError, match="shapes"):
        auto.retry(lambda: (_ for _ in ()).throw(RuntimeError("shapes")))


@pytest.mark.parametrize(("swapped", "given"), [(0, ""), (7, " with --blocks_to_swap 7")])
def test_auto_is_recommended_where_memory_runs_out_without_it(swapped, given):
    line = f"not enough GPU memory{given} .CUDA out of memory. Tried .*. Use --blocks_to_swap auto; docs/memory.md"
    with pytest.raises(UserError, match=line), auto_recommended(SwapOptions(swapped)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    with pytest.raises(ValueError), auto_recommended(SwapOptions(swapped)):
        raise ValueError


def test_blocks_that_join_a_ring_change_no_bit(load):
    model, plain = load("fp8_scaled"), load("fp8_scaled")
    ring = stream_blocks(model, streamed_blocks(4, 1), 1, CpuDevice())
    given = {**guided_inputs(plain)[2][0], "x": guided_inputs(plain)[0], "timestep": guided_inputs(plain)[1]}
    with torch.no_grad():
        for numbers, slots in (([2], 1), ([0, 2], 2), ([0, 1, 2, 3], 2)):
            ring.stream(numbers, slots)
            assert torch.equal(model(**given), plain(**given))
            assert torch.equal(model(**given), plain(**given))
