"""The report on a dataset for eyes and programs: tables for a terminal, JSON, and a page that needs nothing else."""

import base64
import html
import json
import logging
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from modules.dataset_report import (
    ENCODED_PER_SECOND,
    ClipReport,
    DatasetReport,
    FileReport,
    Report,
    ReportOptions,
    in_bytes,
)
from utils.errors import UserError
from utils.files import atomic_path, require_writable_folder

logger = logging.getLogger(__name__)


def check_outputs(options: ReportOptions) -> None:
    """Raise UserError for files that could not be written once all media have been read."""
    for name in ("report_json", "report_html"):
        if (path := getattr(options, name)) is not None:
            if path.is_dir():
                raise UserError(f"--{name} {path}: is a folder", f"name a file: {path / 'report'}.{name[7:]}")
            require_writable_folder(path.absolute().parent, f"--{name}")


def write_report(report: Report, options: ReportOptions) -> None:
    """Print the report, and write the files that are asked for."""
    encoding = sys.stdout.encoding or "utf-8"  # of a pipe on Windows one without kanji
    print(as_text(report).encode(encoding, "backslashreplace").decode(encoding))
    writers: dict[str, Callable[[], str]] = {
        "report_json": lambda: json.dumps(as_json(report), ensure_ascii=False, indent=1) + "\n",
        "report_html": lambda: as_html(report),
    }
    for name, make in writers.items():
        if (path := getattr(options, name)) is not None:
            with atomic_path(path) as temporary:
                # Names that are not UTF-8 hold halves of characters; written so, JSON can be read all the same.
                temporary.write_text(make(), encoding="utf-8", errors="backslashreplace")
            logger.info("wrote %s", path)


# ------------------------------------------------------------------------------------------------------ in a terminal
def as_text(report: Report) -> str:
    """Return the report as tables for a terminal."""
    parts = []
    for each in report.datasets:
        rows = [("file", "what comes out", "bucket")]
        for file in each.files:
            remarks = "".join(f" ({note})" for note in file.notes)
            rows.append((printable(file.path.name), printable(file.line() + remarks), file.bucket))
        parts.append(f"{printable(each.heading())}\n{_table(rows)}")
        if each.clips:
            buckets = [(f"{w}x{h}", str(n), str(count)) for (w, h, n), count in sorted(each.buckets().items())]
            parts.append(_table([("bucket", "frames", "examples"), *buckets]))
    return "\n\n".join([*parts, "\n".join(report.totals())])


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(_columns(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [[cell + " " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join(row).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _columns(text: str) -> int:
    """Return how many columns of a terminal a text takes; kanji take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def printable(text: str) -> str:
    """Return a text without what moves a terminal's cursor or cannot be encoded, which file names may hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# -------------------------------------------------------------------------------------------------------- as JSON
def as_json(report: Report) -> dict[str, Any]:
    """Return the report as tables and lists of JSON's types."""
    return {
        "datasets": [_dataset_json(each) for each in report.datasets],
        "totals": {
            "examples": sum(len(each.clips) for each in report.datasets),
            "batches_per_epoch": sum(each.batches() for each in report.datasets if not each.config.validation),
            "dropped": dict(report.dropped),
            "latent_bytes": report.latent_bytes,
            "text_bytes": report.text_bytes,
            "reading_seconds": round(report.seconds, 1),
            "encoding_seconds_h100": round(report.encoded / ENCODED_PER_SECOND, 1),
        },
    }


def _dataset_json(each: DatasetReport) -> dict[str, Any]:
    return {
        "where": each.config.where,
        "kind": each.config.kind,
        "validation": each.config.validation,
        "cache_directory": str(each.config.cache_directory),
        "files": [_file_json(file) for file in each.files],
        "buckets": [
            {"width": width, "height": height, "frames": frames, "examples": examples}
            for (width, height, frames), examples in sorted(each.buckets().items())
        ],
        "batches_per_epoch": each.batches(),
    }


def _file_json(file: FileReport) -> dict[str, Any]:
    video = {}
    if file.facts:
        video = {"file_frames": file.facts.frames, "file_fps": file.facts.fps, "source_fps": file.source_fps}
        video |= {"frames": file.frames, "unused": file.unused}
    return {
        "path": str(file.path),
        "caption": file.caption,
        "width": file.width,
        "height": file.height,
        **video,
        "result": file.line(),
        "dropped": file.dropped or None,
        "detail": file.detail or None,
        "notes": list(file.notes),
        "clips": [
            {
                "cache": clip.cache.name,
                "width": clip.item.width,
                "height": clip.item.height,
                "first_frame": clip.item.first_frame,
                "frames": clip.item.frames,
                "bytes": clip.size,
            }
            for clip in file.clips
        ],
    }


# ------------------------------------------------------------------------------------------------------- as a page
def as_html(report: Report) -> str:
    """Return the report as one page; pictures are inside, and nothing is fetched or run."""
    lost = [file for each in report.datasets for file in each.files if file.dropped]
    left_out = ""
    if lost:
        rows = [[_text(file.path), _text(file.dropped), _text(file.detail)] for file in lost]
        left_out = f"<h2>Left out</h2>{_html_table(['file', 'why', ''], rows)}"
    body = "".join(map(_dataset_html, report.datasets))
    totals = "".join(f"<li>{_text(line)}</li>" for line in report.totals())
    return _PAGE.replace("{body}", f"<h1>What the model will see</h1><ul>{totals}</ul>{left_out}{body}")


def _dataset_html(each: DatasetReport) -> str:
    buckets = [[f"{w} x {h}", str(n), str(count)] for (w, h, n), count in sorted(each.buckets().items())]
    table = _html_table(["bucket", "frames", "examples"], buckets) if buckets else ""
    files = "".join(_file_html(file) for file in each.files if file.clips)
    return f"<h2>{_text(each.heading())}</h2>{table}<div class=files>{files}</div>"


def _file_html(file: FileReport) -> str:
    notes = "".join(f"<p class=note>{_text(note)}</p>" for note in file.notes)
    clips = "".join(map(_clip_html, file.clips))
    caption = f"<p class=caption>{_text(file.caption or '')}</p>"
    result = f"{_text(file.line())}, bucket {_text(file.bucket)}"
    words = f"<h3>{_text(file.path.name)}</h3><p>{result}</p>{notes}"
    return f"<article>{words}<div class=clips>{clips}</div>{caption}</article>"


def _clip_html(clip: ClipReport) -> str:
    item = clip.item
    pictures = {"first frame": clip.first}
    if item.frames > 1:
        pictures["last frame"] = clip.last
    pictures |= {f"control {number}": control for number, control in enumerate(clip.controls, 1)}
    if clip.mask:
        pictures["mask"] = clip.mask
    shown = "".join(
        f'<img alt="{name}" title="{name}" src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}">'
        for name, picture in pictures.items()
    )
    where = f"frames {item.first_frame} to {item.first_frame + item.frames - 1}, " if item.source.is_video else ""
    return f"<figure>{shown}<figcaption>{where}{in_bytes(clip.size)}</figcaption></figure>"


def _html_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in heading)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"


def _text(value: object) -> str:
    """Return a text as HTML. What is not UTF-8 in a file's name shows as it does in a terminal."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else printable(c) for c in str(value)))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Dataset report</title>
<style>
:root { color-scheme: light dark; --line: #8884; --faint: #888; --note: #b06a00; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
.files { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 1rem; align-items: start; }
article { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
article p { margin: .3rem 0; } .note { color: var(--note); }
.caption { white-space: pre-wrap; color: var(--faint); overflow-wrap: anywhere; max-height: 9em; overflow: auto; }
.clips { display: flex; flex-wrap: wrap; gap: .8rem; margin: .6rem 0; }
figure { margin: 0; } img { display: inline-block; margin-right: 4px; border-radius: 3px; vertical-align: top; }
figcaption { color: var(--faint); font-size: .85rem; }
</style>
</head>
<body>{body}</body>
</html>
"""
