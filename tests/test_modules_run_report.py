"""The report on a run: what it shows, that it needs nothing else, and that a browser shows it."""

import re
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from modules import run_report
from modules.charts import chart, thinned, ticks
from modules.run_log import RunLog, log_path
from modules.run_report import Reporter, thin_columns
from tests.media import write_video
from tests.test_modules_dataset_report import CHROMIUM, Page

EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"
RED = (220, 30, 30)


@pytest.fixture
def reporter(tmp_path):
    """The reporter of a run of 60 steps with two prompts sampled five times."""
    log = RunLog(log_path(tmp_path, "name"))
    log.begin()
    settings = {"learning_rate": {"value": 1e-4, "changed": True}, "seed": {"value": None, "changed": False}}
    dataset = {"items": 12, "batches": 6, "buckets": [["64x64, 17 frames", 12]]}
    log.write("start", 0, name="name", total_steps=60, device="a device", settings=settings, dataset=dataset)
    for step in range(1, 61):
        values = {"lr/unet": 1e-4 * (1 - step / 60), "memory_gb": 3.25, "seconds": 0.5, "examples": 2}
        log.write("step", step, epoch=1, loss=1 / step, average=1 / step, grad_norm=0.1, **values)
        if step % 12 == 0:
            files = [f"sample/{step}_0.mp4", f"sample/{step}_1.png"]
            write_video(tmp_path / files[0], 5, width=64, height=64)
            Image.new("RGB", (64, 64), RED).save(tmp_path / files[1])
            log.write("sample", step, epoch=None, files=files, prompts=[EVIL, "a red square"])
            log.write("validation", step, loss=2 / step, **{"loss/0-250": 3 / step, "loss/250-500": 4 / step})
    log.write("warning", 60, text="the disk is full")
    log.write("save", 60, file="name.safetensors")
    log.write("end", 60, seconds=40)
    log.close()
    return Reporter(log.path)


def test_the_page_tells_what_the_log_tells_and_needs_nothing(reporter):
    page = Page(reporter.html())
    for text in ("60 of 60", "4 examples a second", "3.25 GB at most", "a device", "the disk is full", "12 examples"):
        assert text in page.text
    assert "--learning_rate" in page.text and "64x64, 17 frames" in page.text and "finished" in page.text
    assert page.tags.count("video") == 5 and page.tags.count("img") == 5
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == 10 and all(value.startswith("data:") for value in sources)
    assert page.tags.count("script") == 1 and EVIL in page.text
    titles = re.findall(r"<figcaption><b>(.*?)</b>", reporter.html())
    assert titles[:4] == ["loss", "learning rate", "validation loss", "validation"]
    assert not re.search(r"https?://(?!www\.w3\.org)", reporter.html())


def test_files_are_those_that_are_there_however_the_others_went(reporter):
    """The log may have a file that rotation has deleted, or a state whose writing a full disk has ended."""
    assert "Files saved: 0, 1 more are gone" in reporter.html()
    (reporter.log.parent / "name.safetensors").touch()
    assert "Files saved: 1<" in reporter.html()


def test_older_samples_become_pictures_where_the_newest_fill_the_page(reporter, monkeypatch):
    newest = sorted((reporter.log.parent / "sample").glob("60_*"))
    monkeypatch.setattr(run_report, "MEDIA_BYTES", sum(path.stat().st_size for path in newest))
    page = Page(reporter.html())
    kinds = [value[: value.index(";")] for name, value in page.attributes if name == "src"]
    assert [kinds.count(f"data:{kind}") for kind in ("video/mp4", "image/png", "image/jpeg")] == [1, 1, 8]


def test_steps_that_were_left_out_and_the_reason_of_an_end_are_told(tmp_path):
    log = RunLog(log_path(tmp_path, "name"))
    log.begin()
    log.write("step", 1, loss=0.5, average=0.5)
    log.write("step", 2, loss=float("nan"), average=float("nan"), steps_left_out=1)
    log.write("stop", 2, error="out of <memory>")
    text = Page(Reporter(log.path).html()).text
    assert "1 steps whose loss was no finite number" in text and "no number, average no number" in text
    assert "stopped: out of <memory>" in text


def test_curves_by_timestep_are_in_their_order_whatever_an_epoch_saw_first(tmp_path):
    log = RunLog(log_path(tmp_path, "name"))
    log.begin()
    log.write("step", 1, loss=0.5)
    log.write("epoch", 1, epoch=1, loss=0.5, **{"t500-600": 1.0})
    log.write("epoch", 2, epoch=2, loss=0.5, **{"t100-200": 1.0, "t900-1000": 2.0, "t0-100": 3.0})
    text = Page(Reporter(log.path).html()).text
    places = [text.index(f"t{name}") for name in ("0-100", "100-200", "500-600", "900-1000")]
    assert places == sorted(places)


def test_a_sample_that_was_deleted_leaves_its_place(reporter):
    (reporter.log.parent / "sample" / "24_0.mp4").unlink()
    page = Page(reporter.html())
    assert page.text.count("no file") == 1 and page.tags.count("video") == 4


def test_columns_are_thinned_evenly_with_first_and_last():
    samples = [{"step": step} for step in range(1000)]
    shown = [each["step"] for each in thin_columns(samples)]
    assert len(shown) == run_report.COLUMNS and (shown[0], shown[-1]) == (0, 999)
    assert {b - a for a, b in zip(shown, shown[1:], strict=False)} <= {12, 13}


def test_a_hundred_thousand_lines_make_a_small_page_quickly(tmp_path):
    path = log_path(tmp_path, "name")
    with open(path, "w") as file:
        for step in range(1, 100_001):
            file.write(
                f'{{"kind": "step", "step": {step}, "time": 1.0, "epoch": 1, "loss": {step % 97}, "average": 48.0, '
                f'"lr/unet": 0.1, "grad_norm": 0.5, "seconds": 0.1, "memory_gb": 1.0, "examples": 1}}\n'
            )
    start = time.process_time()
    text = Reporter(path).html()
    assert time.process_time() - start < 15 and len(text) < 1_000_000
    assert "100,000" in text


def test_what_goes_wrong_with_a_report_is_a_warning(reporter, monkeypatch, caplog):
    monkeypatch.setattr(Reporter, "html", lambda self: 1 / 0)
    reporter.write()
    assert "name_report.html: could not be written (division by zero)" in caplog.text and not reporter.path.exists()


def test_thinning_keeps_mean_and_extremes():
    points = [(x, (-1) ** x * x) for x in range(1, 3001)]
    thin = thinned(points, 600)
    assert len(thin) == 600 and thin[-1][0] == 3000
    assert max(high for *_, high in thin) == 3000 and min(low for _, _, low, _ in thin) == -2999
    assert sum(mean * 5 for _, mean, _, _ in thin) == pytest.approx(sum(y for _, y in points))


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]), (3, 3, [3]), (-7, 8, [-5, 0, 5])],
)
def test_ticks_are_round(low, high, want):
    assert ticks(low, high) == pytest.approx(want)


def test_a_chart_draws_its_values_to_scale():
    svg = chart("t", {"a": [(0, 0.0), (10, 1.0)]})
    (line,) = re.findall(r'<polyline points="(.*?)"', svg)
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in line.split())
    assert (x0, y0, x1, y1) == (58, 206, 548, 10)
    assert chart("t", {"a": []}) == ""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_draws_the_curves_and_plays_the_videos(reporter, tmp_path):
    reporter.write()
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=3000"]
    screenshot = tmp_path / "r.png"
    asked = [f"--screenshot={screenshot}", "--window-size=1400,2600"]
    shot = subprocess.run([*command, *asked, reporter.path.as_uri()], capture_output=True, timeout=60, check=True)
    assert b"Content Security Policy" not in shot.stderr
    pixels = np.array(Image.open(screenshot).convert("RGB")).astype(int)

    def count(colour, tolerance):
        return (np.abs(pixels - colour).max(-1) < tolerance).sum()

    assert count((0xF9, 0x73, 0x16), 40) > 300  # the average
    assert count(RED, 12) > 5 * 5000  # the pictures
    assert count((0, 0, 120), 20) > 5 * 5000  # the backgrounds of the videos
    told = subprocess.run([*command, "--dump-dom", reporter.path.as_uri()], capture_output=True, timeout=60, check=True)
    assert b">pause</button>" in told.stdout
