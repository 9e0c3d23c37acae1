import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import wan_cache_latents
from dataset.cache import CacheHeader, read_header, write_text
from dataset.config import DatasetConfig, load_config
from dataset.items import find_sources
from dataset.loader import CachedDataset
from dataset.media import read_clips
from modules.caching import CachingOptions
from modules.dataset_page import as_html, as_json, as_text
from modules.dataset_report import HEADER, NO_CAPTION, FileReport, Report, examine
from modules.latent_caching import cache_latents
from modules.latent_encoding import I2V, ONE_FRAME, T2V, load_latent_encoders
from tests.media import drawing, write_jsonl, write_pictures, write_toml, write_video
from utils.errors import UserError
from wan.clip import ClipOptions
from wan.vae import VaeOptions

GENERAL = {"resolution": [64, 64], "caption_extension": ".txt", "enable_bucket": True, "batch_size": 2}
ODD_NAMES = ["a [1] (x)", "Grüße & <b>", "散歩 'と'", "dots.in.name"]


def caption(path: Path, text: str = "a red square") -> None:
    path.with_name(path.stem + ".txt").write_text(text, encoding="utf-8")


def write_odd_pictures(folder: Path) -> Path:
    """Write pictures of kinds and names that people have, two that cannot be read, and one without a caption."""
    folder.mkdir()
    rgb = Image.fromarray(drawing(0, 96, 64))
    upright = Image.Exif()
    upright[0x0112] = 6
    rgb.save(folder / "turned.jpg", exif=upright)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((48, 80), 51400, np.uint16)).save(folder / "deep.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    rgb.convert("P").save(folder / "palette.png")
    for name in ODD_NAMES:
        rgb.save(folder / f"{name}.webp")
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "half.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:400])
    for path in [*folder.iterdir()]:
        caption(path)
    rgb.save(folder / "silent.png")
    return folder


def write_odd_videos(folder: Path) -> list[Path]:
    """Write a long, a middling, a turned, a short and a broken video, and a folder of pictures that is one."""
    names = {"long [x]": 40, "Mittlere Länge": 14, "短い": 3}
    videos = [write_video(folder / f"{name}.mp4", frames, fps=30) for name, frames in names.items()]
    videos.append(write_video(folder / "turned.mp4", 12, rotation=90))
    videos.append(write_video(folder / "broken.mp4", 12))
    videos[-1].write_bytes(videos[-1].read_bytes()[:900])
    for video in videos:
        caption(video)
    videos.append(write_pictures(folder / "frames of one", {f"{i:02}": (80, 64) for i in range(10)}, caption=None))
    return videos


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file over pictures and videos of many kinds, with every frame_extraction and several rates."""
    folder = tmp_path_factory.mktemp("report äöü [1]")
    pictures, videos = write_odd_pictures(folder / "pictures"), write_odd_videos(folder / "videos")
    listed = write_jsonl(folder / "v.jsonl", [{"video_path": video, "caption": "x"} for video in videos])
    extractions = {
        "head": {"target_frames": [1, 9], "source_fps": 30},
        "chunk": {"target_frames": [5, 13], "num_repeats": 3},
        "slide": {"target_frames": [5], "frame_stride": 3, "source_fps": 30.0},
        "uniform": {"target_frames": [5, 9], "frame_sample": 3, "source_fps": 12},
        "full": {"max_frames": 19, "source_fps": 8},
    }
    datasets = [{"image_directory": pictures, "cache_directory": folder / "cache_pictures", "bucket_no_upscale": True}]
    for name, keys in extractions.items():
        source = {"video_directory": folder / "videos"} if name == "head" else {"video_jsonl_file": listed}
        datasets.append(source | {"frame_extraction": name, "cache_directory": folder / f"cache_{name}", **keys})
    return write_toml(folder / "data.toml", GENERAL, *datasets)


@pytest.fixture(scope="module")
def report(data: Path) -> Report:
    return examine(load_config(data), T2V, torch.bfloat16, workers=2, thumbnails=True)


def bytes_of_tensors(header: CacheHeader) -> int:
    return sum(math.prod(shape) * header.dtypes[key].itemsize for key, shape in header.shapes.items())


def test_what_is_only_measured_is_told_apart(data: Path, report: Report):
    head, last = data.read_text().rsplit("[[datasets]]", 1)
    (data.parent / "validated.toml").write_text(f"{head}[[validation]]{last}")
    told = examine(load_config(data.parent / "validated.toml"), T2V, torch.bfloat16, workers=2)
    measured = len(report.datasets[-1].clips)
    assert measured and f"validation: {measured} examples, not trained on" in told.totals()
    batches = as_json(report)["totals"]["batches_per_epoch"] - report.datasets[-1].batches()
    assert as_json(told)["totals"]["batches_per_epoch"] == batches
    assert [each["validation"] for each in as_json(told)["datasets"]] == [False] * (len(told.datasets) - 1) + [True]


def one(report: Report, dataset: int, name: str) -> FileReport:
    (found,) = [file for file in report.datasets[dataset].files if file.path.name == name]
    return found


def test_the_report_names_the_very_cache_files_that_caching_makes(data: Path, report: Report, models, run_cli):
    told = data.parent / "report.json"
    command = ["wan_cache_latents.py", "--dataset_config", data]
    asked = run_cli(*command, "--report_json", told)
    assert asked.returncode == 0, asked.stderr
    done = run_cli(*command, "--vae", models["vae"], "--device", "cpu")
    assert done.returncode == 0, done.stderr
    content = json.loads(told.read_text(encoding="utf-8"))
    failed, dropped = set(), set()
    for config, dataset in zip(load_config(data), content["datasets"], strict=True):
        clips = {clip["cache"]: clip for file in dataset["files"] for clip in file["clips"]}
        paths = {path.name: path for path in config.cache_directory.iterdir() if path.suffix == ".safetensors"}
        assert clips and clips.keys() == paths.keys()
        for name, clip in clips.items():
            header = read_header(paths[name])
            frames, height, width = header.by_batch_name()["latents"][1:]
            assert (clip["frames"], clip["height"], clip["width"]) == (4 * frames - 3, 8 * height, 8 * width)
            assert header.metadata.get("frame_count", "1") == str(clip["frames"])
            assert clip["bytes"] - HEADER == bytes_of_tensors(header)
        lost = {file["path"]: file["dropped"] for file in dataset["files"] if file["dropped"]}
        dropped |= lost.keys()
        failed |= {path for path, why in lost.items() if why != NO_CAPTION}
    # Whether caching names files without a caption among those that failed is not at stake here.
    assert failed and failed <= set(re.findall(r"failed: (.+?): ", done.stderr)) <= dropped
    assert content["datasets"] == as_json(report)["datasets"]


def test_batches_per_epoch_are_those_of_the_loader(data: Path, report: Report, models):
    configs = load_config(data)
    encoders = load_latent_encoders(VaeOptions(vae=models["vae"]), ClipOptions(), torch.bfloat16, torch.device("cpu"))
    options = CachingOptions(device="cpu", skip_existing=True)
    cache_latents(configs, lambda: encoders, torch.bfloat16, options)
    for config in configs:
        for source in find_sources(config):
            write_text(config, source, torch.zeros(4, 4096, dtype=torch.bfloat16))
    summary = CachedDataset(configs, seed=0).summary()
    assert summary.batches == sum(each.batches() for each in report.datasets)
    assert f"an epoch: {summary.batches} batches of {summary.items} examples" in "\n".join(report.totals())


@pytest.mark.parametrize(
    ("dataset", "name", "line"),
    [
        (0, "turned.jpg", "64x96 -> 1 picture"),
        (0, "silent.png", "left out, no caption: silent.txt is missing"),
        (0, "bad.png", "left out, cannot be read: cannot identify image file"),
        (1, "long [x].mp4", "40 frames at 30 fps -> 21 at 16 fps -> 1 clip of 1, 1 of 9, 12 frames unused"),
        (1, "短い.mp4", "3 frames at 30 fps -> 2 at 16 fps -> 1 clip of 1, 1 frame unused"),
        (2, "long [x].mp4", "40 frames -> 8 clips of 5, 3 of 13, every frame used"),
        (2, "短い.mp4", "3 frames -> left out, too short: 2 frames short of 5; target_frames = [1] would take it"),
        (3, "long [x].mp4", "40 frames at 30 fps -> 21 at 16 fps -> 6 clips of 5, 1 frame unused"),
        (4, "frames of one", "10 frames at 12 fps -> 13 at 16 fps -> 3 clips of 5, 3 of 9, every frame used"),
        (5, "Mittlere Länge.mp4", "14 frames at 8 fps -> 28 at 16 fps -> 1 clip of 17, 11 frames unused"),
        (2, "broken.mp4", "left out, cannot be read: "),
    ],
)
def test_each_file_is_explained_in_a_line(report: Report, dataset: int, name: str, line: str):
    assert one(report, dataset, name).line().startswith(line)
    assert line in as_text(report)


def test_what_is_odd_about_a_file_is_noted(report: Report, tmp_path: Path):
    assert "no clip of 9: 7 frames short" in one(report, 1, "短い.mp4").notes
    note = "the file runs at 30 fps and is learned slower; source_fps = 30 mends that"
    assert one(report, 2, "long [x].mp4").notes == (note,)
    assert "the file runs at 16 fps, but source_fps is 30" in one(report, 1, "turned.mp4").notes
    folder = write_pictures(tmp_path / "i", {"a": (32, 32)}, caption=" ")
    configs = load_config(write_toml(tmp_path / "d.toml", GENERAL, {"image_directory": folder}))
    assert one(examine(configs, T2V, torch.bfloat16), 0, "a.png").notes == (
        "the caption is empty",
        "enlarged 2.0 times",
    )


def controlled(folder: Path) -> list[DatasetConfig]:
    """A video with its control, and a one-frame dataset of two control pictures."""
    write_video(folder / "v" / "a.mp4", frames=9)
    write_video(folder / "c" / "a.mp4", frames=5)
    caption(folder / "v" / "a.mp4")
    write_pictures(folder, {"p": (100, 70), "q": (64, 64)})
    lines = [{"image_path": folder / "p.png", "control_path": folder / "q.png", "caption": "y"}]
    videos = {"video_directory": folder / "v", "control_directory": folder / "c", "target_frames": [9]}
    pictures = {"image_jsonl_file": write_jsonl(folder / "l.jsonl", lines), "fp_1f_clean_indices": [0]}
    return load_config(
        write_toml(
            folder / "d.toml",
            GENERAL,
            videos,
            pictures | {"cache_directory": folder / "ci"} | {"fp_1f_target_index": 1},
        )
    )


@pytest.mark.parametrize(("dataset", "names"), [(0, T2V), (0, I2V), (1, ONE_FRAME)])
def test_the_size_of_caches_counts_conditions_controls_and_features(tmp_path: Path, models, dataset, names):
    configs = [controlled(tmp_path)[dataset]]
    vae, clip = VaeOptions(vae=models["vae"]), ClipOptions(clip=models["clip"])
    encoders = load_latent_encoders(vae, clip, torch.float32, torch.device("cpu"))
    (written,) = cache_latents(configs, lambda: encoders, torch.float32, CachingOptions(device="cpu"), names).written
    (clip,) = examine(configs, names, torch.float32).datasets[0].clips
    assert clip.cache == written and clip.size - HEADER == bytes_of_tensors(read_header(written))


def test_what_caching_refuses_the_report_refuses(tmp_path: Path):
    configs = controlled(tmp_path)
    with pytest.raises(UserError, match="--one_frame needs image datasets"):
        examine(configs, ONE_FRAME, torch.bfloat16)
    folder = write_pictures(tmp_path / "i", {"a": (64, 64)}, caption=None)
    with pytest.raises(UserError, match="none of the 1 images"):
        examine(load_config(write_toml(tmp_path / "e.toml", GENERAL, {"image_directory": folder})), T2V, torch.bfloat16)


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[np.ndarray]:
        sources = [value.partition("base64,")[2] for name, value in self.attributes if name == "src"]
        return [np.array(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]


def test_the_page_needs_nothing_and_shows_first_and_last_frame_of_every_clip(report: Report):
    page = Page(as_html(report))
    assert not {"script", "link", "iframe", "b", "base"} & set(page.tags)
    assert all(value.startswith("data:image/jpeg;base64,") for name, value in page.attributes if name == "src")
    assert not [name for name, _ in page.attributes if name in ("href", "onload", "onerror", "style")]
    assert "Grüße & <b>.webp" in page.text and "散歩 'と'.webp" in page.text and "long [x].mp4" in page.text
    expected = []
    for each in report.datasets:
        for file in (file for file in each.files if file.clips):
            source = file.clips[0].item.source
            for clip in read_clips(source, each.config):
                expected += [clip.pixels[0], clip.pixels[-1]][: clip.item.frames]
    shown = page.pictures()
    assert len(shown) == len(expected)
    for thumbnail, frame in zip(shown, expected, strict=True):
        assert thumbnail.shape == frame.shape and np.abs(thumbnail.astype(int) - frame).mean() < 12


def test_captions_and_names_cannot_become_part_of_the_page(tmp_path: Path):
    evil = "</p><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"
    folder = write_pictures(tmp_path / "i", {"<img src=x onerror=alert(3)> &amp;": (64, 64)}, caption=evil)
    configs = load_config(write_toml(tmp_path / "<u>d.toml", GENERAL, {"image_directory": folder}))
    page = Page(as_html(examine(configs, T2V, torch.bfloat16, thumbnails=True)))
    assert page.tags.count("img") == 1 and "script" not in page.tags and "u" not in page.tags
    assert evil in page.text and "<img src=x onerror=alert(3)> &amp;.png" in page.text


@pytest.mark.skipif(sys.platform != "linux", reason="only there names can be no text")
def test_names_that_are_no_text_come_out_in_all_three_forms(tmp_path: Path, run_cli):
    folder = write_pictures(tmp_path / "i", {"a\x1b[31m": (64, 64)})
    shutil.copy(folder / "a\x1b[31m.png", os.fsencode(folder) + b"/\xff.png")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt")).write_text("x")
    path = write_toml(tmp_path / "d.toml", GENERAL, {"image_directory": folder})
    files = ["--report_json", tmp_path / "r.json", "--report_html", tmp_path / "r.html"]
    done = run_cli("wan_cache_latents.py", "--dataset_config", path, *files, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"\udcff.png" in done.stdout and "\x1b[31m" not in done.stdout
    names = [file["path"] for file in json.loads((tmp_path / "r.json").read_bytes())["datasets"][0]["files"]]
    assert sorted(names) == sorted(map(str, folder.glob("*.png")))
    assert r"\udcff.png" in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("option", "place", "message"),
    [
        ("--report_html", "i", "is a folder. Name a file: "),
        ("--report_json", "d.toml/r.json", "is a file, not a folder. Choose another folder."),
    ],
)
def test_a_file_that_could_not_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch, capsys, option: str, place: str, message: str
):
    folder = write_pictures(tmp_path / "i", {"a": (64, 64)})
    path = write_toml(tmp_path / "d.toml", GENERAL, {"image_directory": folder})
    given = ["wan_cache_latents.py", "--dataset_config", str(path), option, str(tmp_path / place)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(UserError, match=option) as error:
        wan_cache_latents.main()
    assert message in str(error.value) and not capsys.readouterr().out


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_every_picture(report: Report, tmp_path: Path):
    (tmp_path / "r.html").write_text(as_html(report), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    screenshot = tmp_path / "r.png"
    subprocess.run(
        [*command, f"--screenshot={screenshot}", "--window-size=1400,9000", (tmp_path / "r.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=60,
    )
    pixels = np.array(Image.open(screenshot).convert("RGB")).astype(int)
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)
    shown = len(Page(as_html(report)).pictures())
    assert shown > 100 and red.sum() > 60 * shown  # the squares of the drawing
