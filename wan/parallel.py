"""One video on several processes, each with a GPU and the whole DiT: they share out its predictions and its tokens.

A step with guidance makes two predictions: one half of the processes makes one, the other half the other. The processes
that make a prediction together each hold a part of its tokens; around self-attention they exchange them for all tokens
of a part of the heads (Ulysses, arXiv:2309.14509). Nothing is left out, so the result is the same.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from utils.errors import UserError
from utils.processes import answered
from wan.attention import attention
from wan.model import WanModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """How processes share the predictions of a step."""

    halves: bool  # two predictions at a time, each by one half of the processes
    whole: bool  # all processes can make one prediction together


def split_of(processes: int, heads: int, guided: bool) -> Split:
    """Return how so many processes share a DiT of so many heads; guided: there are steps with two predictions.

    Raises UserError where they cannot: those that make a prediction together must each get as many heads.
    """
    split = _split(processes, heads, guided)
    if split.halves or split.whole:
        return split
    working = [str(n) for n in range(1, 2 * heads + 1) if _split(n, heads, guided) != Split(False, False)]
    how = "with guidance" if guided else "without guidance"
    raise UserError(
        f"{processes} processes: they cannot share the {heads} attention heads of this DiT equally, {how}",
        f"start {' or '.join([', '.join(working[:-1]), working[-1]])}",
    )


def _split(processes: int, heads: int, guided: bool) -> Split:
    halves = guided and processes % 2 == 0 and heads % (processes // 2) == 0
    return Split(halves, heads % processes == 0)


def share_out(model: WanModel, rank: int, processes: int, guided: bool, compiled: bool = False) -> None:
    """Make the model's predictions the common work of all processes, each of which has the same model.

    All of them must ask for the same velocities() at the same time. Names and results stay the same. compiled: the
    blocks are, in two parts then, with the exchange between them, which is not for a compiler.
    """
    split = split_of(processes, model.shape.heads, guided)
    sharing = Sharing(rank, processes, split)
    model.velocities = partial(sharing.velocities, model.velocities)
    model.embed = partial(sharing.embed, model.embed)
    model.head.forward = partial(sharing.head, model.head.forward)
    if compiled:
        sharing.exchanging = torch.compiler.disable(sharing.exchanging)
    for block in model.blocks:
        block.self_attn.attend = sharing.attend  # the same for all, so that they can share what torch.compile makes
    how = "each prediction on all of them"
    if split.halves:
        how = f"two predictions at a time, each on {sharing.half.size}, and one that is alone on {sharing.alone.size}"
    logger.info("%d processes: %s", processes, how)


@dataclass(frozen=True)
class Team:
    """Processes that make a prediction together, as one of them sees it."""

    place: int
    size: int
    group: dist.ProcessGroup | None  # None: all processes


class Sharing:
    """What one process does of the common work, and how it gets the rest."""

    def __init__(self, rank: int, processes: int, split: Split):
        self.processes, self.split = processes, split
        everyone = Team(rank, processes, None)
        self.half = everyone
        if split.halves:
            size = processes // 2
            # Each process has to take part in the making of every group.
            groups = [dist.new_group(range(start, start + size)) if size > 1 else None for start in (0, size)]
            self.half = Team(rank % size, size, groups[rank // size])
        self.alone = everyone if split.whole else self.half
        self.number = rank // self.half.size  # of the half
        self.team = self.alone
        self.lengths: list[int] = []  # tokens of each in the team
        self.exchanging = self.attend_by_heads

    def velocities(
        self,
        compute: Callable[..., list[Tensor]],
        x: Tensor,
        timestep: Tensor,
        passes: Sequence[Mapping[str, Any]],
    ) -> list[Tensor]:
        """Return what WanModel.velocities() does.

        Predictions that are left over after the pairs are made by all processes together, or by both halves alike.
        """
        paired = len(passes) // 2 * 2 if self.split.halves else 0
        found = []
        if paired:
            self.team = self.half
            own = compute(x, timestep, passes[self.number : paired : 2])
            for i in range(paired):
                velocity = own[i // 2].contiguous() if i % 2 == self.number else own[0].new_empty(own[0].shape)
                with answered():
                    dist.broadcast(velocity, i % 2 * self.half.size)
                found.append(velocity)
        if passes[paired:]:
            self.team = self.alone
            found += compute(x, timestep, passes[paired:])
        return found

    def embed(self, embed: Callable[..., tuple], *inputs: Any, **named: Any) -> tuple[Tensor, tuple, Callable]:
        """Return what WanModel.embed() does, with this process's part of the tokens and of their rotary factors."""
        tokens, (modulation, rope, *others), finish = embed(*inputs, **named)
        size, count = self.team.size, tokens.shape[1]
        self.lengths = [count // size + (place < count % size) for place in range(size)]
        if size > 1:
            own = sum(self.lengths[: self.team.place]), self.lengths[self.team.place]
            tokens = tokens.narrow(1, *own).clone()  # so that the others are not kept
            rope = rope.narrow(-3, *own)
        return tokens, (modulation, rope, *others), finish

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
        """Return the attention [B l H D] of this process's tokens to all, for q, k and v [B l H D] of these tokens."""
        if self.team.size == 1:
            return attention(q, k, v, *how)
        return self.exchanging(q, k, v, *how)

    def attend_by_heads(self, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
        return self.by_tokens(attention(*(self.by_heads(y) for y in (q, k, v)), *how))

    def by_heads(self, x: Tensor) -> Tensor:
        """Return all tokens of this process's heads [B L h D] for its tokens of all heads [B l H D]."""
        rows = rearrange(x, "b l (team h) d -> (team l) b h d", team=self.team.size)
        return rearrange(self.exchange(rows, [x.shape[1]] * self.team.size, self.lengths), "l b h d -> b l h d")

    def by_tokens(self, x: Tensor) -> Tensor:
        """Return this process's tokens of all heads [B l H D] for all tokens of its heads [B L h D]."""
        own = [self.lengths[self.team.place]] * self.team.size
        rows = self.exchange(rearrange(x, "b l h d -> l b h d"), self.lengths, own)
        return rearrange(rows, "(team l) b h d -> b l (team h) d", team=self.team.size)

    def head(self, head: Callable[..., Tensor], tokens: Tensor, time: Tensor) -> Tensor:
        """Return what the head makes of all tokens [B L C], for this process's tokens [B l D]."""
        features = head(tokens, time)
        size = self.team.size
        if size == 1:
            return features
        rows = rearrange(features, "b l c -> l b c").repeat(size, 1, 1)
        return rearrange(self.exchange(rows, [features.shape[1]] * size, self.lengths), "l b c -> b l c")

    def exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Return rows [sum(receive) ...] from all of the team in turn; each gets a part of rows [sum(send) ...]."""
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        with answered():
            dist.all_to_all_single(received, rows.contiguous(), receive, send, group=self.team.group)
        return received
