import random
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F

from examples.tiny_world.world import draw, random_scene
from modules.outputs import Files, Result, load_latent
from modules.solvers import Step
from modules.watching import PartialKeeper, Previewer, latent_colours, preview_frames
from wan.vae import load_vae

WEIGHTS = Path(__file__).resolve().parent.parent / "examples" / "tiny_world" / "weights"


@pytest.fixture(scope="module")
def vae():
    return load_vae(WEIGHTS / "vae.safetensors", torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def colours(vae):
    return latent_colours(vae)


def test_colours_fitted_to_the_vae_show_what_decoding_shows(vae, colours):
    """A tenth of the pictures' own spread is off at most, on clips that the fit has not seen."""
    rng = random.Random(3)
    errors = []
    for _ in range(6):
        video = torch.from_numpy(draw(random_scene(rng)))
        pixels = rearrange(video, "f h w c -> 1 c f h w").float() / 127.5 - 1
        latent = vae.encode(pixels)[0]
        got = rearrange(latent, "c f h w -> f h w c") @ colours[:-1] + colours[-1]
        small = F.avg_pool2d(rearrange(pixels, "1 c f h w -> f c h w"), 8)[[0, 2, 6, 10, 14]]
        errors.append((got.clamp(-1, 1) - rearrange(small, "f c h w -> f h w c")).square().mean())
    assert torch.stack(errors).mean().sqrt() < 0.45
    frames = preview_frames(latent, colours)
    assert frames.shape == (5, 256, 256, 3) and frames.dtype == np.uint8


def test_a_preview_comes_every_so_many_steps_and_shows_where_they_lead(tmp_path, vae, colours):
    scene = torch.from_numpy(draw(random_scene(random.Random(1))))
    clean = vae.encode(rearrange(scene, "f h w c -> 1 c f h w").float() / 127.5 - 1)[0]
    previewer = Previewer(2, colours)
    previewer.begin(Result(Files(video=tmp_path / "cat.mp4"), 17))
    path, times = tmp_path / "cat_preview.gif", []
    for index, sigma in enumerate((1.0, 0.8, 0.5, 0.2)):
        previewer.step(Step(index, 1000 * sigma, sigma), clean)
        times.append(path.stat().st_mtime_ns if path.exists() else 0)
    assert times[0] == 0 < times[1] == times[2] < times[3]
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (5, (256, 256), 250)
        shown = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(shown - preview_frames(clean, colours)[0]).mean() < 8


def test_what_a_stopped_run_aimed_at_is_kept(tmp_path):
    clean = torch.randn((16, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    results = [Result(Files(video=tmp_path / f"{name}.mp4"), 5, {"prompt": name}) for name in "ab"]
    with pytest.raises(KeyboardInterrupt), PartialKeeper() as keeper:
        for result in results:
            keeper.begin(result)
            keeper.step(Step(0, 900.0, 0.9), clean)
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["b_partial_latent.safetensors"]
    latent, metadata = load_latent(tmp_path / "b_partial_latent.safetensors")
    assert torch.equal(latent, clean) and metadata == {"prompt": "b", "steps_done": 1}


def test_nothing_is_kept_of_a_run_that_ends_well_or_before_its_first_step(tmp_path):
    with PartialKeeper() as keeper:
        keeper.begin(Result(Files(video=tmp_path / "a.mp4"), 5))
        keeper.step(Step(0, 900.0, 0.9), torch.zeros(16, 1, 2, 2))
    with pytest.raises(ZeroDivisionError), PartialKeeper() as keeper:
        keeper.begin(Result(Files(video=tmp_path / "a.mp4"), 5))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
