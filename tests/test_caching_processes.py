"""Caching by several processes: the files of one, evenly shared, and one end for all."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wan_cache_latents
import wan_cache_text_encoder_outputs
from modules.caching import evenly
from tests.forked import fork, needs_fork
from tests.media import write_jsonl, write_pictures, write_toml, write_video


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset file over pictures, videos of several lengths, one of them bad, and a stale cache to come."""
    pictures = write_pictures(tmp_path / "images", {name: (64, 64) for name in "abc"})
    for name, caption in zip("abc", ("a red square moves right slowly", "a blue star", "a red square"), strict=True):
        (pictures / f"{name}.txt").write_text(caption)
    videos = [write_video(tmp_path / f"v{frames}.mp4", frames) for frames in (29, 13, 9, 5, 2)]
    listed = [{"video_path": video, "caption": f"a red square {video.stem}"} for video in videos]
    clips = {"video_jsonl_file": write_jsonl(tmp_path / "v.jsonl", listed), "cache_directory": tmp_path / "cache_v"}
    clips |= {"target_frames": [5], "frame_extraction": "chunk"}
    general = {"resolution": [64, 64], "caption_extension": ".txt", "enable_bucket": True, "batch_size": 1}
    images = {"image_directory": pictures, "cache_directory": tmp_path / "cache_i"}
    return write_toml(tmp_path / "data.toml", general, images, clips)


def command(script: str, data: Path, models: dict[str, Path], *more: object) -> list[str]:
    weights = ["--vae", models["vae"]] if "latents" in script else ["--t5", models["t5"]]
    weights += [] if "latents" in script else ["--t5_tokenizer", models["tokenizer"]]
    return [script, *map(str, ["--dataset_config", data, *weights, "--device", "cpu", *more])]


def caches(folder: Path) -> dict[str, Path]:
    return {path.name: path for cache in ("cache_i", "cache_v") for path in (folder / cache).iterdir()}


@needs_fork
@pytest.mark.parametrize("script", [wan_cache_latents, wan_cache_text_encoder_outputs])
def test_two_processes_write_the_files_of_one_and_the_first_tells_of_all(script, data, models, tmp_path, monkeypatch):
    name = Path(script.__file__).name
    monkeypatch.setattr(sys, "argv", command(name, data, models))
    script.main()
    alone = tmp_path / "alone"
    for cache in ("cache_i", "cache_v"):
        shutil.copytree(tmp_path / cache, alone / cache)
    stale = "gone_0064x0064_wan.safetensors" if script is wan_cache_latents else "gone_wan_te.safetensors"
    for path in caches(tmp_path).values():
        if path.suffix == ".safetensors":
            shutil.copy(path, path.with_name(stale)) if "cache_i" in str(path) else None
            path.unlink()
    codes, said = fork(script.main, tmp_path / "alone", 2)
    assert codes == [0, 0], said
    one, two = caches(alone), caches(tmp_path)
    assert one.keys() == two.keys() and len(two) == (13 if script is wan_cache_latents else 8)
    for file, path in two.items():
        if path.suffix != ".safetensors":
            assert path.read_text() == one[file].read_text()
            continue
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(tensor, load_file(one[file])[key], rtol=0, atol=0)
    written = sum(path.suffix == ".safetensors" for path in two.values())
    assert f"{written} cache files written, 0 kept" in said and said.count("cache files written") == 1
    assert said.count(f"it: {tmp_path / 'cache_i' / stale}") == 1


@needs_fork
def test_both_processes_have_a_share_and_the_second_run_keeps_all(data, models, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", command("wan_cache_latents.py", data, models, "--skip_existing"))
    mine = wan_cache_latents.cache_latents

    def noting(*given: object, **named: object) -> object:
        from modules import latent_caching

        write, processes = latent_caching.write_latents, given[-1]

        def write_and_note(config, item, *others):
            with open(tmp_path / f"written_{processes.rank}", "a") as file:
                file.write(f"{item.frames * item.width * item.height}\n")
            return write(config, item, *others)

        latent_caching.write_latents = write_and_note
        return mine(*given, **named)

    monkeypatch.setattr(wan_cache_latents, "cache_latents", noting)
    (tmp_path / "out").mkdir()
    codes, said = fork(wan_cache_latents.main, tmp_path / "out", 2)
    assert codes == [0, 0], said
    loads = [sum(map(int, (tmp_path / f"written_{rank}").read_text().split())) for rank in (0, 1)]
    assert min(loads) > 0.7 * max(loads)
    codes, said = fork(wan_cache_latents.main, tmp_path / "out", 2)
    assert codes == [0, 0] and "0 cache files written, 12 kept, 1 failed" in said


@needs_fork
def test_an_error_in_one_process_ends_both_with_its_line(data, models, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", command("wan_cache_latents.py", data, models))
    mine = wan_cache_latents.load_latent_encoders

    def load(*given: object) -> object:
        if torch.distributed.get_rank() == 1:
            raise OSError(28, "No space left on device", str(tmp_path / "full"))
        return mine(*given)

    monkeypatch.setattr(wan_cache_latents, "load_latent_encoders", load)
    (tmp_path / "out").mkdir()
    codes, said = fork(wan_cache_latents.main, tmp_path / "out", 2)
    assert codes == [2, 2]
    assert [line for line in said.splitlines() if "error" in line] == [
        f"wan_cache_latents.py: error: {tmp_path / 'full'}: cannot be written (the disk is full)."
        " Free some space and run again."
    ]


@pytest.mark.parametrize(
    ("costs", "shares", "numbers"),
    [
        ([], 2, [[], []]),
        ([5], 2, [[0], []]),
        ([3, 3, 2, 2, 2], 2, [[0, 2, 4], [1, 3]]),
        ([1, 1, 1, 9], 2, [[3], [0, 1, 2]]),
        ([0, 0, 0, 0], 2, [[0, 2], [1, 3]]),
        ([4, 5, 6], 1, [[0, 1, 2]]),
    ],
)
def test_shares_cost_about_the_same(costs, shares, numbers):
    assert evenly(costs, shares) == numbers
