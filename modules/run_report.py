"""The report on a training run: its log and samples as one HTML page that needs nothing else."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from modules import charts
from modules.dataset_report import duration
from modules.pages import data_uri, escaped, html_table, page, thumbnail
from modules.run_log import read_log, report_path
from utils.files import atomic_path

logger = logging.getLogger(__name__)

MEDIA_BYTES = 48 << 20  # of sample files that are in a page as they are, the newest first; older ones as a picture
COLUMNS = 80  # of samples over time at most; where there are more, the older ones are thinned evenly
_SIDE = 256  # pixels of the longer side of such a picture
_KINDS = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg"}
_Curves = defaultdict[str, list[tuple[float, float]]]


@dataclass
class RunData:
    """What a log tells, sorted for the page."""

    start: dict[str, Any] = field(default_factory=dict)
    steps: _Curves = field(default_factory=lambda: defaultdict(list))  # by name, over steps
    epochs: _Curves = field(default_factory=lambda: defaultdict(list))
    validation: _Curves = field(default_factory=lambda: defaultdict(list))
    samples: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)  # the last line of a step
    end: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # of all steps
    examples: int = 0
    left_out: int = 0  # steps


def collect(lines: Iterable[Mapping[str, Any]]) -> RunData:
    """Return what the lines of a log tell."""
    data = RunData()
    for line in lines:
        kind, step = line.get("kind"), line.get("step", 0)
        if kind == "step":
            data.last = dict(line)
            data.seconds += line.get("seconds") or 0
            data.examples += line.get("examples") or 0
            data.left_out += "steps_left_out" in line
            _add(data.steps, step, line)
        elif kind == "validation":
            _add(data.validation, step, line)
        elif kind == "epoch":
            _add(data.epochs, step, line)
        elif kind in ("start", "end", "stop"):
            setattr(data, "start" if kind == "start" else "end", dict(line))
        elif kind in ("sample", "save", "warning"):
            {"sample": data.samples, "save": data.saves, "warning": data.warnings}[kind].append(dict(line))
    return data


def _add(curves: _Curves, step: int, line: Mapping[str, Any]) -> None:
    for name, value in line.items():
        if name not in ("kind", "step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool):
            curves[name].append((step, value))


class Reporter:
    """Writes the report on a log; pictures of samples are made once and kept."""

    def __init__(self, log: Path):
        self.log, self.path = log, report_path(log)
        self._pictures: dict[Path, bytes | None] = {}

    def write(self) -> None:
        """Write the report. What goes wrong with it is a warning: it never ends a run."""
        try:
            with atomic_path(self.path) as temporary:
                temporary.write_text(self.html(), encoding="utf-8", errors="backslashreplace")
        except Exception as error:
            logger.warning("%s: could not be written (%s)", self.path, error)

    def html(self) -> str:
        data = collect(read_log(self.log))
        name = data.start.get("name", self.log.stem)
        body = [f"<h1>{escaped(name)}</h1>", _overview(data), f'<div class="charts">{_charts(data)}</div>']
        body.append(self._samples(data.samples))
        if data.warnings:
            rows = [[escaped(line["step"]), escaped(line.get("text", ""))] for line in data.warnings[-50:]]
            body.append(f"<h2>Warnings</h2>{html_table(['step', ''], rows)}")
        body.append(_saves(data, self.log.parent))
        body += [_dataset(data.start.get("dataset", {})), _settings(data.start.get("settings", {}))]
        return page(f"{name}: training", "".join(body), charts.STYLE + _STYLE, charts.SCRIPT + _SCRIPT)

    def _samples(self, samples: Sequence[Mapping[str, Any]]) -> str:
        """Return the grid: a row a prompt, a column a time."""
        if not samples:
            return ""
        shown, whole = thin_columns(samples), self._whole(samples)
        prompts = samples[-1].get("prompts", [])
        rows = max(len(each.get("files", [])) for each in shown)
        heading = ["prompt"] + [_when(each) for each in shown]
        table = []
        for row in range(rows):
            cells = [f'<div class="prompt">{escaped(prompts[row] if row < len(prompts) else "")}</div>']
            for each in shown:
                files = each.get("files", [])
                cells.append(self._medium(self.log.parent / files[row], whole) if row < len(files) else "")
            table.append(cells)
        thinned = f", {len(shown)} of {len(samples)} times" if len(shown) < len(samples) else ""
        button = '<button id="play" type="button">play</button>'
        grid = f'<div class="samples">{html_table(heading, table)}</div>'
        return f"<h2>Samples{thinned} {button}</h2>{grid}"

    def _whole(self, samples: Sequence[Mapping[str, Any]]) -> set[Path]:
        """Return the files that are in the page as they are: the newest, as many as MEDIA_BYTES has room for."""
        room, found = MEDIA_BYTES, set()
        for path in (self.log.parent / name for each in reversed(samples) for name in reversed(each.get("files", []))):
            room -= path.stat().st_size if path.is_file() else 0
            if room < 0:
                break
            found.add(path)
        return found

    def _medium(self, path: Path, whole: set[Path]) -> str:
        kind = _KINDS.get(path.suffix.lower())
        if kind is None or not path.is_file():
            return '<span class="gone">no file</span>'
        name = escaped(path.name)
        if path in whole and kind == "video/mp4":
            uri = data_uri(path.read_bytes(), kind)
            return f'<video src="{uri}" title="{name}" loop muted playsinline></video>'
        if path in whole:
            return f'<img src="{data_uri(path.read_bytes(), kind)}" alt="{name}" title="{name}">'
        if path not in self._pictures:
            self._pictures[path] = first_picture(path)
        picture = self._pictures[path]
        return f'<img src="{data_uri(picture, "image/jpeg")}" alt="{name}" title="{name}">' if picture else name


def thin_columns(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return at most COLUMNS of the samplings, the first and the last among them, evenly."""
    if len(samples) <= COLUMNS:
        return list(samples)
    return [samples[round(i * (len(samples) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]


def first_picture(path: Path) -> bytes | None:
    """Return the first frame of a video, or a picture, as a small JPEG; None where it cannot be read."""
    try:
        if path.suffix.lower() == ".mp4":
            with av.open(str(path)) as container:
                frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
        else:
            with Image.open(path) as image:
                frame = np.asarray(image.convert("RGB"))
        return thumbnail(frame, _SIDE)
    except Exception:
        return None


def _when(sample: Mapping[str, Any]) -> str:
    epoch = f", epoch {sample['epoch']}" if sample.get("epoch") else ""
    return f"step {sample.get('step')}{epoch}"


def _overview(data: RunData) -> str:
    start, last = data.start, data.last
    step, total = last.get("step", start.get("step", 0)), start.get("total_steps")
    rows = [["steps", f"{step:,} of {total:,}" if total else f"{step:,}"]]
    if last:
        rows.append(["loss", f"{_short(last.get('loss'))}, average {_short(last.get('average'))}"])
    if data.seconds:
        recent = [seconds for _, seconds in data.steps["seconds"][-200:]]
        pace = sum(recent) / len(recent)
        rows.append(["time in steps", f"{duration(data.seconds)}, {_short(pace)} s a step"])
        rows.append(["throughput", f"{_short(data.examples / data.seconds)} examples a second"])
        if not data.end and total and total > step:
            rows.append(["left", f"about {duration((total - step) * pace)}, saves and samples not counted"])
    if memory := data.steps.get("memory_gb"):
        rows.append([start.get("memory", "memory"), f"{max(gb for _, gb in memory):.2f} GB at most"])
    if data.left_out:
        rows.append(["left out", f"{data.left_out} steps whose loss was no finite number"])
    for name in ("device", "trained", "optimizer", "seed"):
        if start.get(name) is not None:
            rows.append([name, str(start[name])])
    began = start.get("time")
    if began:
        rows.append(["began", datetime.fromtimestamp(began).strftime("%Y-%m-%d %H:%M")])
    state = {"end": "finished", "stop": "stopped"}.get(data.end.get("kind"), "running, or ended without a word")
    if data.end.get("error"):
        state += f": {data.end['error']}"
    rows.append(["state", f"{state}; last line of the log {_time((data.end or last or start).get('time'))}"])
    return html_table([], [[escaped(cell) for cell in row] for row in rows])


def _charts(data: RunData) -> str:
    steps = data.steps
    rates = {name.removeprefix("lr/"): points for name, points in steps.items() if name.startswith("lr/")}
    norms = {name: points for name, points in steps.items() if name.startswith("max_norm/")}
    known = {"loss", "average", "grad_norm", "seconds", "memory_gb", "epoch", "examples", "steps_left_out"}
    others = {
        name: points
        for name, points in steps.items()
        if name not in known and not name.startswith(("lr/", "max_norm/"))
    }
    loss = {"loss": steps.get("loss", []), "average": steps.get("average", []), "epoch": data.epochs.get("loss", [])}
    bins, trained = (
        # By number: an epoch whose first examples lie elsewhere has other bins first.
        {n: c[n] for n in sorted(c, key=lambda n: (len(n.partition("-")[0]), n)) if n not in ("loss", "epoch")}
        for c in (data.validation, data.epochs)
    )
    drawn = [
        charts.chart("loss", loss, faint=["loss"]),
        charts.chart("learning rate", rates, zero=True),
        charts.chart("validation loss", {"validation": data.validation.get("loss", [])}),
        charts.chart("validation", bins),
        charts.chart("loss of an epoch by timestep", trained),
        charts.chart("norm of the gradients", {"norm": steps.get("grad_norm", [])}, faint=["norm"], zero=True),
        charts.chart("norms of the network", norms),
        charts.chart("seconds a step", {"seconds": steps.get("seconds", [])}, faint=["seconds"], zero=True),
        charts.chart("memory, GB", {"memory": steps.get("memory_gb", [])}, zero=True),
        *(charts.chart(name, {name: points}) for name, points in others.items()),
    ]
    return "".join(drawn)


def _saves(data: RunData, folder: Path) -> str:
    """Return a table of the files and states that the run has saved and that are in its folder now."""
    if not data.saves:
        return ""
    saved = {each.get("file", ""): each for each in data.saves}
    there = [each for name, each in saved.items() if (folder / name).exists()]
    table = html_table(["step", "file"], [[escaped(each.get(name)) for name in ("step", "file")] for each in there])
    gone = f", {len(saved) - len(there)} more are gone" if len(there) < len(saved) else ""
    return f"<details><summary>Files saved: {len(there)}{gone}</summary>{table}</details>"


def _dataset(dataset: Mapping[str, Any]) -> str:
    if not dataset:
        return ""
    rows = [[escaped(bucket), escaped(count)] for bucket, count in dataset.get("buckets", [])]
    line = f"{dataset.get('items')} examples, repeats counted, in {dataset.get('batches')} batches an epoch"
    return f"<h2>Data</h2><p>{escaped(line)}</p>{html_table(['size', 'examples'], rows)}"


def _settings(settings: Mapping[str, Any]) -> str:
    """Return the options of the run, those that were changed first and the others folded away."""
    if not settings:
        return ""
    given, defaults = ([], [])
    for name, entry in settings.items():
        value, changed = (entry["value"], entry["changed"]) if isinstance(entry, Mapping) else (entry, True)
        (given if changed else defaults).append([f"--{escaped(name)}", escaped(_value(value))])
    rest = f"<details><summary>as by default: {len(defaults)}</summary>{html_table([], defaults)}</details>"
    return f"<h2>Settings</h2>{html_table([], given)}{rest if defaults else ''}"


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _short(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4g}"


def _time(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else ""


_STYLE = """
.samples { overflow-x: auto; } .samples th { font-weight: normal; color: var(--faint); white-space: nowrap; }
.samples td { vertical-align: top; border: 0; padding: .2rem; } .samples table { margin: 0; }
.samples :is(th, td):first-child { position: sticky; left: 0; background: Canvas; z-index: 1; padding-right: .8rem; }
.prompt { width: 11rem; max-height: 12rem; overflow: auto; font-size: .9rem; }
.samples video, .samples img { width: 192px; border-radius: 4px; display: block; }
.gone { color: var(--faint); } summary { cursor: pointer; margin: .6rem 0; } button { font: inherit; font-size: .9rem; }
"""
# Videos play while they are in view.
_SCRIPT = """
for (const grid of document.querySelectorAll(".samples")) {
  grid.scrollLeft = grid.scrollWidth;
  const seen = new Set(), button = document.getElementById("play");
  let playing = false;
  const show = () => {
    for (const video of grid.querySelectorAll("video")) {
      if (playing && seen.has(video)) { video.play(); } else { video.pause(); }
    }
    button.textContent = playing ? "pause" : "play";
  };
  const observer = new IntersectionObserver(entries => {
    for (const entry of entries) { seen[entry.isIntersecting ? "add" : "delete"](entry.target); }
    show();
  });
  grid.querySelectorAll("video").forEach(video => observer.observe(video));
  button.addEventListener("click", () => { playing = !playing; show(); });
  playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  show();
}
"""
