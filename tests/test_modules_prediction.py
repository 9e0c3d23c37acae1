"""What the DiT is told in training: places in time, timesteps, and both as musubi-tuner has them."""

import pytest
import torch

from dataset.loader import Batch
from modules.prediction import Told, as_told, predict
from wan.configs import TASKS


def told_to_the_dit(told, config="i2v-14B", indices=(0, 9)):
    """Return the arguments of the DiT for a batch of two one-frame examples at t = 0.25 and 1."""
    seen = {}

    def dit(x, timestep, text, **more):
        seen.update(more, timestep=timestep)
        return x

    frames = len(indices)
    batch = Batch(
        latents=torch.zeros(2, 16, frames, 4, 6),
        text=[torch.zeros(3, 64)] * 2,
        latents_image=torch.zeros(2, 20, frames, 4, 6),
        clip=torch.arange(2.0).reshape(2, 1, 1).expand(2, 257, 8),
        frame_indices=torch.tensor([indices, indices]),
    )
    predict(dit, TASKS[config], batch, batch.latents, torch.tensor([0.25, 1.0]), told)
    return seen


def test_the_dit_is_told_where_in_time_frames_are_and_1000_t():
    seen = told_to_the_dit(Told())
    assert seen["frame_indices"] == [[0, 9], [0, 9]] and seen["timestep"].tolist() == [250.0, 1000.0]
    assert as_told(False, "shift") == Told()


@pytest.mark.parametrize(
    ("sampling", "timesteps"), [("sigma", [250.0, 1000.0]), ("shift", [251.0, 1001.0]), ("uniform", [251.0, 1001.0])]
)
def test_compat_musubi_counts_frames_from_0_and_adds_1_to_timesteps_off_the_table(sampling, timesteps):
    seen = told_to_the_dit(as_told(True, sampling))
    assert seen["frame_indices"] is None and seen["timestep"].tolist() == timesteps
