"""What bench/memory.py counts on tensors without memory is what real ones take; the page's commands make its rows."""

import functools
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import memory
from bench.memory import GIB, Cost, Plan, Rates, Tracker, by_fewer_blocks, calculated, counted, decoded
from bench.steps import Work, generation_step, random_dit
from wan.memory import weight_bytes
from wan.model import WanShape
from wan.vae import VaeShape

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
SHAPE = WanShape(dim=96, ffn_dim=192, heads=3, blocks=4, in_channels=16, text_dim=64, freq_dim=64)
WORK = Work(SHAPE, 128, 96, 9, dtype=torch.float32)
VIDEO = Work(SHAPE, 832, 480, 81)  # 32760 tokens
CPU = torch.device("cpu")
once = functools.cache(calculated)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("held", [{}, {"swapped": 3}, {"fp8": True, "swapped": 4}])
def test_tensors_without_memory_count_like_real_ones(train, held):
    plan, work = Plan(train=train, rank=4), replace(WORK, **held)
    with Tracker(CPU) as tracker:
        real = counted(plan, work, CPU, tracker)
    assert calculated(plan, work, "cpu", main_memory=True) == real and real.matrix_flops > 0


def test_the_peak_is_that_of_the_memory_that_torch_gives_out():
    work = replace(WORK, width=512, height=512)
    with Tracker(CPU) as tracker:
        step = generation_step(random_dit(SHAPE, CPU, torch.float32), work, CPU)
        step()
        before = tracker.peak["device"] = tracker.alive["device"]
        step()
        peak = tracker.peak["device"] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    given = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = highest = 0
    for event in sorted(given, key=lambda event: event.start_ns()):
        assert event.device_type() == DeviceType.CPU
        taken += event.nbytes()
        highest = max(highest, taken)
    # Kernels take a little of their own meanwhile, which the tracker does not see.
    assert 0.9 * highest <= peak <= 1.01 * highest


@pytest.mark.parametrize("plan", [Plan(), Plan(train=True, rank=4)])
def test_main_memory_may_be_real(plan):
    real, fake = (calculated(plan, replace(WORK, swapped=4), main_memory=fake) for fake in (False, True))
    assert replace(real, main_bytes=0) == replace(fake, main_bytes=0)


@pytest.mark.parametrize("plan, swapped", [(Plan(), 0), (Plan(), 5), (Plan(train=True, rank=4), 10)])
def test_a_dit_of_many_blocks_costs_what_two_of_few_blocks_let_expect(plan, swapped):
    work = replace(WORK, shape=replace(SHAPE, blocks=10), swapped=swapped, dtype=torch.bfloat16)
    assert by_fewer_blocks(plan, work, few=(6, 8)) == calculated(plan, work)


def test_the_operations_are_those_of_the_formula():
    cost = once(Plan(), VIDEO)
    assert cost.matrix_flops + cost.attention_flops == pytest.approx(2 * VIDEO.forward_flops, rel=0.01)


def test_no_matrix_of_all_pairs_of_tokens_is_counted():
    pairs = 32760**2 * 2
    assert once(Plan(), VIDEO).device_bytes < pairs / 4
    assert once(Plan(train=True), VIDEO).device_bytes < pairs / 2


def test_checkpointing_saves_memory():
    every, few = (Plan(train=True, checkpointing=checkpointing) for checkpointing in (False, True))
    assert once(few, VIDEO).device_bytes < 0.7 * once(every, VIDEO).device_bytes


def test_swapped_blocks_are_in_main_memory_and_but_two_of_them_not_on_the_device():
    image = replace(VIDEO, frames=1, width=64, height=64)
    resident, swapped = calculated(Plan(), image), calculated(Plan(), replace(image, swapped=4))
    block, _ = weight_bytes(image.shape, image.dtype)
    assert 0.8 * 4 * block < swapped.copied_bytes < 4 * block  # keys and values of the text are there already
    assert resident.device_bytes - swapped.device_bytes == pytest.approx(2 * block, rel=0.1)
    assert swapped.main_bytes - resident.main_bytes == pytest.approx(5 * block, rel=0.05)  # one while it is packed


def test_tiles_and_the_cache_in_main_memory_save_the_memory_of_decoding(monkeypatch):
    monkeypatch.setattr(memory, "VaeShape", lambda: VaeShape(8, (8, 16, 32, 32), residuals=1))
    whole, cached, tiled = (decoded(128, 128, 5, *how) for how in ((), (True,), (False, 64)))
    assert max(cached.device_bytes, tiled.device_bytes) < 0.9 * whole.device_bytes
    assert cached.main_bytes > whole.main_bytes


def test_a_step_takes_as_long_as_its_arithmetic_or_its_copies():
    rates = Rates(matrices=10.0, attention=5.0, attention_training=2.0, link=4.0)
    cost = Cost(0, 0, matrix_flops=20, attention_flops=10, copied_bytes=8)
    assert cost.seconds_on(rates) == 4 and cost.seconds_on(rates, train=True) == 7
    assert replace(cost, copied_bytes=80).seconds_on(rates) == 20


def test_a_card_has_to_hold_a_margin_too():
    assert Cost(7 * GIB, 0).card == 8 and Cost(8 * GIB, 0).card == 12 and Cost(100 * GIB, 0).card is None


def test_what_fits_on_a_card_is_the_fastest_of_what_does():
    plan = Plan("t2v-1.3B", 64, 64, 1)
    cards = {plan: 32, replace(plan, fp8=True): 16, replace(plan, swapped=30): 12, replace(plan, swapped=15): 16}
    *_, line = memory.fitting(cards)
    assert line == "| t2v-1.3B | 64x64, 1 |  | bf16, swap 30 | fp8 | fp8 |"


def test_every_row_of_the_page_has_the_command_of_its_plan():
    shown = re.findall(r"`python -m bench\.memory (--task [^`]*)`", PAGE.read_text(encoding="utf-8"))
    assert [memory.plan_of(memory.parser().parse_args(shlex.split(words))) for words in shown] == list(memory.plans())


def test_the_table_is_put_between_the_marks_of_a_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{memory.BEGIN}\nold\n{memory.END}\nafter\n")
    monkeypatch.setattr(memory, "plans", lambda: iter([Plan("t2v-1.3B", 64, 64, 1)]))
    monkeypatch.setattr(memory, "task_shape", lambda config: replace(SHAPE, blocks=8))
    memory.main(["--into", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count(memory.BEGIN) == 1 and "--task t2v-1.3B --size 64 64 --frames 1`" in text
