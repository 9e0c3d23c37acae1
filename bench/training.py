"""Compare a LoRA training step with the same through diffusers' DiT: seconds, and bytes kept for the backward pass.

python -m bench.training
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.dit import Size, both, inputs
from bench.measure import Row, Setting, distance, main, timed_pairs
from networks.lora import LoRABranch
from tests.diffusers_dit import padded

SIZE = Size(256, 1024, 2, 4, 256, (8, 16, 16))
RANK = 16


def add_branches(blocks: nn.ModuleList) -> list[nn.Parameter]:
    """Give every linear layer of the blocks a low-rank branch; return the branches' weights."""
    generator, weights = torch.Generator().manual_seed(0), []
    for layer in [layer for layer in blocks.modules() if isinstance(layer, nn.Linear)]:
        branch = LoRABranch(layer.in_features, layer.out_features, RANK, RANK).to(layer.weight.device)
        with torch.no_grad():
            for weight in branch.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        plain = layer.forward
        layer.forward = lambda x, plain=plain, branch=branch: plain(x) + branch(x)
        weights += branch.parameters()
    return weights


def kept_bytes(run: Callable[[], Tensor], blocks: nn.ModuleList) -> int:
    """Return the bytes of what `run` keeps for the backward pass; of a weight or buffer of the blocks, nothing."""
    own = {tensor.data_ptr() for tensor in (*blocks.parameters(), *blocks.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def rows(setting: Setting) -> Iterator[Row]:
    ours, theirs = both(SIZE, setting)
    x, text = inputs(SIZE, setting)
    timestep = torch.tensor([500.0], device=setting.device)
    padded_text, wanted = padded(text), torch.zeros_like(x)
    trained = add_branches(ours.blocks), add_branches(theirs.blocks)

    def run_ours() -> Tensor:
        return (ours(x, timestep, text) - wanted).square().mean()

    def run_theirs() -> Tensor:
        out = theirs(x.to(setting.dtype), timestep, padded_text, return_dict=False)[0]
        return (out.float() - wanted).square().mean()

    mine, other = kept_bytes(run_ours, ours.blocks), kept_bytes(run_theirs, theirs.blocks)
    name = f"LoRA training, d={SIZE.dim}, S=512"
    unit = "MB"
    yield Row(f"{name}: kept for the backward pass", mine / 1e6, other / 1e6, mine / other, 0.45, unit)

    ours.gradient_checkpointing = True
    theirs.enable_gradient_checkpointing()
    ours.train(), theirs.train()

    def step(run: Callable[[], Tensor], weights: list[nn.Parameter]) -> Callable[[], Tensor]:
        def stepped() -> Tensor:
            gradients = torch.autograd.grad(run(), weights)
            return torch.cat([gradient.flatten() for gradient in gradients])

        return stepped

    step_ours, step_theirs = step(run_ours, trained[0]), step(run_theirs, trained[1])
    mine, other, ratio = timed_pairs(step_ours, step_theirs, setting.pairs)
    norms = step_ours().norm(), step_theirs().norm()  # the layers come in another order
    yield Row(f"{name}, checkpointed step", mine, other, ratio, 0.85, "s", distance(*norms))


if __name__ == "__main__":
    main(__doc__, {"training": rows})
