"""Count the bytes of weights that a step with guidance copies where every block waits in main memory.

python -m bench.swapping

Of diffusers' group offloading in its sparing form, block by block and with a stream, where a block stays in main memory
and only travels to the device: each of its two passes fetches every block. Its own calls are counted; what each would
copy is the size of the block's weights. Two-way: its copies, both ways. Ours: the ring's own counter.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.dit import Size, both, inputs, velocity_of_theirs
from bench.measure import TWO_WAY, Row, Setting, distance, main
from bench.two_way import Exchange, plain_twin, velocities
from wan.block_swap import stream_blocks
from wan.streaming import CpuDevice

SIZE = Size(256, 1024, 2, 8, 256, (2, 16, 16))
SLOTS = 2


@torch.no_grad()
def rows(setting: Setting) -> Iterator[Row]:
    setting = replace(setting, device=torch.device("cpu"))  # the counts are those of any device
    ours, theirs = both(SIZE, setting)
    twin = plain_twin(both(SIZE, setting)[0])
    (x, prompt), (_, negative) = inputs(SIZE, setting), inputs(SIZE, setting, rows=100)
    timestep, passes = torch.tensor([500.0]), [{"text": prompt}, {"text": negative}]

    ring = stream_blocks(ours, range(SIZE.blocks), SLOTS, CpuDevice())
    contexts = [{"text": ours.context(seen["text"], reused=True)} for seen in passes]
    mine, result = per_step(lambda: ours.velocities(x, timestep, contexts), lambda: ring.bytes_copied)

    exchange = Exchange(twin.blocks, "cpu")
    both_ways, twin_result = per_step(lambda: velocities(twin, x, timestep, passes), lambda: exchange.bytes_copied)
    with counted_onloads(theirs) as copied:
        offloaded, their_result = per_step(
            lambda: [velocity_of_theirs(theirs, x, timestep, seen["text"]) for seen in passes], lambda: copied[0]
        )
    name = f"bytes swapped by a step with guidance, all {SIZE.blocks} blocks swapped"
    for ending, other, theirs_result, goal in (
        ("", offloaded, their_result, 0.5),
        (TWO_WAY, both_ways, twin_result, 0.22),
    ):
        apart = distance(torch.stack(result), torch.stack(theirs_result))
        yield Row(f"{name}{ending}", mine / 1e6, other / 1e6, mine / other, goal, "MB", apart)


def per_step(step: Callable[[], list[Tensor]], count: Callable[[], int]) -> tuple[int, list[Tensor]]:
    """Return how much a counter rises in a step that follows another one, and the step's result."""
    step()
    before = count()
    result = step()
    return count() - before, result


@contextlib.contextmanager
def counted_onloads(dit: nn.Module) -> Iterator[list[int]]:
    """Offload diffusers' DiT block by block; yield a list of one number, the bytes of all onloads of blocks so far."""
    from diffusers.hooks import apply_group_offloading
    from diffusers.hooks.group_offloading import ModuleGroup

    copied, onload, blocks = [0], ModuleGroup.onload_, set(dit.blocks)

    def counting(group: ModuleGroup) -> None:
        moved = [module for module in group.modules if module in blocks]
        copied[0] += sum(tensor.nbytes for module in moved for tensor in (*module.parameters(), *module.buffers()))
        onload(group)

    with patch.object(ModuleGroup, "onload_", counting):
        here = torch.device("cpu")
        apply_group_offloading(dit, here, here, offload_type="block_level", num_blocks_per_group=1)
        yield copied


if __name__ == "__main__":
    main(__doc__, {"swapping": rows})
