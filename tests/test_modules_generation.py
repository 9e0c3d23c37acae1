import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modules import conditions, generation, generation_options
from modules.conditions import Condition, encode_condition, encode_pictures
from modules.generation import (
    Texts,
    as_frames,
    denoise,
    draw_noise,
    generate,
    guidance_of,
    needs_negative,
    skipped_blocks,
)
from modules.generation_options import LoraOptions, Models, RunOptions, SamplingOptions
from modules.generation_plan import decode_files
from modules.latent_encoding import load_latent_encoders
from modules.lora_files import LoraFile
from modules.outputs import Files, OutputOptions, Result, load_latent, save_latent
from modules.prompts import Request
from modules.sizes import output_frames, output_size
from modules.solvers import Step
from utils.errors import UserError
from wan.clip import ClipOptions
from wan.configs import TASKS
from wan.dit_file import DitOptions
from wan.loading import build_dit
from wan.t5 import T5Options
from wan.vae import VaeOptions, WanVAE, build_vae


def request(width=64, height=64, frames=5, **more):
    settings = {"steps": 2, "flow_shift": 5.0, "guidance_scale": 5.0, "guidance_scale_high_noise": 5.0, "seed": 7}
    return Request(prompt="a", negative_prompt="b", width=width, height=height, frames=frames, **{**settings, **more})


def picture_of(folder, width, height):
    path = folder / f"{width}x{height}.png"
    Image.new("RGB", (width, height)).save(path)
    return path


def relative_error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


# -------------------------------------------------------------------------------------------------- recorded runs
GENERATION = ("t2v_unipc", "t2v_dpm", "t2v_vanilla", "t2v_skip_layers", "t2v_cfg_late", "i2v_unipc")


@pytest.mark.parametrize("label", GENERATION)
def test_a_whole_run_equals_the_recorded_one(recipe, golden, label):
    case = recipe.cases("generation")[label]
    inputs, heads = case["inputs"], recipe.load_spec(f"dit_{case['kind']}")["config"]["num_heads"]
    dit = build_dit(recipe.state_dict(f"dit_{case['kind']}"), heads=heads)
    layers = case.get("slg_layers")
    names = ("slg_mode", "slg_end", "cfg_skip_mode", "cfg_apply_ratio")
    sampling = SamplingOptions(
        sample_solver=case["solver"],
        slg_layers=",".join(map(str, layers)) if layers else None,
        **{name: case[name] for name in names if name in case},
    )
    latent = denoise(
        dit,
        inputs["noise"],
        Texts(inputs["context"][0], inputs["context_null"][0]),
        Condition(inputs["y"][0] if "y" in inputs else None, inputs.get("clip_fea")),
        case["steps"],
        case["shift"],
        case["guidance"],
        sampling,
    )
    assert relative_error(latent, case["outputs"]["latent"]) <= 1e-3
    if "video" in case["outputs"]:
        video = build_vae(recipe.state_dict("vae")).decode(latent[None])[0]
        assert relative_error(video, case["outputs"]["video"]) <= 2e-3


CONDITIONS = {
    "i2v": "dit_i2v",
    "i2v_9": "dit_i2v",
    "i2v_big_picture": "dit_i2v",
    "i2v_end_image": "dit_i2v",
    "flf2v": "dit_flf2v",
    "i2v_fun_control": "dit_fun",
    "t2v_fun_control": "dit_fun",
}


@pytest.mark.parametrize("label", CONDITIONS)
def test_what_the_model_sees_equals_the_recorded_conditions(recipe, tmp_path, label):
    case = recipe.cases("conditioning")[label]
    given, config = case["args"], TASKS[case["task"]]
    seed = recipe.load_spec("vae")["seed"]
    paths = {}
    for name, (height, width) in {"start": (60, 80), "end": (96, 70), "square": (64, 64), "big": (200, 300)}.items():
        paths[name] = tmp_path / f"{name}.png"
        Image.fromarray(recipe.picture(f"gen/{name}", height, width, seed=seed)).save(paths[name])
    paths["control"] = tmp_path / "control"
    paths["control"].mkdir()
    for i, frame in enumerate(recipe.picture("gen/control", 50, 66, frames=9, seed=seed)):
        Image.fromarray(frame).save(paths["control"] / f"{i:02d}.png")
    height, width = given["video_size"]
    pictures = {"image": "image_path", "end_image": "end_image_path", "control": "control_path"}
    pictures = {name: paths.get(given.get(option)) for name, option in pictures.items()}
    asked = request(width, height, given["video_length"], **pictures)
    y = encode_condition(asked, build_vae(recipe.state_dict("vae")), config)
    assert relative_error(y, case["outputs"]["y"]) <= 1e-3
    noise = draw_noise(output_frames(asked, config), *output_size(asked), given["seed"], torch.device("cpu"))
    torch.testing.assert_close(noise, case["outputs"]["noise"], rtol=0, atol=1e-6)
    assert noise[0].numel() // 4 == case["tokens"] and noise.shape[1:] == y.shape[1:]


# ----------------------------------------------------------------------------------------------------- small parts
@pytest.mark.parametrize(
    ("image", "asked", "size"),
    [
        ((1024, 768), (832, 480), (720, 544)),
        ((1920, 1080), (832, 480), (832, 464)),
        ((1920, 1080), (1280, 720), (1280, 720)),
        ((1000, 1000), (832, 480), (624, 624)),
        ((832, 480), (832, 480), (832, 480)),
        ((480, 832), (832, 480), (480, 832)),
    ],
)
def test_the_start_image_gives_the_shape_and_the_size_the_area(tmp_path, image, asked, size):
    assert output_size(request(*asked, image=picture_of(tmp_path, *image))) == size


def test_noise_is_that_of_torch_s_generator_with_the_seed():
    want = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(11))
    assert torch.equal(draw_noise(9, 48, 32, 11, torch.device("cpu")), want)
    assert torch.equal(draw_noise(12, 48, 32, 11, torch.device("cpu"), on_cpu=True), want), "12 frames are 9"


@pytest.mark.gpu
def test_noise_drawn_on_the_cpu_is_the_same_on_every_device():
    on_gpu = draw_noise(9, 48, 32, 11, torch.device("cuda"), on_cpu=True)
    assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), draw_noise(9, 48, 32, 11, torch.device("cpu")))


@pytest.mark.parametrize(
    ("pattern", "scale", "needed"),
    [
        ("CCC", 5.0, False),
        ("CGC", 5.0, True),
        ("GGG", 1.0, False),
        ("UU", 1, False),
        ("SC", 1.0, True),
        ("ZZC", 5.0, False),
        ("ZSC", 1.0, True),
    ],
)
def test_the_negative_prompt_is_encoded_only_where_some_step_asks_for_it(pattern, scale, needed):
    assert needs_negative(pattern, scale) is needed


def test_guidance_of_two_noise_ranges_changes_at_the_boundary():
    scale = guidance_of(request(guidance_scale=3.0, guidance_scale_high_noise=4.0), TASKS["t2v-A14B"])
    assert [scale(Step(0, timestep, timestep / 1000)) for timestep in (999.0, 875.0, 874.0)] == [4.0, 4.0, 3.0]
    assert guidance_of(request(guidance_scale=3.0), TASKS["t2v-14B"]) == 3.0


def test_frames_are_rounded_and_clamped_to_bytes():
    pixels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0]).reshape(1, 1, 1, 6).expand(3, 1, 1, 6)
    frames = as_frames(pixels)
    assert frames.shape == (1, 1, 6, 3) and frames.dtype == np.uint8
    assert frames[0, 0, :, 0].tolist() == [0, 0, 64, 128, 255, 255]


def test_numbers_of_layers_are_read_from_a_list():
    assert skipped_blocks(SamplingOptions(slg_layers=" 9,10, ")) == (9, 10)
    assert skipped_blocks(SamplingOptions()) == ()


def test_a_missing_multiplier_is_1_and_one_too_many_an_error():
    a, b = Path("a"), Path("b")
    assert LoraOptions((a, b), (0.5,)).files() == [LoraFile(a, 0.5), LoraFile(b, 1.0)]
    with pytest.raises(UserError, match="--lora_multiplier: 3 numbers for 2 LoRA files"):
        LoraOptions((a, b), (1.0, 1.0, 1.0)).files()
    with pytest.raises(UserError, match="--lora_multiplier nan: not a usable number"):
        LoraOptions((a, b), (float("nan"),)).files()


# ---------------------------------------------------------------------------------------------------------- stages
def tiny(models, task="t2v-1.3B", dit="dit_t2v", clip=None):
    return Models(
        TASKS[task],
        torch.device("cpu"),
        DitOptions(task, models[dit]),
        VaeOptions(models["vae"]),
        T5Options(models["t5"], models["tokenizer"]),
        ClipOptions(clip),
        LoraOptions(),
        RunOptions(),
    )


def test_the_vae_runs_as_its_options_say_in_caching_and_in_generation(models):
    options = VaeOptions(models["vae"], vae_cache_cpu=True, vae_spatial_tile_sample_min_size=384)
    cpu = torch.device("cpu")
    for vae in (
        replace(tiny(models), vae=options).load_vae(),
        load_latent_encoders(options, ClipOptions(), torch.float32, cpu).vae,
    ):
        assert (vae.cache_cpu, vae.tile) == (True, 384)


def test_only_one_large_model_is_in_memory_at_a_time(models, monkeypatch, tmp_path):
    alive, seen = [], []

    def watched(module, name):
        load = getattr(module, name)

        def loading(*arguments, **more):
            gc.collect()
            seen.append((name, [other for other, model in alive if model() is not None]))
            model = load(*arguments, **more)
            alive.append((name, weakref.ref(model)))
            return model

        monkeypatch.setattr(module, name, loading)

    watched(generation, "load_text_encoder")
    watched(conditions, "load_clip")
    for name in ("load_vae", "load_dit"):
        watched(generation_options, name)
    asked = request(32, 32, image=picture_of(tmp_path, 32, 32))
    result = Result(Files(images=tmp_path / "out.png"), 5)
    generate([asked], tiny(models, "i2v-14B", "dit_i2v", models["clip"]), SamplingOptions(), [result], OutputOptions())
    # The VAE, which is small, waits in main memory while the DiT runs, and is not loaded again.
    wanted = {"load_text_encoder": [], "load_clip": [], "load_vae": [], "load_dit": ["load_vae"]}
    assert [name for name, _ in seen] == list(wanted) and dict(seen) == wanted


def test_equal_texts_and_pictures_are_encoded_once(models, monkeypatch, tmp_path):
    texts, pictures = [], []
    text_encoder, picture = generation.load_text_encoder, conditions.load_image

    def counting(*arguments):
        encoder = text_encoder(*arguments)
        encode = encoder.encode
        encoder.encode = lambda prompts: texts.extend(prompts) or encode(prompts)
        return encoder

    monkeypatch.setattr(generation, "load_text_encoder", counting)
    monkeypatch.setattr(conditions, "load_image", lambda path: pictures.append(path) or picture(path))
    image = picture_of(tmp_path, 32, 32)
    requests = [request(32, 32, image=image, seed=seed) for seed in (1, 2)]
    encoded = generation.encode_prompts(requests, tiny(models), SamplingOptions())
    features = encode_pictures(requests, tiny(models, "i2v-14B", "dit_i2v", models["clip"]))
    assert texts == ["a", "b"] and torch.equal(encoded[0].negative, encoded[1].negative)
    assert pictures == [image] and features[0].shape == (1, 257, 1280)


def test_values_that_are_not_finite_are_an_error_with_the_seed(models, monkeypatch, tmp_path):
    monkeypatch.setattr(generation, "denoise", lambda *arguments, **more: torch.full((16, 2, 4, 4), torch.nan))
    result = Result(Files(latent=tmp_path / "a.safetensors"), 5)
    with pytest.raises(UserError, match="--seed 7: the latents are not finite"):
        generate([request(32, 32)], tiny(models), SamplingOptions(), [result], OutputOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stage", "kept", "made"), [("denoise", "0", ""), ("decode", "1", "0")])
def test_latents_that_are_not_decoded_are_kept_when_a_stage_fails(models, monkeypatch, tmp_path, stage, kept, made):
    """The second of two results fails, by Ctrl-C: what the first one's minutes made is there all the same."""
    owner, name = (generation, "denoise") if stage == "denoise" else (WanVAE, "decode_chunks")
    whole, calls = getattr(owner, name), []

    def failing(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **more)

    monkeypatch.setattr(owner, name, failing)
    results = [Result(Files(images=tmp_path / f"{i}.png"), 1, {"seeds": i}) for i in range(2)]
    with pytest.raises(KeyboardInterrupt):
        generate([request(32, 32, 1)] * 2, tiny(models), SamplingOptions(), results, OutputOptions())
    wanted = [f"{i}_latent.safetensors" for i in kept] + [f"{i}.png" for i in made]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(wanted)
    latent, metadata = load_latent(tmp_path / f"{kept}_latent.safetensors")
    assert latent.shape == (16, 1, 4, 4) and metadata["seeds"] == int(kept)


def test_a_saved_latent_is_not_saved_again_when_its_decoding_fails(models, monkeypatch, tmp_path):
    save_latent(tmp_path / "a_latent.safetensors", torch.zeros(16, 1, 4, 4), {"seeds": 3})
    monkeypatch.setattr(WanVAE, "decode_chunks", lambda *arguments, **more: 1 / 0)
    monkeypatch.setattr(generation, "save_latent", lambda *arguments: pytest.fail("saved again"))
    options = OutputOptions(tmp_path / "a.mp4", latent_path=(tmp_path / "a_latent.safetensors",))
    with pytest.raises(ZeroDivisionError):
        decode_files(tiny(models), options)
