"""Each kind of training as a user runs it: media, caches by the task's options, two steps by the task's name."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from dataset.cache import read_tensors, write_text
from dataset.config import load_config
from dataset.items import find_sources
from tests.media import drawing, write_pictures, write_toml, write_video
from utils.errors import UserError
from utils.safetensors_io import read_metadata

GENERAL = {"resolution": [48, 32], "caption_extension": ".txt", "enable_bucket": True}
VIDEOS = {"video_directory": "videos", "target_frames": [5]}
CONTROLLED = VIDEOS | {"control_directory": "control_videos"}
EDITS = {"image_directory": "pictures", "control_directory": "controls", "fp_1f_target_index": 1}
TRAIN = "--max_train_steps 2 --learning_rate 1e-2 --seed 1 --max_data_loader_n_workers 0 --output_name n"
# task, weights, dataset, options of wan_cache_latents.py, the tensors that they make
KINDS = {
    "t2v": ("t2v-1.3B", "dit_t2v", VIDEOS, "", {"latents"}),
    "t2i": ("t2i-14B", "dit_t2v", {"image_directory": "pictures"}, "", {"latents"}),
    "i2v": ("i2v-14B", "dit_i2v", VIDEOS, "--clip CLIP", {"latents", "latents_image", "clip"}),
    "i2v_wan22": ("i2v-A14B", "dit_i2v_a14b", VIDEOS, "--i2v", {"latents", "latents_image"}),
    "t2v_control": ("t2v-1.3B-FC", "dit_fun", CONTROLLED, "", {"latents", "latents_control"}),
    "i2v_control": (
        *("i2v-14B-FC", "dit_fun", CONTROLLED, "--clip CLIP"),
        {"latents", "latents_image", "latents_control", "clip"},
    ),
    "one_frame": (
        *("i2v-14B", "dit_i2v", EDITS | {"fp_1f_clean_indices": [0]}, "--one_frame --clip CLIP"),
        {"latents", "latents_image", "clip", "f_indices"},
    ),
    "one_frame_wan22": (
        *("i2v-A14B", "dit_i2v_a14b", EDITS | {"fp_1f_clean_indices": [0]}, "--one_frame"),
        {"latents", "latents_image", "f_indices"},
    ),
    "one_frame_two": (
        *("flf2v-14B", "dit_flf2v", EDITS | {"fp_1f_clean_indices": [0, 2]}, "--one_frame --clip CLIP"),
        {"latents", "latents_image", "clip", "f_indices"},
    ),
}


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with videos, pictures, and controls for both."""
    for name in ("videos", "control_videos"):
        write_video(tmp_path / name / "a.mp4", 9, 48, 32)
        (tmp_path / name / "a.txt").write_text("a red square moves right")
    write_pictures(tmp_path / "pictures", {"a": (48, 32)})
    write_pictures(tmp_path / "controls", {"a_0": (48, 32), "a_1": (48, 32)}, caption=None)
    return tmp_path


def data_file(folder: Path, dataset: dict) -> Path:
    paths = {key: folder / value if "directory" in key else value for key, value in dataset.items()}
    return write_toml(folder / "data.toml", GENERAL, paths | {"cache_directory": folder / "cache"})


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a script with its command line, in this process: a new one would import torch for seconds."""

    def run(script: str, *arguments: object) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        importlib.import_module(script).main()

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_cached_by_its_options_and_trained_by_its_task(kind, media, models, run):
    task, dit, dataset, options, names = KINDS[kind]
    data = data_file(media, dataset)
    options = options.replace("CLIP", str(models["clip"])).split()
    run("wan_cache_latents", "--dataset_config", data, "--vae", models["vae"], *options)
    (cached,) = (media / "cache").iterdir()
    assert read_tensors(cached).keys() == names
    (config,) = load_config(data)
    for source in find_sources(config):
        write_text(config, source, torch.randn(7, 64))
    run("wan_train_network", "--task", task, "--dit", models[dit], *TRAIN.split(), *folders(media))
    lora = load_file(media / "out" / "n.safetensors")
    assert all(up.isfinite().all() and up.any() for key, up in lora.items() if "cross_attn" in key and "up" in key)


def test_one_frame_training_as_the_document_has_it_and_as_musubi_tuner_does_it(media, models, run):
    """Whatever the dataset says, musubi-tuner counts frames from 0."""
    for target in (1, 9):
        data = data_file(media, EDITS | {"fp_1f_clean_indices": [0], "fp_1f_target_index": target})
        data = data.rename(media / f"data{target}.toml")
        data.write_text(data.read_text().replace("/cache", f"/cache{target}"))
        options = ["--vae", models["vae"], "--one_frame", "--clip", models["clip"]]
        run("wan_cache_latents", "--dataset_config", data, *options)
        (config,) = load_config(data)
        (source,) = find_sources(config)
        write_text(config, source, torch.randn(7, 64, generator=torch.Generator().manual_seed(1)))
    start = media / "controls" / "a_0.png"
    line = f"the square --i {start} --ci {start} --of target_index=1,control_index=0 --d 1 --f 1 --s 2 --w 48 --h 32"
    (media / "prompts.txt").write_text(line)
    common = ["--task", "i2v-14B", "--dit", models["dit_i2v"], *TRAIN.split()]
    sampling = ["--one_frame", "--sample_prompts", media / "prompts.txt", "--sample_every_n_steps", 2]
    sampling += ["--t5", models["t5"], "--t5_tokenizer", models["tokenizer"], "--clip", models["clip"]]
    sampling += ["--vae", models["vae"]]
    ways = {"near": (1, []), "far": (9, sampling), "counted": (9, ["--compat_musubi"])}
    for name, (target, more) in ways.items():
        data = media / f"data{target}.toml"
        run("wan_train_network", *common, "--dataset_config", data, "--output_dir", media / name, *more)
    near, far, counted = (load_file(media / name / "n.safetensors") for name in ways)
    up = next(key for key in near if "self_attn" in key and "lora_up" in key)
    assert torch.equal(near[up], counted[up]) and not torch.equal(near[up], far[up])
    said = json.loads(read_metadata(media / "counted" / "n.safetensors")["wan_tuner"])
    assert said["one_frame"] and said["compat_musubi"] and said["task"] == "i2v-14B"
    (sample,) = (media / "far" / "sample").iterdir()
    assert Image.open(sample).size == (48, 32) and sample.name.endswith("_1_000.png")


def folders(media: Path) -> list[object]:
    return ["--dataset_config", media / "data.toml", "--output_dir", media / "out"]


def test_flf2v_is_trained_on_videos_with_samples_between_two_pictures(media, models, run, run_cli):
    data = data_file(media, VIDEOS)
    caching = ["--dataset_config", data, "--vae", models["vae"], "--clip", models["clip"]]
    text = ["--t5", models["t5"], "--t5_tokenizer", models["tokenizer"]]
    run("wan_cache_latents", *caching)
    run("wan_cache_text_encoder_outputs", "--dataset_config", data, *text)
    for name, moved in (("first", 0), ("last", 6)):
        Image.fromarray(drawing(moved, 48, 32)).save(media / f"{name}.png")
    prompt = f"a red square --w 48 --h 32 --f 5 --s 2 --d 1 --i {media / 'first.png'} --ei {media / 'last.png'}"
    (media / "prompts.txt").write_text(prompt)
    sampling = ["--sample_every_n_steps", 2, "--sample_prompts", media / "prompts.txt", "--vae", models["vae"], *text]
    training = ["--task", "flf2v-14B", "--dit", models["dit_flf2v"], *TRAIN.split(), *folders(media), *sampling]
    training += ["--clip", models["clip"]]
    with pytest.raises(UserError, match="Run wan_cache_latents.py with --flf2v --clip PATH again"):
        run("wan_train_network", *training)
    for command in (("wan_cache_latents.py", *caching, "--flf2v"), ("wan_train_network.py", *training)):
        done = run_cli(*command)
        assert done.returncode == 0, done.stderr
    lora = load_file(media / "out" / "n.safetensors")
    assert all(up.any() for key, up in lora.items() if "img" in key and "up" in key)
    (sample,) = (media / "out" / "sample").iterdir()
    assert sample.name.startswith("n_000002_00_") and sample.suffix == ".mp4"
