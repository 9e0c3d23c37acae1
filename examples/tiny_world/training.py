"""A training of the recipe: two optimizers, an average of the weights, checkpoints from which it goes on; and how
the recipe calls its steps.

With several processes (`torchrun --nproc_per_node 2`) each learns from its share of a batch, and all take the same
steps: on a CPU faster than one process with as many threads.
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from examples.tiny_world.muon import Muon
from utils.errors import UserError
from utils.files import atomic_path


class Training:
    """A model in training and how far it is; starts from the checkpoint `file` where there is one.

    Muon takes the weights for which is_matrix(name, weight) holds, with `rate` as its learning rate; AdamW takes the
    others with half of it. schedule(step) is a factor on both.
    """

    def __init__(
        self,
        model: nn.Module,
        file: Path,
        rate: float,
        is_matrix: Callable[[str, Tensor], bool],
        schedule: Callable[[int], float],
    ):
        self.model, self.file, self.schedule, self.step = model, file, schedule, 0
        named = dict(model.named_parameters())
        matrices = [weight for name, weight in named.items() if is_matrix(name, weight)]
        others = [weight for name, weight in named.items() if not is_matrix(name, weight)]
        self.rates = (rate, rate / 2)
        self.optimizers = (
            Muon(matrices, rate, weight_decay=0.02),
            torch.optim.AdamW(others, rate / 2, (0.9, 0.98), weight_decay=0.01),
        )
        self.average = {name: weight.detach().clone() for name, weight in named.items()}
        if file.is_file():
            state = torch.load(file, weights_only=True)
            model.load_state_dict(state["model"])
            self.average, self.step = state["average"], state["step"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def learn_from(self, loss: Tensor) -> None:
        """Take a step down the gradient of the loss with both optimizers, and follow it with the average.

        With several processes: of the mean of their losses.
        """
        loss.backward()
        average_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * self.schedule(self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(0.998, self.step / (self.step + 10))
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                self.average[name].lerp_(weight, 1 - decay)

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"model": self.model.state_dict(), "average": self.average, "step": self.step}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.file) as temporary:
            torch.save({**state, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, temporary)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model have the average of its weights for a while."""
        live = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self._set(self.average)
        yield
        self._set(live)

    @torch.no_grad()
    def _set(self, weights: dict[str, Tensor]) -> None:
        for name, weight in self.model.named_parameters():
            weight.copy_(weights[name])


def average_gradients(model: nn.Module) -> None:
    """Let every process have the mean of all processes' gradients; a weight without one, in all of them, stays so."""
    if PartialState().num_processes == 1:
        return
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def run(*words: object, processes: int = 1) -> None:
    """Run Python with a script or "-m" and a module, and arguments, by so many processes; UserError when it fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command = [sys.executable, *(torchrun if processes > 1 else []), *words]
    if subprocess.run([str(word) for word in command]).returncode:
        name = words[1] if words[0] == "-m" else words[0]
        raise UserError(f"{name} did not finish", "run the same command again: it goes on from what is done")
