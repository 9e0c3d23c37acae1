"""A frozen DiT whose blocks several processes share out: each holds a part of every weight, and all of a block at use.

torch's FSDP2 (fully_shard) is put around the blocks from outside. What lies outside of them stays whole, and so does a
network that is trained beside the DiT.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from wan.model import WanModel

_PATIENCE = timedelta(hours=6)  # the others wait while the first one alone encodes prompts and decodes videos
_END = -1


class Shards:
    """What processes share the blocks of a DiT by. All that is done with it, all of them do at the same time.

    reshard: a block's weights are given up after its forward pass, and gathered again for the backward pass.
    offload: the parts are held in main memory.
    """

    dit: WanModel

    def __init__(self, device: torch.device, reshard: bool = True, offload: bool = False):
        self.device = device
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.how = {"mesh": self.mesh, "reshard_after_forward": reshard}
        self.how["offload_policy"] = CPUOffloadPolicy() if offload else OffloadPolicy()
        # Of its own, on CPUs: what is said there waits for no GPU, and no GPU for it.
        self.talk = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def shard(self, dit: WanModel) -> WanModel:
        """Return the DiT with its blocks shared out; weights in main memory go to the device block by block."""
        for block in dit.blocks:
            fully_shard(block, **self.how)
        inside = {parameter for block in dit.blocks for parameter in block.parameters()}
        outside = {parameter for parameter in dit.parameters() if parameter not in inside}
        for parameter in outside:
            parameter.data = parameter.data.to(self.device)
        if "ignored_params" in inspect.signature(fully_shard).parameters:
            # Makes blocks gather their weights while those before them compute. torch 2.6 does not know it.
            fully_shard(dit, ignored_params=outside, **self.how)
        self.dit = dit
        return dit

    @contextmanager
    def led(self) -> Iterator[None]:
        """While it is entered, this first process may run the DiT by itself: the others, in follow(), lend their parts.

        They are let go in the end, whatever happens.
        """
        numbers = {block: number for number, block in enumerate(self.dit.blocks)}
        run_block = self.dit.run_block

        def announced(block: nn.Module, *args: Any) -> Tensor:
            self._say(numbers[block])
            return run_block(block, *args)

        self.dit.run_block = announced
        try:
            yield
        finally:
            self.dit.run_block = run_block
            self._say(_END)

    def follow(self) -> None:
        """Take part in gathering the blocks' weights, computing nothing, until the first process is through."""
        self._gather(iter(self._hear, None))

    def prepare(self) -> None:
        """Gather each block's weights once, and so make the tensors that hold them.

        Samples would make them in torch's inference mode, where training could not use them.
        """
        self._gather(self.dit.blocks)

    @torch.no_grad()
    def _gather(self, blocks: Iterable[nn.Module]) -> None:
        def gather() -> None:
            for block in blocks:
                with _replaced(block, lambda: None):
                    block()

        with _replaced(self.dit, gather):
            self.dit()

    def _hear(self) -> nn.Module | None:
        number = self._say(_END)
        return None if number == _END else self.dit.blocks[number]

    def _say(self, number: int) -> int:
        """Return what the first process says, on all of them."""
        said = torch.tensor(number)
        dist.broadcast(said, 0, group=self.talk)
        return int(said)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[[], None]) -> Iterator[None]:
    """Have a module, whose hooks gather weights, do something else between them."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
