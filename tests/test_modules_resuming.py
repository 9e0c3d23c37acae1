"""Long prompt files: what fails costs no other line, and a run goes on where another was stopped."""

import sys

import pytest
import torch
from safetensors.torch import load_file

import wan_generate_video
from modules import generation
from modules.prompts import PromptOptions, read_requests
from tests.test_script_wan_generate_video import arguments
from utils.errors import UserError
from wan.configs import TASKS
from wan.vae import WanVAE

LINES = "a red circle --s 1\na blue star --d 2 --s 1\n# a remark\na red circle --s 1\na green ring --s 1 --f 1\n"


@pytest.fixture
def generate(monkeypatch, models, tmp_path):
    """Run the script on a file of lines; return the files that are there and how often a video was denoised."""
    denoise, calls = generation.denoise, []
    monkeypatch.setattr(generation, "denoise", lambda *given, **more: calls.append(1) or denoise(*given, **more))

    def run(lines=LINES, **options):
        calls.clear()
        (tmp_path / "lines.txt").write_text(lines)
        how = {"prompt": None, "seed": None, "from_file": tmp_path / "lines.txt", "save_path": tmp_path / "out"}
        monkeypatch.setattr(sys, "argv", ["x", *arguments(models, **{**how, "skip_existing": True, **options})])
        wan_generate_video.main()
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}, len(calls)

    return run


def test_a_second_run_makes_only_what_is_not_there(generate, tmp_path, caplog):
    caplog.set_level("INFO")
    first, made = generate()
    assert made == 4 and len(first) == 4 and {name.split("_")[0] for name in first} == {"lines"}
    assert generate() == (first, 0) and "4 are there, 0 only to be decoded, 0 to be made" in caplog.text
    (tmp_path / "out" / sorted(first)[0]).unlink()
    second, made = generate(f"something new --s 1\n{LINES}")
    assert made == 2 and second.items() > {name: first[name] for name in sorted(first)[1:]}.items() and len(second) == 5
    _, made = generate(guidance_scale=1)
    assert made == 4, "with other settings other files"


@pytest.mark.parametrize("kind", ["video", "both", "images"])
def test_a_stopped_run_has_denoised_nothing_in_vain(generate, monkeypatch, kind):
    decode = WanVAE.decode_chunks
    with monkeypatch.context() as patch:
        patch.setattr(WanVAE, "decode_chunks", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate(output_type=kind)
    assert WanVAE.decode_chunks is decode
    files, made = generate(output_type=kind)
    assert made == 0
    latents = [name for name in files if name.endswith("_latent.safetensors")]
    assert len(latents) == (4 if kind == "both" else 0)


def test_lines_without_a_seed_have_one_of_their_own(tmp_path):
    (tmp_path / "lines.txt").write_text(LINES)
    options = PromptOptions(from_file=tmp_path / "lines.txt", skip_existing=True)
    seeds = [[request.seed for request in read_requests(options, TASKS["t2v-1.3B"])] for _ in range(2)]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 4 and seeds[0][1] == 2
    (tmp_path / "lines.txt").write_text("a cat\n a cat \na cat\n")  # one line three times
    assert len({request.seed for request in read_requests(options, TASKS["t2v-1.3B"])}) == 3


@pytest.mark.parametrize("problem", [torch.nan, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_a_line_that_fails_costs_no_other(generate, monkeypatch, tmp_path, problem):
    denoise = generation.denoise

    def failing(dit, noise, *given, **more):
        latent = denoise(dit, noise, *given, **more)
        if noise.shape[1] > 1:
            return latent
        if isinstance(problem, Exception):
            raise problem
        return latent * problem

    monkeypatch.setattr(generation, "denoise", failing)
    with pytest.raises(UserError) as error:
        generate(skip_existing=None)
    assert "1 of 4 videos were not made: 'a green ring' (seed " in str(error.value)
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 3


def test_each_line_is_compared_once_with_its_own_exact_video(generate, monkeypatch, caplog):
    caplog.set_level("INFO")
    denoise = generation.denoise

    def failing(dit, noise, *given, **more):
        return denoise(dit, noise, *given, **more) * (torch.nan if noise.shape[1] == 1 else 1)

    monkeypatch.setattr(generation, "denoise", failing)
    calls, counted = [], generation.denoise
    monkeypatch.setattr(generation, "denoise", lambda *given, **more: calls.append(1) or counted(*given, **more))
    with pytest.raises(UserError, match="1 of 3 videos were not made"):
        generate(
            "a cat --s 2 --f 1\na red circle --s 2 --d 1\na blue star --s 2 --d 2\n",
            skip_existing=None,
            step_cache="easycache",
            step_cache_threshold=0,
            compare_exact=True,
        )
    assert len(calls) == 1 + 2 * 2, "what failed is not compared, all else once"
    for what in ("latents", "frames"):
        found = [message for message in caplog.messages if f"{what} PSNR" in message]
        assert len(found) == 2 and all(f"seed {n}: {what} PSNR inf dB" in found[n - 1] for n in (1, 2)), found


def test_a_line_alone_is_what_it_is_in_a_file(generate, models, monkeypatch, tmp_path):
    generate(output_type="latent")
    path = tmp_path / "alone.safetensors"
    alone = {"prompt": "a blue star", "seed": 2, "infer_steps": 1, "save_path": path, "output_type": "latent"}
    monkeypatch.setattr(sys, "argv", ["x", *arguments(models, **alone)])
    wan_generate_video.main()
    (found,) = (tmp_path / "out").glob("lines_2_*_latent.safetensors")
    assert torch.equal(load_file(path)["latent"], load_file(found)["latent"])


def test_it_is_for_files_of_lines(generate):
    with pytest.raises(UserError, match="--skip_existing: is for --from_file"):
        generate(from_file=None, prompt="a cat")
