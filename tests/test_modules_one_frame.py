"""One-frame inference: what the option says, what the DiT sees, and that files come out of the commands people have."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import wan_generate_video
from dataset.cache import read_tensors
from dataset.config import load_config
from dataset.decoding import load_image
from modules.caching import CachingOptions
from modules.conditions import Condition, encode_condition
from modules.generation import Texts, denoise, draw_noise, step_of
from modules.generation_options import SamplingOptions
from modules.latent_caching import cache_latents
from modules.latent_encoding import ONE_FRAME, LatentEncoders
from modules.one_frame import Control, OneFrame, control_mask, encode_controls, make_one_frame, parse_one_frame
from modules.prompts import PromptOptions, make_request, read_requests
from utils.errors import UserError
from wan.clip import load_clip
from wan.configs import TASKS
from wan.loading import load_dit
from wan.vae import load_vae

I2V, FLF2V = TASKS["i2v-14B"], TASKS["flf2v-14B"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures, 48 wide and 32 high, and a mask that shows the left half of one."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    for name in ("start", "end"):
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((32, 48), np.uint8)
    mask[:, :24] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def vae(models):
    return load_vae(models["vae"], torch.float32, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------- the option
@pytest.mark.parametrize(
    ("text", "count", "line"),
    [
        ("control_index=0", 2, "target_index is missing; many shells end a command at a ; that is not in quotes. "
         'Use --one_frame_inference "control_index=0;2,target_index=1", in quotes.'),
        ("target_index=3", 1, 'control_index is missing. Use --one_frame_inference "control_index=0,target_index=3"'),
        ("control_index=0;2,target_index=1", 1, "2 places for 1 control picture. Use"),
        ("control_index=0,target_index=1", 3, "1 places for 3 control pictures. Use"),
        ("control_index=0;0,target_index=1", 2, "the places in time must all differ. Use"),
        ("control_index=1,target_index=1", 1, "the places in time must all differ. Use"),
        ("control_index=0,target_index=0", 1, "target_index 0: must be 1 or more. Use"),
        ("control_index=0,target_index=1024", 1, "1024 is not from 0 to 1023. Use"),
        ("control_index=-1,target_index=1", 1, "-1 is not from 0 to 1023. Use"),
        ("control_index=0,traget_index=1", 1, "'traget_index' is unknown. Did you mean 'target_index'?"),
        ("0;1", 1, "'0;1' is unknown. Write it as"),
        ("control_index=0;x,target_index=1", 1, "'0;x' is not a whole number. Write them as 0;2."),
        ("control_index=0,target_index=1;2", 1, "one target_index is needed. One frame is made at a time."),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_option_as_it_should_be(text, count, line):
    paths = [Path(f"{number}.png") for number in range(count)]
    with pytest.raises(UserError) as error:
        make_one_frame(text, paths, (), FLF2V)
    assert str(error.value).startswith(f"--one_frame_inference {text}: {line}")
    if "in quotes." in str(error.value):
        corrected = str(error.value).split('"')[1]
        assert str(make_one_frame(corrected, paths, (), FLF2V)) == corrected


def test_pictures_and_masks_are_taken_in_order_of_time(caplog):
    a, b, m = map(Path, "abm")
    made = make_one_frame("no_2x, control_index=9;0 ,target_index=4", [a, b], [m], FLF2V)
    assert made == OneFrame(4, (Control(0, a, m), Control(9, b)))
    assert (made.indices, made.place) == ([0, 4, 9], 1)
    assert "no_2x is FramePack's and has no effect" in caplog.text and "the first one at 0" in caplog.text
    assert parse_one_frame("target_index=2") == (2, [])
    with pytest.raises(UserError, match="2 masks for 1 control pictures"):
        make_one_frame("control_index=0,target_index=1", [a], [m, m], I2V)


@pytest.mark.parametrize(
    ("task", "more", "line"),
    [
        ("t2v-14B", {}, "--one_frame_inference: t2v-14B is no model for it. Use --task i2v-14B or flf2v-14B or"),
        ("i2v-14B-FC", {}, "--one_frame_inference: i2v-14B-FC is no model for it."),
        (
            "i2v-14B",
            {"image_path": None},
            "--image_path is missing: i2v-14B needs a start image. Give --image_path START.",
        ),
        ("flf2v-14B", {}, "--end_image_path is missing: flf2v-14B needs an end image. Give --end_image_path END."),
        ("i2v-14B", {"control_image_path": ()}, "--control_image_path is missing: one-frame inference needs"),
        ("i2v-14B", {"control_image_path": (Path("no.png"), Path("no.png"))}, "--control_image_path no.png: no such"),
        ("i2v-14B", {"control_image_mask_path": (Path("no.png"),)}, "--control_image_mask_path no.png: no such file"),
        ("i2v-14B", {"one_frame_inference": None}, "--control_image_path: is for one-frame inference. Add --one_"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(pictures, task, more, line):
    given = {"image_path": pictures["start"], "control_image_path": (pictures["start"], pictures["end"])}
    given |= {"one_frame_inference": "control_index=0;2,target_index=1", **more}
    with pytest.raises(UserError) as error:
        make_request(PromptOptions("a", **given), TASKS[task])
    shown = line.replace("START", str(pictures["start"])).replace("END", str(pictures["end"]))
    assert str(error.value).startswith(shown)


def test_lines_of_a_prompt_file_ask_for_one_frame(pictures, tmp_path, caplog):
    start, end, mask = (pictures[name] for name in ("start", "end", "mask"))
    (tmp_path / "p.txt").write_text(f"a --i {start} --ei {end} --ci {start} --ci {end} --cim {mask} --of "
                                    "target_index=1,control_index=0;2 --f 5\n")  # fmt: skip
    (request,) = read_requests(PromptOptions(from_file=tmp_path / "p.txt"), FLF2V)
    assert request.one_frame == OneFrame(1, (Control(0, start, mask), Control(2, end)))
    assert request.frames == 1 and "one-frame inference makes one frame" in caplog.text
    (request,) = read_requests(PromptOptions(from_file=tmp_path / "p.txt"), I2V)
    assert request.end_image is None and "--end_image_path: ignored in one-frame inference" in caplog.text


# ---------------------------------------------------------------------------------------------------- what is seen
@pytest.mark.parametrize(("task", "indices", "target"), [("i2v-14B", [0], 9), ("flf2v-14B", [0, 10], 5)])
def test_generation_shows_the_dit_what_caching_stores(models, pictures, vae, tmp_path, task, indices, target):
    """The same pictures as a one-frame dataset and on a command line; the pictures have the size of the bucket."""
    for folder in ("targets", "controls"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (48, 32)).save(tmp_path / "targets" / "a.png")
    (tmp_path / "targets" / "a.txt").write_text("a")
    given = [pictures["start"], pictures["end"]][: len(indices)]
    for number, path in enumerate(given):
        (tmp_path / "controls" / f"a_{number}.png").write_bytes(path.read_bytes())
    (tmp_path / "data.toml").write_text(
        "[[datasets]]\nresolution = [48, 32]\ncaption_extension = '.txt'\n"
        f"image_directory = '{(tmp_path / 'targets').as_posix()}'\n"
        f"control_directory = '{(tmp_path / 'controls').as_posix()}'\ncache_directory = '{tmp_path.as_posix()}'\n"
        f"fp_1f_clean_indices = {indices}\nfp_1f_target_index = {target}\n"
    )
    clip = load_clip(models["clip"], torch.float32, torch.device("cpu"))
    configs = load_config(tmp_path / "data.toml")
    cache_latents(configs, lambda: LatentEncoders(vae, clip), torch.float32, CachingOptions(num_workers=1), ONE_FRAME)
    (path,) = tmp_path.glob("*_wan.safetensors")
    cached = read_tensors(path)

    text = f"control_index={';'.join(map(str, indices))},target_index={target}"
    asked = PromptOptions("a", image_path=given[0], one_frame_inference=text, control_image_path=tuple(given))
    if task == "flf2v-14B":
        asked = PromptOptions(**vars(asked) | {"end_image_path": given[1]})
    request = make_request(PromptOptions(**vars(asked) | {"video_size": (32, 48)}), TASKS[task])
    torch.testing.assert_close(encode_condition(request, vae, TASKS[task]), cached["latents_image"], rtol=0, atol=1e-5)
    assert request.one_frame.indices == cached["f_indices"].tolist()
    seen = [clip.encode(torch.from_numpy(load_image(path)).permute(2, 0, 1)[None] / 127.5 - 1)[0] for path in given]
    torch.testing.assert_close(torch.stack(seen), cached["clip"].float(), rtol=0, atol=2e-3)
    assert step_of(request, TASKS[task], SamplingOptions()).grid == cached["latents"].shape[1:]


def test_a_mask_mixes_the_control_with_what_is_not_given(pictures, vae):
    """m, four times, and m z + (1 - m) grey; the frame to make is grey with mask 0."""
    start, end, mask = (pictures[name] for name in ("start", "end", "mask"))
    encode = lambda frame: vae.encode(frame[None, :, None])[0].float()  # noqa: E731
    z = encode(torch.from_numpy(load_image(start)).permute(2, 0, 1) / 127.5 - 1)
    grey = encode(torch.zeros(3, 32, 48))
    y = encode_controls(OneFrame(1, (Control(0, start, mask), Control(2, end))), vae, 48, 32)
    m = torch.zeros(4, 6)
    m[:, :3] = 1
    torch.testing.assert_close(y[:4, 0], m.expand(4, 4, 6))
    torch.testing.assert_close(y[4:, 0], m * z[:, 0] + (1 - m) * grey[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(y[4:, 1], grey[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(y[:4, 1], torch.zeros(4, 4, 6)) and torch.equal(y[:4, 2], torch.ones(4, 4, 6))


def test_transparency_is_a_mask_unless_one_is_given(pictures, tmp_path):
    picture = Image.open(pictures["start"])
    picture.putalpha(Image.open(pictures["mask"]))
    picture.save(tmp_path / "clear.png")
    Image.open(pictures["mask"]).resize((96, 64), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    of_alpha = control_mask(Control(0, tmp_path / "clear.png"), 48, 32)
    assert of_alpha.mean() == 0.5 and of_alpha.shape == (4, 6)
    assert torch.equal(of_alpha, control_mask(Control(0, pictures["start"], tmp_path / "large.png"), 48, 32))
    assert control_mask(Control(0, pictures["start"]), 48, 32) is None
    opaque = Image.open(pictures["start"]).convert("RGBA")
    opaque.save(tmp_path / "opaque.png")
    assert control_mask(Control(0, tmp_path / "opaque.png"), 48, 32) is None
    Image.new("L", (48, 32), 51).save(tmp_path / "faint.png")
    faint = control_mask(Control(0, tmp_path / "clear.png", tmp_path / "faint.png"), 48, 32)
    torch.testing.assert_close(faint, torch.full((4, 6), 0.2))


def test_the_dit_is_told_the_places_in_time(models, pictures):
    """Euler's method written out, over all frames at once."""
    dit = load_dit(models["dit_i2v"], I2V, torch.float32, torch.device("cpu"))
    y, noise, text = torch.randn(20, 2, 4, 6), draw_noise(5, 48, 32, 1, torch.device("cpu")), torch.randn(3, 64)
    features = torch.randn(1, 257, 1280)

    def euler(indices):
        x, sigmas = noise[None], [1, 0.5, 0]
        for now, after in zip(sigmas, sigmas[1:], strict=False):
            velocity = dit(x, torch.tensor([1000.0 * now]), [text], y[None], features, indices and [indices])
            x = x + (after - now) * velocity
        return x[0]

    def ours(indices):
        sampling = SamplingOptions(sample_solver="vanilla")
        return denoise(dit, noise, Texts(text, None), Condition(y, features, indices), 2, 1.0, 1.0, sampling)

    with torch.no_grad():
        for indices in ([0, 9], None):
            torch.testing.assert_close(ours(indices), euler(indices), rtol=1e-4, atol=1e-4)
        assert torch.equal(ours([0, 1]), ours(None)) and not torch.allclose(ours([0, 9]), ours(None), atol=1e-3)


# ------------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture
def generate(monkeypatch, models, pictures, tmp_path):
    """Run the script with tiny models and a command as it stands in the document that users know."""

    def run(command, dit, name, *more):
        words = command.replace("start_image.png", str(pictures["start"])).replace(
            "end_image.png", str(pictures["end"])
        )
        paths = {"dit": models[dit], "save_path": tmp_path / name, "clip": models["clip"], "vae": models["vae"]}
        paths |= {"t5": models["t5"], "t5_tokenizer": models["tokenizer"]}
        small = "--prompt a --video_size 32 48 --infer_steps 2 --seed 7 --device cpu"
        given = [str(word) for name, path in paths.items() for word in (f"--{name}", path)]
        monkeypatch.setattr(sys, "argv", ["x", *words.split(), *small.split(), *given, *map(str, more)])
        wan_generate_video.main()
        return load_file(tmp_path / f"{Path(name).stem}_latent.safetensors")["latent"]

    return run


ONE = """--output_type latent_images --image_path start_image.png --control_image_path start_image.png
    --one_frame_inference control_index=0,target_index=1"""
BETWEEN = """--output_type latent_images --image_path start_image.png --control_image_path start_image.png end_image.png
    --one_frame_inference control_index=0;2,target_index=1"""


@pytest.mark.parametrize(
    ("command", "task", "dit"),
    [
        (ONE, "i2v-14B", "dit_i2v"),
        (BETWEEN, "i2v-14B", "dit_i2v"),
        (f"{BETWEEN} --end_image_path end_image.png", "flf2v-14B", "dit_flf2v"),
        (ONE, "i2v-A14B", "dit_i2v_a14b"),
    ],
)
def test_the_commands_of_the_document_save_latent_and_picture(generate, vae, tmp_path, command, task, dit):
    latent = generate(f"{command} --task {task}", dit, "a.png")
    assert latent.shape == (16, 1, 4, 6)
    picture = Image.open(tmp_path / "a.png")
    with torch.no_grad():
        pixels = ((vae.decode(latent[None])[0, :, 0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
    assert np.abs(np.array(picture) - pixels.numpy()).max() <= 0.6
    said = json.loads(picture.text["comment"])
    assert said["one_frame_inference"] == command.split("one_frame_inference")[1].split()[0]
    assert len(said["control_image_path"]) == len(said["one_frame_inference"].split(";"))


@pytest.mark.parametrize(
    ("places", "kept"), [("control_index=0;2,target_index=1", 1), ("control_index=3;5,target_index=1", 0)]
)
def test_only_the_frame_that_was_asked_for_is_kept(generate, monkeypatch, places, kept):
    numbered = torch.arange(3.0).reshape(1, 3, 1, 1).expand(16, 3, 4, 6)
    monkeypatch.setattr("modules.generation.denoise", lambda *arguments, **more: numbered)
    command = BETWEEN.replace("control_index=0;2,target_index=1", places)
    assert generate(f"{command} --task i2v-14B", "dit_i2v", "a.png").unique().tolist() == [kept]


def test_the_place_in_time_and_the_mask_change_the_frame(generate, pictures):
    plain = generate(f"{ONE} --task i2v-14B", "dit_i2v", "a.png")
    later = generate(f"{ONE} --task i2v-14B".replace("target_index=1", "target_index=9"), "dit_i2v", "b.png")
    masked = generate(f"{ONE} --task i2v-14B", "dit_i2v", "c.png", "--control_image_mask_path", pictures["mask"])
    swapped = generate(f"{ONE} --task i2v-14B --blocks_to_swap 1", "dit_i2v", "d.png")
    assert not torch.allclose(plain, later, atol=1e-3) and not torch.allclose(plain, masked, atol=1e-3)
    assert torch.equal(plain, swapped)


def test_a_frame_is_made_again_from_what_it_says_and_previewed_alone(generate, pictures, monkeypatch, tmp_path):
    more = ["--end_image_path", pictures["end"], "--control_image_mask_path", pictures["mask"], "--preview", 1]
    generate(f"{BETWEEN} --task flf2v-14B", "dit_flf2v", "a.png", *more)
    assert Image.open(tmp_path / "a_preview.gif").n_frames == 1
    again = f"x --output_type latent_images --from_metadata {tmp_path / 'a.png'} --save_path {tmp_path / 'b.png'}"
    monkeypatch.setattr(sys, "argv", again.split())
    wan_generate_video.main()
    latents = [load_file(tmp_path / f"{name}_latent.safetensors")["latent"] for name in "ab"]
    assert torch.equal(*latents)
