"""--ckpt_dir: an official repository's files, found by their names."""

import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_generate_video
from modules.generation_options import GenerationPairOptions
from modules.official_folder import from_folder
from tests.test_script_wan_generate_video import arguments
from utils.errors import UserError
from wan.clip import ClipOptions
from wan.configs import TASKS
from wan.dit_file import DitOptions
from wan.t5 import T5Options
from wan.vae import VaeOptions

NOTHING = (DitOptions(), GenerationPairOptions(), VaeOptions(), T5Options(), ClipOptions())
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


@pytest.fixture
def folder(tmp_path):
    """The names of official repositories, of Wan2.1 and Wan2.2 at once."""
    names = ["models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", CLIP, "google/umt5-xxl/spiece.model"]
    parts = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    names += [*parts, *(f"{side}_noise_model/{part}" for side in ("low", "high") for part in parts)]
    for name in names:
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_text("x")
    return tmp_path / "repo"


def named(options, folder):
    dit, pair, vae, t5, clip = options
    paths = (dit.dit, pair.dit_high_noise, vae.vae, t5.t5, t5.t5_tokenizer, clip.clip)
    return [path and path.relative_to(folder).as_posix() for path in paths]


def test_each_task_gets_the_files_it_needs(folder, caplog):
    caplog.set_level("INFO")
    part = "diffusion_pytorch_model-00001-of-00002.safetensors"
    common = ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"]
    for task, dit, high, clip in (
        ("t2v-14B", part, None, None),
        ("i2v-14B", part, None, CLIP),
        ("i2v-A14B", f"low_noise_model/{part}", f"high_noise_model/{part}", None),
    ):
        assert named(from_folder(folder, TASKS[task], *NOTHING), folder) == [dit, high, *common, clip]
    assert f"--ckpt_dir: --vae {folder / 'Wan2.1_VAE.pth'}" in caplog.text
    assert from_folder(None, TASKS["t2v-14B"], *NOTHING) == NOTHING


def test_what_is_named_counts(folder):
    given = (
        replace(DitOptions(), dit=folder / "my.safetensors"),
        NOTHING[1],
        *NOTHING[2:3],
        T5Options(folder / "my.pth"),
    )
    found = named(from_folder(folder, TASKS["t2v-A14B"], *given, ClipOptions()), folder)
    assert found == ["my.safetensors", None, "Wan2.1_VAE.pth", "my.pth", "google/umt5-xxl", None]


def test_a_folder_without_such_files_is_refused(tmp_path):
    for path, line in ((tmp_path, "holds none of models_t5"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(UserError, match=f"--ckpt_dir {path}: {line}"):
            from_folder(path, TASKS["t2v-14B"], *NOTHING)


def test_a_folder_is_all_that_a_video_takes(models, monkeypatch, tmp_path):
    repo = tmp_path / "repo"
    (repo / "google").mkdir(parents=True)
    shutil.copytree(
        models["tokenizer"].parent,
        repo / "google" / "umt5-xxl",
        ignore=lambda *_: {p for p in _[1] if p != "spiece.model"},
    )
    for name, kind in (("models_t5_umt5-xxl-enc-bf16.pth", "t5"), ("Wan2.1_VAE.pth", "vae")):
        torch.save(load_file(models[kind]), repo / name)
    save_file(load_file(models["dit_t2v"]), repo / "diffusion_pytorch_model.safetensors", {"num_heads": "3"})
    latents = []
    for name, how in (
        ("named", {}),
        ("folder", dict.fromkeys(("dit", "vae", "t5", "t5_tokenizer")) | {"ckpt_dir": repo}),
    ):
        path = tmp_path / f"{name}.safetensors"
        monkeypatch.setattr(sys, "argv", ["x", *arguments(models, save_path=path, output_type="latent", **how)])
        wan_generate_video.main()
        latents.append(load_file(path)["latent"])
    assert torch.equal(*latents)
