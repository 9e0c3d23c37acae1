"""What the HTML pages of this project share: harmless text, tables, pictures inside, one style; nothing is fetched."""

import base64
import hashlib
import html
import io
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image


def printable(text: str) -> str:
    """Return a text without what moves a terminal's cursor or cannot be encoded, which file names may hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escaped(value: object) -> str:
    """Return a text as HTML. What is not UTF-8 in a file's name shows as it does in a terminal."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else printable(c) for c in str(value)))


def html_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already; heading: may be empty."""
    head = "".join(f"<th>{cell}</th>" for cell in heading)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if heading else ''}{lines}</table>"


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(frame: np.ndarray, side: int) -> bytes:
    """Return a picture [H W 3] as a JPEG whose longer side has at most so many pixels."""
    height, width = frame.shape[:2]
    scale = min(1, side / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    encoded = io.BytesIO()
    Image.fromarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA)).save(encoded, "JPEG", quality=80)
    return encoded.getvalue()


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """Return a whole page; nothing but the given script can run in it, whatever texts the body shows."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = ["default-src 'none'", "img-src data:", "media-src data:", "style-src 'unsafe-inline'"]
    allowed += [f"script-src 'sha256-{digest}'"] * bool(script)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{"; ".join(allowed)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>
{_STYLE}{style}</style>
</head>
<body>{body}{f"<script>{script}</script>" if script else ""}</body>
</html>
"""


_STYLE = """:root { color-scheme: light dark; --line: #8884; --faint: #888; --note: #b06a00; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
"""
