from pathlib import Path

import pytest

from modules.downloads import published
from tests.hub_server import hub
from utils.errors import UserError
from utils.hub_files import is_remote, local_path
from wan.configs import TASKS

SCRIPT = "wan_generate_video.py"


def test_weights_come_from_the_hub_once_and_then_from_its_cache(models, run_cli, tmp_path):
    files = {f"split/{name}.safetensors": models[name].read_bytes() for name in ("dit_t2v", "vae", "t5")}
    words = ["--task", "t2v-1.3B", "--prompt", "a red circle", "--video_size", 32, 48, "--video_length", 1]
    words += ["--infer_steps", 1, "--seed", 1, "--device", "cpu", "--output_type", "latent", "--no_metadata"]
    words += ["--t5_tokenizer", models["tokenizer"]]
    there = ["--dit", "hf://me/tiny/split/dit_t2v.safetensors", "--vae", "hf://me/tiny@main/split/vae.safetensors"]
    there += ["--t5", "hf://me/tiny/split/t5.safetensors"]
    with hub({"me/tiny": files}, tmp_path / "home") as (environment, requests):
        first = run_cli(SCRIPT, *words, *there, "--save_path", tmp_path / "a.safetensors", **environment)
        assert first.returncode == 0, first.stderr
        assert sum(line.startswith("GET") and "resolve" in line for line in requests) == 3
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    second = run_cli(SCRIPT, *words, *there, "--save_path", tmp_path / "b.safetensors", **offline)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_what_cannot_be_had_is_told_in_one_line(run_cli, tmp_path):
    cases = {
        "hf://me/tiny/dit.safetensors": "no such file there. Did you mean hf://me/tiny/split/dit.safetensors?",
        "hf://me/large/dit.safetensors": "no such repository, or not for you",
        "hf://me/tiny@v9/split/dit.safetensors": "there is no revision v9. Leave it out for the newest.",
        "hf://me/tiny": "not the name of a file on the hub. Write hf://owner/repo/file.",
    }
    program = (
        "import sys; from pathlib import Path\n"
        "from utils.errors import UserError; from utils.hub_files import local_path\n"
        "for name in sys.argv[1:]:\n"
        "    try: local_path(Path(name), '--dit')\n"
        "    except UserError as error: print(error)"
    )
    with hub({"me/tiny": {"split/dit.safetensors": b"x"}}, tmp_path / "home") as (environment, _):
        result = run_cli("-c", program, *cases, **environment)
    told = result.stdout.splitlines()
    assert len(told) == len(cases) and all(line in words for line, words in zip(cases.values(), told, strict=True))
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    result = run_cli("-c", program, "hf://me/tiny/other.safetensors", **offline)
    assert "is not in the cache, and the hub cannot be reached" in result.stdout


def test_the_published_files_of_a_task_are_sized_and_downloaded_once(run_cli, tmp_path):
    repos: dict[str, dict[str, bytes]] = {}
    for number, file in enumerate(published(TASKS["i2v-14B"])):
        repos.setdefault(file.repo, {})[file.file] = bytes(1000 + number)
    folder = tmp_path / "weights"

    def downloads(requests):
        return sum(line.startswith("GET") and "resolve" in line for line in requests)

    with hub(repos, tmp_path / "home") as (environment, requests):
        first = run_cli(SCRIPT, "--task", "i2v-14B", "--download", folder, **environment)
        assert first.returncode == 0, first.stderr
        assert downloads(requests) == 5
        program = (
            "import logging, sys; from pathlib import Path; from modules.downloads import download_published\n"
            "from wan.configs import TASKS; logging.basicConfig(level='INFO')\n"
            "download_published(TASKS['i2v-14B'], Path(sys.argv[1]))"
        )
        second = run_cli("-c", program, folder, **environment)
        assert second.returncode == 0 and downloads(requests) == 5
        del repos["Wan-AI/Wan2.1-I2V-14B-720P"]["models_t5_umt5-xxl-enc-bf16.pth"]
        gone = run_cli("-c", program, tmp_path / "other", **environment)
    told = first.stderr + first.stdout
    for file in published(TASKS["i2v-14B"]):
        assert f"{file.option} {folder / file.file}" in told and (folder / file.file).is_file()
    assert "GB are free" in told and second.stderr.count("is there") == 5
    assert "has no models_t5_umt5-xxl-enc-bf16.pth any more" in gone.stderr


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_published_files_for_all_that_it_needs(task):
    options = [file.option for file in published(TASKS[task])]
    assert {"--dit", "--vae", "--t5"} <= set(options)
    assert ("--clip" in options) == bool(TASKS[task].clip and TASKS[task].images)
    assert ("--dit_high_noise" in options) == (TASKS[task].boundary is not None)


def test_other_paths_stay_what_they_are():
    assert local_path(Path("weights/dit.safetensors"), "--dit") == Path("weights/dit.safetensors")
    assert is_remote(Path("hf://a/b/c")) and not is_remote(Path("/hf/a/b/c"))
    with pytest.raises(UserError, match="not the name of a file"):
        local_path(Path("hf://a"), "--dit")
