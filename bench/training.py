"""Compare a LoRA's training step with the same through diffusers' DiT and the plain twin: seconds, and bytes kept.

python -m bench.training
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from bench.dit import Size, both, inputs
from bench.measure import TWO_WAY, Row, Setting, compared, main
from bench.two_way import plain_twin
from networks.lora import LoRABranch
from tests.diffusers_dit import padded
from wan.checkpointing import save_memory
from wan.recompute import saving

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
    own = {tensor.untyped_storage()._cdata for tensor in (*blocks.parameters(), *blocks.buffers())}
    seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def watch(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    with saving(watch):
        result = run()  # noqa: F841, it holds what is kept
    return sum(size for storage, size in seen.values() if not storage.expired())


def rows(setting: Setting) -> Iterator[Row]:
    ours, theirs = both(SIZE, setting)
    twin = plain_twin(ours)
    x, text = inputs(SIZE, setting)
    timestep = torch.tensor([500.0], device=setting.device)
    padded_text, wanted = padded(text), torch.zeros_like(x)
    dits = {"": theirs, TWO_WAY: twin}
    trained = {ending: add_branches(dit.blocks) for ending, dit in dits.items()}
    trained_ours = add_branches(ours.blocks)

    def run_ours() -> Tensor:
        return (ours(x, timestep, text) - wanted).square().mean()

    def run_theirs() -> Tensor:
        out = theirs(x.to(setting.dtype), timestep, padded_text, return_dict=False)[0]
        return (out.float() - wanted).square().mean()

    def run_twin() -> Tensor:
        return (twin(x, timestep, text) - wanted).square().mean()

    runs = {"": run_theirs, TWO_WAY: run_twin}
    name, unit = f"LoRA training, d={SIZE.dim}, S=512", "MB"
    for dit in (ours, *dits.values()):
        dit.train()
    save_memory(ours, checkpointing=False)
    mine = kept_bytes(run_ours, ours.blocks)
    for ending, run in runs.items():
        other = kept_bytes(run, dits[ending].blocks)
        label = f"{name}: kept for the backward pass{ending}"
        yield Row(label, mine / 1e6, other / 1e6, mine / other, 0.45, unit)

    def step(run: Callable[[], Tensor], weights: list[nn.Parameter]) -> Callable[[], Tensor]:
        def stepped() -> Tensor:
            """Return the norm of each kind of gradient: the layers come in another order."""
            gradients = torch.autograd.grad(run(), weights)
            return torch.stack([torch.cat([g.flatten() for g in gradients[i::2]]).norm() for i in range(2)])

        return stepped

    others = {ending: step(run, trained[ending]) for ending, run in runs.items()}
    for kind, goals in (("step", (None, None)), ("checkpointed step", (0.85, 0.7))):
        if kind == "checkpointed step":
            save_memory(ours, checkpointing=True)
            theirs.enable_gradient_checkpointing()
            twin.gradient_checkpointing = True
        pairs = {ending: (other, goal) for (ending, other), goal in zip(others.items(), goals, strict=True)}
        yield from compared(f"{name}, {kind}", step(run_ours, trained_ours), pairs, setting)


if __name__ == "__main__":
    main(__doc__, {"training": rows})
