import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import wan_generate_video
from modules.outputs import save_picture
from modules.prompts import PromptOptions
from modules.repeating import stored_options
from modules.video_files import read_comment
from utils.errors import UserError
from utils.options import parse_options


@pytest.fixture
def generate(models, monkeypatch):
    """A run of the script in this process, by the words of its command line."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["wan_generate_video.py", *map(str, words)])
        wan_generate_video.main()

    return run


@pytest.fixture
def command(models):
    files = {"dit": "dit_t2v", "vae": "vae", "t5": "t5", "t5_tokenizer": "tokenizer"}
    words = ["--task", "t2v-1.3B", "--prompt", "a red circle", "--video_size", 32, 48, "--video_length", 5]
    words += ["--infer_steps", 2, "--device", "cpu", "--guidance_scale", 2.5, "--sample_solver", "dpm++"]
    return [*words, *(word for name, key in files.items() for word in (f"--{name}", models[key]))]


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_a_file_is_made_again_bit_by_bit(generate, command, tmp_path, name, monkeypatch):
    """With a seed that was drawn, from another folder, next to the first one where nothing is said of a place."""
    more = ["--video_length", 1, "--output_type", "images"] if name == "a.png" else []
    generate(*command, *more, "--save_path", tmp_path / name)
    first = (tmp_path / name).read_bytes()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    generate("--from_metadata", f"../{name}", *(more[2:]), "--video_format", "mp4")
    (again,) = (path for path in tmp_path.iterdir() if path.is_file() and path.name != name)
    assert again.read_bytes() == first and again.suffix == f".{name[2:]}"


KINDS = {
    "a.webm": ["--crf", 40, "--fps", 8],
    "b.png": ["--video_format", "png", "--trim_tail_frames", 1],
    "c.png": ["--output_type", "images", "--video_length", 1],
    "d.safetensors": ["--output_type", "latent"],
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_made_again_as_the_kind_of_file_it_is(generate, command, tmp_path, name):
    first = tmp_path / name
    generate(*command, *KINDS[name], "--save_path", first)
    generate("--from_metadata", first, "--save_path", tmp_path / "out")
    (again,) = (tmp_path / "out").iterdir()
    assert again.suffix == first.suffix
    if name != "d.safetensors":
        assert again.read_bytes() == first.read_bytes()
    generate("--from_metadata", first, "--save_path", tmp_path / "another.mp4")
    assert (tmp_path / "another.mp4").exists(), "a name of another kind wins"


def test_an_approximate_video_of_listed_timesteps_is_made_again(generate, command, tmp_path, caplog):
    more = ["--sample_solver", "vanilla", "--infer_steps", 3, "--timesteps", "1000,700,400", "--cfg_zero_star"]
    more += [
        "--step_cache",
        "easycache",
        "--step_cache_threshold",
        9,
        "--step_cache_warmup",
        0.3,
        "--riflex_freq_index",
        2,
    ]
    latent = ["--output_type", "latent"]
    caplog.set_level("INFO")
    generate(*command, *more, "--compare_exact", *latent, "--save_path", tmp_path / "a.safetensors")
    assert "--compare_exact: seed" in caplog.text
    caplog.clear()
    generate("--from_metadata", tmp_path / "a.safetensors", *latent, "--save_path", tmp_path / "b.safetensors")
    assert "--compare_exact: seed" not in caplog.text
    first, second = (load_file(tmp_path / name)["latent"] for name in ("a.safetensors", "b.safetensors"))
    assert torch.equal(first, second)


def test_typed_options_win_over_those_of_the_file(generate, command, tmp_path):
    generate(*command, "--seed", 4, "--save_path", tmp_path / "a.mp4")
    generate("--from_metadata", tmp_path / "a.mp4", "--infer_steps", 3, "--save_path", tmp_path / "b.mp4")
    first, second = (read_comment(tmp_path / name) for name in ("a.mp4", "b.mp4"))
    assert {**first, "infer_steps": 3} == second


def test_weights_and_loras_that_have_changed_are_named(generate, command, models, tmp_path, caplog):
    lora = tmp_path / "lora.safetensors"
    tensors = {
        f"lora_unet_blocks_0_self_attn_q.{kind}.weight": np.ones(shape, np.float32)
        for kind, shape in (("lora_down", (1, 96)), ("lora_up", (96, 1)))
    }
    save_arrays(tensors, lora)
    dit = tmp_path / "dit.safetensors"
    shutil.copy(models["dit_t2v"], dit)
    generate(*command, "--dit", dit, "--lora_weight", lora, "--save_path", tmp_path / "a.mp4")
    caplog.clear()
    generate("--from_metadata", tmp_path / "a.mp4", "--save_path", tmp_path / "b.mp4")
    assert not [record for record in caplog.records if "is not the file" in record.message]
    save_arrays({name: 2 * array for name, array in tensors.items()}, lora)
    changed = load_file(dit)
    changed["head.head.bias"] += 1
    save_file(changed, dit)
    generate("--from_metadata", tmp_path / "a.mp4", "--save_path", tmp_path / "c.mp4")
    told = [record.message for record in caplog.records if "is not the file" in record.message]
    assert [line.split()[0] for line in told] == ["--dit", "--lora_weight"]


def test_a_latent_of_musubi_tuner_gives_what_it_says(tmp_path):
    path = tmp_path / "a.safetensors"
    said = {"seeds": "42", "prompt": "a cat", "height": "480", "width": "832", "video_length": "81"}
    said |= {"infer_steps": "20", "guidance_scale": "5.0"}
    save_file({"latent": torch.zeros(16, 1, 2, 2)}, path, said)
    where, values = stored_options({"from_metadata": path})
    assert where == f"--from_metadata {path}"
    expected = {"prompt": "a cat", "video_length": 81, "infer_steps": 20, "guidance_scale": 5.0, "seed": 42}
    assert values == {**expected, "video_size": [480, 832], "save_path": str(tmp_path)}


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (lambda path: None, "no such file"),
        (lambda path: Image.new("RGB", (8, 8)).save(path), "does not say how it was made"),
        (lambda path: save_picture(path, np.zeros((8, 8, 3), np.uint8), {"a": 1}), "does not say how it was made"),
    ],
)
def test_what_does_not_say_how_it_was_made_is_refused(tmp_path, write, line):
    write(tmp_path / "a.png")
    with pytest.raises(UserError, match=line):
        stored_options({"from_metadata": tmp_path / "a.png"})


def test_metadata_of_other_types_are_refused_like_typed_options(tmp_path):
    save_picture(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), {"prompt": "x", "infer_steps": "many"})
    with pytest.raises(UserError, match="infer_steps = 'many': must be a whole number"):
        parse_options(
            "",
            PromptOptions,
            argv=["--from_metadata", str(tmp_path / "a.png")],
            below=lambda given: ("a.png", {"infer_steps": "many"}),
        )
