"""The estimate of a step's memory against the tensors that are alive while a model computes one."""

from functools import partial

import pytest
import torch

from networks import lora_wan
from tests.live_bytes import LiveBytes
from tests.test_wan_model import random_inputs
from wan.block_reuse import Residual, velocities
from wan.block_swap import stream_blocks
from wan.checkpointing import save_memory
from wan.configs import TASKS
from wan.fp8 import Float8Linear
from wan.loading import load_dit
from wan.memory import Step, step_bytes, weight_bytes
from wan.model import WanModel, WanShape
from wan.quantize import NF4Linear
from wan.streaming import CpuDevice

# Where RMS norm is no kernel of its own, its parts keep a little more than is counted.
LEAST = 1.0 if hasattr(torch.ops.aten, "_fused_rms_norm_backward") else 0.94
MARGIN = 1.6  # how much more than is alive the estimate says at most
RANK = 8


def measured(shape: WanShape, step: Step, dtype: torch.dtype, **swap) -> int:
    """Return the most bytes that are alive while a random model computes a step."""
    model = WanModel(shape).requires_grad_(False).to(dtype)
    save_memory(model, step.checkpointing)
    model.rope(tuple(n // p for n, p in zip(step.grid, shape.patch, strict=True)), None, torch.device("cpu"))
    given = random_inputs(model, step.batch, step.grid, rows=(shape.text_length - 2,))
    if not step.trained:
        with LiveBytes() as live, torch.inference_mode():
            contexts = [model.context(given["text"], given["image_features"], reused=True) for _ in range(step.passes)]
            passes = [{"text": context, "y": given["y"]} for context in contexts]
            residuals = [Residual() for _ in range(step.kept)]
            for reused in (False, True, False):
                if step.kept:
                    velocities(model, given["x"], given["timestep"], passes, residuals, [reused] * step.passes)
                else:
                    model.velocities(given["x"], given["timestep"], passes)
        return live.peak
    network = lora_wan.create_network(model, step.rank, 1.0, None, args={}).train()
    network.attach(model)
    with LiveBytes() as live:
        model(**given).square().mean().backward()
    return live.peak


def shape_of(**sizes) -> WanShape:
    defaults = {"dim": 192, "ffn_dim": 512, "heads": 3, "blocks": 2, "in_channels": 16}
    return WanShape(**(defaults | sizes), text_dim=64, text_length=60, freq_dim=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("step", "sizes"),
    [
        (Step((2, 40, 40)), {}),
        (Step((2, 20, 40), batch=2), {"ffn_dim": 1536}),
        (Step((1, 32, 32), passes=2), {"in_channels": 36, "clip_dim": 1280}),
        (Step((2, 40, 40), passes=2, kept=2), {}),
        (Step((1, 32, 32), trained=1, rank=RANK), {"blocks": 3}),
        (Step((1, 16, 32), batch=2, trained=1, rank=RANK), {"ffn_dim": 1024}),
        (Step((1, 32, 32), trained=1, rank=RANK, checkpointing=True), {"blocks": 5}),
    ],
)
def test_a_step_takes_no_more_than_the_estimate_and_not_much_less(step, sizes, dtype):
    shape = shape_of(**sizes)
    alive, estimate = measured(shape, step, dtype), step_bytes(shape, step, dtype)
    assert LEAST * alive <= estimate <= MARGIN * alive, (alive, estimate, estimate / alive)


@torch.inference_mode()
def test_predictions_that_wait_for_their_turn_are_in_the_estimate():
    shape = shape_of(ffn_dim=4096)
    model = WanModel(shape).requires_grad_(False)
    given = random_inputs(model, 1, (2, 24, 24))
    passes = [{"text": given["text"]}] * 3
    with torch.inference_mode(False):
        ring = stream_blocks(model, [0, 1], 1, CpuDevice())
    with LiveBytes() as live:
        model.velocities(given["x"], given["timestep"], passes)
    step = Step((2, 24, 24), passes=3)
    alone, waiting = (step_bytes(shape, step, torch.float32, waiting=size) for size in (0, ring.block_bytes))
    assert waiting - alone == 2 * model.token_bytes(given["x"]) and live.peak <= waiting


def test_a_longer_video_a_larger_batch_and_a_backward_pass_take_more():
    shape = shape_of()
    sizes = [
        step_bytes(shape, step, torch.bfloat16)
        for step in (
            Step((1, 32, 32)),
            Step((3, 32, 32)),
            Step((3, 32, 32), batch=2),
            Step((3, 32, 32), batch=2, trained=1000, rank=4, checkpointing=True),
            Step((3, 32, 32), batch=2, trained=1000, rank=4),
        )
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("how", [{}, {"fp8": True}, {"fp8": True, "fp8_scaled": True}, {"quantize": "nf4"}])
@pytest.mark.parametrize(("kind", "task"), [("dit_t2v", "t2v-14B"), ("dit_i2v", "i2v-14B")])
def test_weights_take_the_bytes_of_those_that_a_file_loads_to(models, kind, task, how):
    model = load_dit(models[kind], TASKS[task], torch.bfloat16, "cpu", **how)
    make = partial(Float8Linear, scaled="fp8_scaled" in how, scale_dtype=torch.bfloat16) if "fp8" in how else None
    block, rest = weight_bytes(model.shape, torch.bfloat16, NF4Linear if "quantize" in how else make)
    every = [*model.parameters(), *model.buffers()]
    assert 0 <= 2 * block + rest - sum(tensor.nbytes for tensor in every) < 256 * len(every)
    assert block == stream_blocks(model, [0], 1, CpuDevice()).block_bytes


def test_the_published_models_take_what_their_documents_say():
    shape = WanShape(5120, 13824, 40, 40, 16)
    block, rest = weight_bytes(shape, torch.bfloat16)
    assert (block + rest / 40) * 40 == pytest.approx(28.6e9, rel=0.01)
    video = Step((21, 90, 160), passes=2)
    assert 2 * block + rest + step_bytes(shape, video, torch.bfloat16) < 16e9
