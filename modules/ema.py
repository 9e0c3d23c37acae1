"""An exponential moving average of what is trained, beside it."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils.errors import UserError
from utils.options import option


@dataclass(frozen=True)
class EmaOptions:
    """the average of a LoRA's weights over the steps"""

    ema_decay: float | None = option(
        None, "keep one whose old value counts so much at each step, e.g. 0.999, and save it as NAME_ema.safetensors"
    )
    ema_for_samples: bool = option(False, "make samples and measure the validation loss with it")


def check_ema(options: EmaOptions, beside: bool) -> None:
    """Raise UserError for a decay that cannot be, and unless what is trained is a network beside the DiT."""
    if options.ema_decay is None:
        if options.ema_for_samples:
            raise UserError("--ema_for_samples: there is no average", "add --ema_decay 0.999")
        return
    if not 0 < options.ema_decay < 1:
        raise UserError(f"--ema_decay {options.ema_decay:g}: must be between 0 and 1", "0.99 to 0.9999 are usual")
    if not beside:
        raise UserError(
            "--ema_decay: is not available in fine-tuning, where it would take the memory of a second model",
            "average saved files with lora_post_hoc_ema.py",
        )


class Average:
    """The average, by torch's own functions: the weights after the first step, moved by (1 - decay) at each later."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.live = nn.ParameterList(parameters)
        self.model = AveragedModel(self.live, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update(self) -> None:
        """Take in the weights after a step."""
        self.model.update_parameters(self.live)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While it is entered the trained weights are the average."""
        kept = [parameter.detach().clone() for parameter in self.live]
        try:
            with torch.no_grad():
                for parameter, average in zip(self.live, self.model.parameters(), strict=True):
                    parameter.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.live, kept, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average. Raises UserError where it is of something else."""
        try:
            self.model.load_state_dict(state)
        except RuntimeError:
            raise UserError(
                "--resume: the average in the state does not fit", "use the options of the run that saved it"
            ) from None
