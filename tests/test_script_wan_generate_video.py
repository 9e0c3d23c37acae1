import hashlib
import json
import shutil
import sys

import av
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wan_generate_video
from tests.forked import fork, needs_fork
from utils.errors import UserError
from wan.model import WanModel

SCRIPT = "wan_generate_video.py"
SMALL = ("--video_size", 32, 48, "--video_length", 5, "--infer_steps", 2, "--seed", 7, "--device", "cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A start image, 96 wide and 64 high."""
    path = tmp_path_factory.mktemp("pictures") / "start.png"
    ramp = np.linspace(0, 255, 96 * 64 * 3).astype(np.uint8).reshape(64, 96, 3)
    Image.fromarray(ramp).save(path)
    return path


@pytest.fixture(scope="module")
def lora(models, tmp_path_factory):
    """A LoRA for the text-to-video model that changes its first block."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name in ("self_attn_q", "self_attn_v", "cross_attn_o"):
        tensors[f"lora_unet_blocks_0_{name}.lora_down.weight"] = torch.randn(4, 96, generator=generator)
        tensors[f"lora_unet_blocks_0_{name}.lora_up.weight"] = torch.randn(96, 4, generator=generator) * 0.1
        tensors[f"lora_unet_blocks_0_{name}.alpha"] = torch.tensor(4.0)
    path = tmp_path_factory.mktemp("loras") / "lora.safetensors"
    save_file(tensors, path)
    return path


def arguments(models, task="t2v-1.3B", dit="dit_t2v", **options):
    """Return the words of a command line with tiny models; options as in Python, None leaves one out."""
    given = {
        "task": task,
        "dit": models.get(dit),
        "vae": models["vae"],
        "t5": models["t5"],
        "t5_tokenizer": models["tokenizer"],
        "prompt": "a red circle moves left",
        **options,
    }
    words = []
    for name, value in given.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None:
            words += [f"--{name}", *(value if isinstance(value, (list, tuple)) else [value])]
    return list(map(str, (*SMALL, *words)))


@pytest.fixture
def generate(monkeypatch, models):
    """Run the script's main() with tiny models and the given options."""

    def run(**options):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments(models, **options)])
        wan_generate_video.main()

    return run


def refused(generate, **options):
    with pytest.raises(UserError) as error:
        generate(**options)
    return str(error.value)


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def comment_of(path):
    with av.open(str(path)) as container:
        return json.loads(container.metadata["comment"])


def latent_of(path):
    return load_file(path)["latent"]


def test_a_command_makes_a_video_and_its_latent(run_cli, models, tmp_path):
    result = run_cli(SCRIPT, *arguments(models, save_path=tmp_path / "new" / "a.mp4", output_type="both"))
    assert result.returncode == 0, result.stderr
    assert "--video_size 32 48: 32 high, 48 wide, 5 frames, 2 steps" in result.stderr
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.mp4", "a_latent.safetensors"]
    assert frames_of(tmp_path / "new" / "a.mp4").shape == (5, 32, 48, 3)
    latent = latent_of(tmp_path / "new" / "a_latent.safetensors")
    assert latent.shape == (16, 2, 4, 6) and latent.dtype == torch.float32


def test_an_error_is_one_line_and_exit_code_2(run_cli, models, tmp_path):
    result = run_cli(SCRIPT, *arguments(models, save_path=tmp_path, dit="vae"))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"{SCRIPT}: error: --dit {models['vae']}: ")


def test_the_commands_of_the_first_document_run_as_they_stand(run_cli, models, picture, tmp_path):
    """--fp8, the order of the options, a folder that does not exist yet; only sizes are small and paths are real."""
    words = f"""--fp8 --task i2v-14B --video_size  48 32 --video_length 5 --infer_steps 2
        --prompt prompt --save_path {tmp_path}/to/save.mp4 --output_type both
        --dit {models["dit_i2v"]} --vae {models["vae"]}
        --t5 {models["t5"]} --clip {models["clip"]}
        --attn_mode torch --image_path {picture}""".split()
    result = run_cli(SCRIPT, *words, "--t5_tokenizer", models["tokenizer"], "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"save.mp4", "save_latent.safetensors"}


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(generate, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        generate(save_path=tmp_path / f"{name}.safetensors", output_type="latent", seed=seed)
    a, b, c = (latent_of(tmp_path / f"{name}.safetensors") for name in "abc")
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=0.1)


def test_pictures_and_video_show_the_same_frames(generate, tmp_path):
    generate(save_path=tmp_path / "a.mp4")
    generate(save_path=tmp_path / "a.png", output_type="images")
    pictures = np.stack([np.array(Image.open(tmp_path / f"a_{i:03d}.png")) for i in range(5)])
    blocks = [
        rearrange(x / 1.0, "f (h a) (w b) c -> f h w (a b) c", a=4, b=4)
        for x in (pictures, frames_of(tmp_path / "a.mp4"))
    ]
    # Random weights draw coloured noise, of which 4:2:0 keeps the mean.
    assert np.abs(blocks[0].mean(3) - blocks[1].mean(3)).mean() < 6


def test_a_saved_latent_decodes_to_the_same_pixels(generate, tmp_path):
    generate(save_path=tmp_path / "a.png", output_type="latent_images", video_length=1)
    only_vae = {"dit": "vae", "t5": None, "t5_tokenizer": None, "prompt": None}
    generate(
        **only_vae, latent_path=tmp_path / "a_latent.safetensors", save_path=tmp_path / "b.png", output_type="images"
    )
    a, b = (Image.open(tmp_path / f"{name}.png") for name in "ab")
    assert np.array_equal(np.array(a), np.array(b))
    assert json.loads(a.text["comment"]) == json.loads(b.text["comment"])


def test_several_latents_decode_into_a_folder(generate, tmp_path):
    for name in "ab":
        generate(save_path=tmp_path / f"{name}.safetensors", output_type="latent", vae=None)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    generate(latent_path=paths, save_path=tmp_path / "out")
    assert sorted(path.name[19:] for path in (tmp_path / "out").iterdir()) == ["_7_a.mp4", "_7_b.mp4"]


def test_everything_needed_to_make_it_again_is_in_the_file(generate, lora, models, tmp_path):
    generate(
        save_path=tmp_path / "a.mp4", output_type="both", lora_weight=[lora], lora_multiplier=[0.5], flow_shift=3.5
    )
    found = comment_of(tmp_path / "a.mp4")
    assert found["prompt"] == "a red circle moves left" and found["negative_prompt"].startswith("色调艳丽")
    wanted = {"seeds": 7, "height": 32, "width": 48, "video_length": 5, "infer_steps": 2, "guidance_scale": 5.0}
    wanted |= {"flow_shift": 3.5, "task": "t2v-1.3B", "sample_solver": "unipc", "dit": "dit_t2v.safetensors"}
    assert {name: found[name] for name in wanted} == wanted
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert found["lora"] == [{"file": "lora.safetensors", "sha256": digest, "multiplier": 0.5}]
    assert found["software"].startswith("wan-tuner 0.")
    with safe_open(tmp_path / "a_latent.safetensors", "pt") as file:
        texts = file.metadata()
    assert texts["prompt"] == found["prompt"] and (texts["seeds"], texts["height"], texts["width"]) == ("7", "32", "48")
    assert set(texts) == set(found)


def test_no_metadata_leaves_none(generate, tmp_path):
    generate(save_path=tmp_path / "a.mp4", output_type="both", no_metadata=True)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert "comment" not in container.metadata
    with safe_open(tmp_path / "a_latent.safetensors", "pt") as file:
        assert not file.metadata()


def test_a_lora_of_strength_0_changes_nothing_and_of_strength_1_something(generate, lora, tmp_path):
    runs = {"none": {}, "zero": {"lora_weight": [lora], "lora_multiplier": [0]}, "one": {"lora_weight": [lora]}}
    runs["halves"] = {"lora_weight": [lora, lora], "lora_multiplier": [0.5, 0.5]}
    latents = {}
    for name, options in runs.items():
        generate(save_path=tmp_path / f"{name}.safetensors", output_type="latent", **options)
        latents[name] = latent_of(tmp_path / f"{name}.safetensors")
    assert torch.equal(latents["none"], latents["zero"])
    assert not torch.allclose(latents["none"], latents["one"], atol=1e-3)
    torch.testing.assert_close(latents["one"], latents["halves"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 3), (5.0, 6)])
def test_guidance_1_asks_the_model_once_a_step(generate, monkeypatch, tmp_path, guidance, calls):
    seen, forward = [], WanModel.forward

    def counting(self, *inputs, **more):
        seen.append(inputs[1])
        return forward(self, *inputs, **more)

    monkeypatch.setattr(WanModel, "forward", counting)
    path = tmp_path / "a.safetensors"
    generate(save_path=path, output_type="latent", guidance_scale=guidance, infer_steps=3, vae=None)
    assert len(seen) == calls


def test_lines_of_a_file_equal_single_runs(generate, tmp_path):
    lines = ["a red circle --d 7 --n dark", "a red circle --d 7 --n bright", "a blue star --d 3 --f 1 --w 32 --s 3"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    generate(
        prompt=None, from_file=tmp_path / "prompts.txt", save_path=tmp_path / "out", output_type="latent", seed=None
    )
    single = [
        {"prompt": "a red circle", "negative_prompt": "dark"},
        {"prompt": "a red circle", "negative_prompt": "bright"},
        {"prompt": "a blue star", "seed": 3, "video_length": 1, "video_size": [32, 32], "infer_steps": 3},
    ]
    for i, options in enumerate(single):
        generate(save_path=tmp_path / f"{i}.safetensors", output_type="latent", **options)
    together = sorted((tmp_path / "out").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(together) == 3
    for i, path in enumerate(together):
        assert torch.equal(latent_of(path), latent_of(tmp_path / f"{i}.safetensors")), path.name


def test_a_video_has_the_shape_of_its_start_image(generate, models, picture, tmp_path):
    i2v = {"task": "i2v-14B", "dit": "dit_i2v", "clip": models["clip"], "output_type": "latent"}
    generate(**i2v, video_size=[32, 128], image_path=picture, save_path=tmp_path / "a.safetensors")
    assert latent_of(tmp_path / "a.safetensors").shape == (16, 2, 6, 8), "48 high, 64 wide: 3 to 2 in at most 32 x 128"


def test_a_start_image_is_turned_upright(generate, models, picture, tmp_path):
    upright = Image.open(picture)
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif(6))
    latents = []
    for i, path in enumerate((picture, tmp_path / "turned.png")):
        i2v = {"task": "i2v-14B", "dit": "dit_i2v", "clip": models["clip"], "output_type": "latent"}
        generate(**i2v, image_path=path, save_path=tmp_path / f"{i}.safetensors")
        latents.append(latent_of(tmp_path / f"{i}.safetensors"))
    assert torch.equal(*latents)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_an_end_image_makes_four_more_frames_unless_the_model_has_a_place_for_it(generate, models, picture, tmp_path):
    both = {"image_path": picture, "end_image_path": picture, "clip": models["clip"], "output_type": "images"}
    generate(**both, task="i2v-14B", dit="dit_i2v", save_path=tmp_path / "i2v", trim_tail_frames=3)
    generate(**both, task="flf2v-14B", dit="dit_flf2v", save_path=tmp_path / "flf2v")
    assert len(list((tmp_path / "i2v").glob("*/*.png"))) == 6
    assert len(list((tmp_path / "flf2v").glob("*/*.png"))) == 5


def test_a_control_video_needs_no_image_encoder(generate, picture, tmp_path):
    folder = tmp_path / "control"
    folder.mkdir()
    for i in range(5):
        shutil.copy(picture, folder / f"{i}.png")
    control = {"task": "t2v-1.3B-FC", "dit": "dit_fun", "control_path": folder, "output_type": "latent"}
    generate(**control, save_path=tmp_path / "a.safetensors")
    assert latent_of(tmp_path / "a.safetensors").shape == (16, 2, 4, 6)
    line = refused(generate, **control, video_length=9, save_path=tmp_path / "a.safetensors")
    assert f"--control_path {folder}: 5 frames, the video is to have 9" in line


def test_a_picture_is_one_frame(generate, tmp_path):
    generate(task="t2i-14B", video_length=1, output_type="images", save_path=tmp_path)
    (path,) = tmp_path.iterdir()
    assert Image.open(path).size == (48, 32)


@pytest.mark.parametrize(
    "options",
    [{"fp8": True}, {"fp8_scaled": True}, {"sample_solver": "dpm++"}, {"cpu_noise": True}, {"quantize": "int8"}],
)
def test_every_way_of_running_makes_finite_latents_near_the_plain_one(generate, tmp_path, options):
    for name, more in (("plain", {}), ("other", options)):
        generate(save_path=tmp_path / f"{name}.safetensors", output_type="latent", vae=None, **more)
    plain, other = (latent_of(tmp_path / f"{name}.safetensors") for name in ("plain", "other"))
    assert (plain - other).norm() / plain.norm() < 0.3
    assert torch.equal(plain, other) == ("cpu_noise" in options), "a CPU draws the noise on the CPU anyway"


@pytest.mark.parametrize("options", [{}, {"fp8_scaled": True, "slg_mode": "original", "slg_layers": "1", "slg_end": 1}])
def test_swapped_blocks_make_the_same_latents_bit_by_bit(generate, lora, tmp_path, options):
    swaps = ({}, {"blocks_to_swap": 1}, {"blocks_to_swap": 2, "block_swap_ring_size": 1})
    swaps += ({"blocks_to_swap": "auto"}, {"blocks_to_swap": 2, "weights_on_disk": True})
    for number, swap in enumerate(swaps):
        path = tmp_path / f"{number}.safetensors"
        generate(save_path=path, output_type="latent", vae=None, lora_weight=[lora], **options, **swap)
    plain, *others = (latent_of(tmp_path / f"{number}.safetensors") for number in range(len(swaps)))
    assert all(torch.equal(plain, other) for other in others)


@needs_fork
def test_two_processes_write_the_files_that_one_writes(generate, models, lora, monkeypatch, tmp_path):
    lines = ["a red circle --d 7", "a blue star --d 3 --f 1 --w 32 --g 1"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    given = {"prompt": None, "seed": None, "from_file": tmp_path / "prompts.txt", "output_type": "latent_images"}
    given["lora_weight"] = [lora]
    generate(**given, save_path=tmp_path / "one")
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments(models, **given, save_path=tmp_path / "two")])
    codes, said = fork(wan_generate_video.main, tmp_path, 2)
    assert codes == [0, 0] and said.count("2 processes: two predictions at a time") == 1, said
    one, two = (
        sorted((tmp_path / name).rglob("*.*"), key=lambda path: path.stat().st_mtime_ns) for name in ("one", "two")
    )
    assert [path.suffix for path in one] == [".safetensors"] * 2 + [".png"] * 6
    for mine, ours in zip(one[2:], two[2:], strict=True):
        assert mine.read_bytes() == ours.read_bytes(), ours
    assert all(torch.equal(latent_of(mine), latent_of(ours)) for mine, ours in zip(one[:2], two[:2], strict=True))
    decoded = {"latent_path": two[:2], "save_path": tmp_path / "decoded", "output_type": "images"}
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments(models, **decoded)])
    assert fork(wan_generate_video.main, tmp_path, 2)[0] == [0, 0]
    assert len(list((tmp_path / "decoded").rglob("*.png"))) == 6
    unguided = arguments(models, guidance_scale=1.0, save_path=tmp_path / "out")
    monkeypatch.setattr(sys, "argv", [SCRIPT, *unguided])
    codes, said = fork(wan_generate_video.main, tmp_path, 2)
    line = f"{SCRIPT}: error: 2 processes: they cannot share the 3 attention heads of this DiT equally"
    assert codes == [2, 2] and said.count("error: ") == 1 and said.splitlines()[-1].startswith(line)


@needs_fork
def test_wrong_options_are_one_line_of_the_first_process_and_help_is_shown_once(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--infer_steps", "many"])
    line = "error: --infer_steps: 'many' is not a whole number. --help lists the options."
    assert fork(wan_generate_video.main, tmp_path, 2) == ([2, 2], f"{SCRIPT}: {line}\n")
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--help"])
    codes, said = fork(wan_generate_video.main, tmp_path, 2)
    assert codes == [0, 0] and said.count("usage: ") == 1


def test_compiled_blocks_make_the_same_latents_bit_by_bit(generate, lora, tmp_path):
    compiled = {"compile": True, "compile_args": ["aot_eager", "default", "auto", "true"]}
    for name, more in (("plain", {}), ("compiled", compiled), ("swapped", {**compiled, "blocks_to_swap": 2})):
        path = tmp_path / f"{name}.safetensors"
        generate(save_path=path, output_type="latent", vae=None, lora_weight=[lora], fp8_scaled=True, **more)
    plain, *others = (latent_of(tmp_path / f"{name}.safetensors") for name in ("plain", "compiled", "swapped"))
    assert all(torch.equal(plain, other) for other in others)


def test_skip_layer_guidance_without_layers_is_ignored_with_a_warning(generate, caplog, tmp_path):
    slg = {"slg_mode": "original", "slg_end": 1.0, "output_type": "latent", "vae": None}
    for name, more in (("plain", {"output_type": "latent"}), ("ignored", slg), ("used", {**slg, "slg_layers": "1"})):
        generate(save_path=tmp_path / f"{name}.safetensors", **more)
    plain, ignored, used = (latent_of(tmp_path / f"{name}.safetensors") for name in ("plain", "ignored", "used"))
    assert torch.equal(plain, ignored) and not torch.allclose(plain, used, atol=1e-2)
    assert "--slg_mode original: ignored without --slg_layers" in caplog.text


def test_listed_timesteps_make_what_even_ones_make(generate, tmp_path):
    few = {"output_type": "latent", "vae": None, "sample_solver": "vanilla", "guidance_scale": 1, "flow_shift": 5}
    generate(save_path=tmp_path / "even.safetensors", **few, infer_steps=4)
    generate(save_path=tmp_path / "listed.safetensors", **few, infer_steps=4, timesteps="1000,750,500,250")
    assert torch.equal(latent_of(tmp_path / "even.safetensors"), latent_of(tmp_path / "listed.safetensors"))
    with safe_open(tmp_path / "listed.safetensors", "pt") as file:
        assert file.metadata()["timesteps"] == "1000,750,500,250,"


def test_riflex_is_for_long_videos(generate, caplog, tmp_path):
    caplog.set_level("INFO")
    given = {"output_type": "latent", "vae": None, "video_size": [16, 16], "infer_steps": 1, "guidance_scale": 1}
    for name, more in {
        "plain": {"video_length": 85},
        "long": {"video_length": 85, "riflex_freq_index": 3},
        "short": {"video_length": 81, "riflex_freq_index": 3},
    }.items():
        caplog.clear()
        generate(save_path=tmp_path / f"{name}.safetensors", **given, **more)
        assert ("is for videos longer than the model was trained on" in caplog.text) == (name == "short")
    assert "becomes 23.3 for the 21 of this video" in caplog.text
    assert not torch.allclose(latent_of(tmp_path / "plain.safetensors"), latent_of(tmp_path / "long.safetensors"))
    with safe_open(tmp_path / "long.safetensors", "pt") as file:
        assert file.metadata()["riflex_freq_index"] == "3"


def test_zero_star_leaves_the_first_noise_as_it_is_and_changes_the_rest(generate, caplog, tmp_path):
    latents = {}
    for name, options in {
        "plain": {"cfg_zero_init_steps": 2},
        "star": {"cfg_zero_star": True, "cfg_zero_init_steps": 0},
        "zero": {"cfg_zero_star": True},
        "short": {"cfg_zero_star": True, "guidance_scale": 1},
    }.items():
        path = tmp_path / f"{name}.safetensors"
        generate(save_path=path, output_type="latent", vae=None, infer_steps=3, sample_solver="vanilla", **options)
        latents[name] = latent_of(path)
    assert not torch.allclose(latents["plain"], latents["star"]) and not torch.allclose(
        latents["star"], latents["zero"]
    )
    assert "--cfg_zero_init_steps 2: ignored without --cfg_zero_star" in caplog.text
    assert "--cfg_zero_star: with --guidance_scale 1 nothing is left of it but the first steps" in caplog.text
    with safe_open(tmp_path / "zero.safetensors", "pt") as file:
        assert file.metadata()["cfg_zero_star"] == "true"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"prompt": None}, "--prompt is missing"),
        ({"dit": None}, "--dit is missing"),
        ({"vae": None}, "--vae is missing"),
        ({"t5": None}, "--t5 is missing"),
        ({"t5_tokenizer": "nowhere.model"}, "--t5_tokenizer nowhere.model: no such file"),
        ({"save_path": None}, "--save_path is missing"),
        ({"save_path": "x.png"}, "--save_path x.png: --output_type video writes .mp4 files"),
        ({"video_size": [40, 48]}, "40 pixels high is not a multiple of 16. Use 32 or 48."),
        ({"task": "i2v-14B"}, "--image_path is missing: i2v-14B needs a start image"),
        ({"dit": "dit_i2v"}, "image-to-video model"),
        ({"blocks_to_swap": 3}, "--blocks_to_swap 3: the DiT has 2 blocks. Use 2 or fewer, or auto."),
        ({"blocks_to_swap": "autp"}, "--blocks_to_swap: 'autp' is neither a whole number nor auto"),
        ({"weights_on_disk": True}, "--weights_on_disk: is for blocks that are swapped. Add --blocks_to_swap auto."),
        ({"blocks_to_swap": 1, "block_swap_ring_size": 2}, "--block_swap_ring_size 2: is more than --blocks_to_swap 1"),
        ({"compile": True, "compile_backend": "inducter"}, "--compile_backend inducter: is not one that torch"),
        (
            {"compile": True, "compile_args": ["inductor", "fast", "False", "False"]},
            "--compile_args: MODE is fast. Use default, reduce-overhead,",
        ),
        ({"attn_mode": "flash3"}, "--attn_mode flash3: flash_attn_interface is not installed"),
        ({"lora_multiplier": [1.0]}, "--lora_multiplier: 1 numbers for 0 LoRA files"),
        ({"lora_weight": ["nothing.safetensors"]}, "--lora_weight nothing.safetensors: no such file"),
        ({"slg_layers": "0,x"}, "--slg_layers 0,x: not numbers. Write them as 9,10."),
        (
            {"slg_layers": "2", "slg_mode": "uncond"},
            "--slg_layers 2: there is no block 2. This DiT's blocks are 0 to 1.",
        ),
        ({"cfg_apply_ratio": 1.5}, "--cfg_apply_ratio 1.5: must be from 0 to 1"),
        ({"slg_mode": "uncond", "slg_layers": "0", "slg_end": "inf"}, "--slg_end inf: must be from 0 to 1"),
        ({"slg_start": "nan"}, "--slg_start nan: must be from 0 to 1"),
        (
            {"cfg_zero_star": True, "cfg_zero_init_steps": 2},
            "--cfg_zero_init_steps 2: must be from 0 to 1, fewer than the 2 steps. The default is 1.",
        ),
        ({"timesteps": "1000,500"}, "--timesteps: not with --sample_solver unipc. Add --sample_so"),
        ({"riflex_freq_index": 0}, "--riflex_freq_index 0: this DiT's frequencies along time are 1 to "),
        ({"riflex_freq_index": 23}, "--riflex_freq_index 23: this DiT's frequencies along time are 1 to "),
        ({"slg_scale": "nan"}, "--slg_scale nan: not a usable number"),
        ({"latent_path": ["nothing.safetensors"]}, "--latent_path nothing.safetensors: no such file"),
        (
            {"latent_path": ["x.safetensors"], "output_type": "both"},
            "the latent is there already. Use video or images.",
        ),
        ({"sample_solver": "euler"}, "invalid choice: 'euler'"),
        ({"strength": 0.5}, "--strength 0.5: is for --video_path"),
    ],
)
def test_bad_input_is_named_before_any_model_loads(generate, models, nothing_loads, tmp_path, options, line):
    assert line in refused(generate, **{"save_path": tmp_path / "out", **options})


@pytest.mark.parametrize(
    ("option", "kind", "line"),
    [
        ("vae", "t5", "this seems to be a T5 text encoder, not the Wan2.1 VAE"),
        ("t5", "dit_t2v", "this seems to be a Wan DiT, not umT5's text encoder"),
        ("clip", "vae", "this seems to be the Wan2.1 VAE, not the CLIP image encoder"),
    ],
)
def test_weights_of_another_model_are_named(generate, models, picture, tmp_path, option, kind, line):
    i2v = {"task": "i2v-14B", "dit": "dit_i2v", "clip": models["clip"], "image_path": picture, "save_path": tmp_path}
    assert line in refused(generate, **{**i2v, option: models[kind]})


def test_half_a_vae_is_found_out_before_any_model_loads(generate, models, nothing_loads, tmp_path):
    whole = load_file(models["vae"])
    half = {key: tensor for key, tensor in whole.items() if not key.startswith("decoder.head")}
    save_file(half, tmp_path / "half.safetensors")
    line = refused(generate, vae=tmp_path / "half.safetensors", save_path=tmp_path / "out")
    assert "half.safetensors: tensors do not fit; 3 missing: decoder.head.0.gamma, " in line


def test_the_seed_in_a_stranger_s_latent_is_no_path(generate, tmp_path):
    save_file({"latent": torch.zeros(16, 1, 4, 6)}, tmp_path / "a.safetensors", {"seeds": "../../outside"})
    generate(latent_path=[tmp_path / "a.safetensors"], save_path=tmp_path / "in" / "here")
    (video,) = tmp_path.rglob("*.mp4")
    assert video.parent == tmp_path / "in" / "here" and video.name.endswith("_0_a.mp4")


def test_a_lora_for_another_model_is_named(generate, models, lora, tmp_path):
    tensors = load_file(lora)
    wide = {key: torch.zeros(4, 128) if key.endswith("down.weight") else value for key, value in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    deep = {key.replace("blocks_0", "blocks_9"): value for key, value in tensors.items()}
    save_file(deep, tmp_path / "deep.safetensors")
    late = {key: torch.zeros(4, 128) if "cross_attn_o.lora_down" in key else value for key, value in tensors.items()}
    save_file(late, tmp_path / "late.safetensors")
    save_file({"nothing": torch.zeros(1)}, tmp_path / "none.safetensors")
    for name, line in (
        ("wide", "made for a model of another size"),
        ("late", "blocks.0.cross_attn.o.weight is (96, 128), not (96, 96)"),
        ("deep", "3 of its 3 layers are not in the DiT, e.g. blocks.9.cross_attn.o.weight"),
        ("none", "not a LoRA"),
    ):
        found = refused(generate, lora_weight=[tmp_path / f"{name}.safetensors"], save_path=tmp_path / "out")
        assert line in found and f"{name}.safetensors" in found
