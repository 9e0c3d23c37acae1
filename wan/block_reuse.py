"""What a DiT's blocks add to the tokens of a prediction, kept at one step and added at others in place of running."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wan.model import Context, WanModel


class Residual:
    """What the blocks added to the tokens of a prediction when they last ran.

    measured: also find out how long it is, and with it by how much that changes from one time to the next.
    """

    def __init__(self, measured: bool = False):
        self.value: Tensor | None = None  # [B L D] in the dtype of the residual stream; of several processes, a part
        self.measured = measured
        self.growth: float | None = None  # how long it is by what it was the time before, a mean over tokens
        self._lengths: Tensor | None = None  # [B L]
        self._before: Tensor | None = None

    def keep(self, value: Tensor) -> None:
        """Take a value that has just been computed."""
        self.value = value
        if self.measured:
            self._lengths = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)

    def settle(self) -> None:
        """Compare with the time before: once a step is done, which may have been tried more than once."""
        if self._before is not None:
            self.growth = (self._lengths / self._before.clamp(min=1e-8)).mean().item()
        self._before = self._lengths


def velocities(
    model: WanModel,
    x: Tensor,
    timestep: Tensor,
    passes: Sequence[Mapping[str, Any]],
    residuals: Sequence[Residual],
    reused: Sequence[bool],
) -> list[Tensor]:
    """Return what model.velocities(x, timestep, passes) does; where `reused`, with a residual in place of the blocks.

    Other passes leave their residuals as of now. It goes around embed() and through skip_blocks, so that whatever else
    is around the model (swapped blocks, several processes, compiled blocks) stays as it is: a block that no pass needs
    is not even copied to the device. Each pass has a Context of its own, by which it is known.
    """
    known = {id(each["text"]): given for each, *given in zip(passes, residuals, reused, strict=True)}
    assert len(known) == len(passes), "two passes share a Context"
    every = range(len(model.blocks))
    asked = [{**each, "skip_blocks": every} if again else each for each, again in zip(passes, reused, strict=True)]
    for residual, again in zip(residuals, reused, strict=True):
        if not again:
            residual.value = None  # its memory is free while the blocks run
    with _around_embed(model, partial(_embed, known)):
        found = model.velocities(x, timestep, asked)
    for residual, again in zip(residuals, reused, strict=True):
        if not again:
            residual.settle()
    return found


@contextlib.contextmanager
def _around_embed(model: WanModel, around: Callable[..., tuple]) -> Iterator[None]:
    """Have embed() called by `around`, of which it is the first argument."""
    own = vars(model).get("embed")
    model.embed = partial(around, model.embed)
    try:
        yield
    finally:
        del model.embed
        if own is not None:
            model.embed = own


def _embed(
    known: Mapping[int, tuple[Residual, bool]],
    embed: Callable[..., tuple],
    x: Tensor,
    timestep: Tensor,
    text: Context,
    *more: Any,
    **named: Any,
) -> tuple[Tensor, tuple, Callable[[Tensor], Tensor]]:
    """Return what WanModel.embed() does, with an ending that adds the residual, or keeps what it is now."""
    residual, again = known[id(text)]
    tokens, seen, finish = embed(x, timestep, text, *more, **named)

    def finish_again(tokens: Tensor) -> Tensor:
        return finish(tokens.add_(residual.value))

    def finish_first(tokens: Tensor) -> Tensor:
        velocity = finish(tokens)
        # The tokens were overwritten on their way; to make them once more is cheaper than to keep a copy meanwhile.
        # The difference goes there, because what a compiled block returns may be the memory of its next result.
        start, _, _ = embed(x, timestep, text, *more, **named)
        residual.keep(torch.sub(tokens, start, out=start))
        return velocity

    return tokens, seen, finish_again if again else finish_first
