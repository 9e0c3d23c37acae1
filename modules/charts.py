"""Curves as SVG inside a page, thinned to what an eye can see, with the values under the pointer."""

import json
import math
from collections.abc import Mapping, Sequence

from modules.pages import escaped

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 560, 230  # of the drawing, in units of SVG, with these margins for ticks
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 24
_POINTS = 600  # of a curve at most
_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#e11d48", "#8b5cf6", "#a16207", "#0891b2", "#6b7280")


def chart(title: str, curves: Mapping[str, Points], faint: Sequence[str] = (), zero: bool = False) -> str:
    """Return a chart of curves by name, points (x, y) each, x rising; "" where no curve has a point.

    faint: names of curves that are drawn as a band from the lowest to the highest value. zero: y begins at 0.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    thin = {name: thinned(points) for name, points in curves.items()}
    xs = [x for points in thin.values() for x, *_ in points]
    low_x, high_x = min(xs), max(xs)
    low_y, high_y = _range([y for points in curves.values() for _, y in points], zero)
    scale_x = (WIDTH - _LEFT - _RIGHT) / ((high_x - low_x) or 1)
    scale_y = (HEIGHT - _TOP - _BOTTOM) / ((high_y - low_y) or 1)

    def place(x: float, y: float) -> str:
        y = min(max(y, low_y), high_y)
        return f"{_LEFT + (x - low_x) * scale_x:.1f},{HEIGHT - _BOTTOM - (y - low_y) * scale_y:.1f}"

    parts = []
    for y in ticks(low_y, high_y):
        at = place(low_x, y).split(",")[1]
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy=".32em" text-anchor="end">{number(y)}</text>')
    for x in ticks(low_x, high_x):
        at = place(x, low_y).split(",")[0]
        parts.append(f'<text x="{at}" y="{HEIGHT - 6}" text-anchor="middle">{number(x)}</text>')
    for colour, (name, points) in zip(_cycle(len(thin)), thin.items(), strict=True):
        if name in faint:
            there = [place(x, high) for x, _, _, high in points]
            back = [place(x, low) for x, _, low, _ in reversed(points)]
            parts.append(f'<polygon points="{" ".join(there + back)}" fill="{colour}" opacity=".25"/>')
        line = " ".join(place(x, mean) for x, mean, _, _ in points)
        style = f'fill="none" stroke="{colour}" stroke-width="{1 if name in faint else 1.8}"'
        style += ' opacity=".6"' if name in faint else ""
        if len(points) == 1:
            x, y = line.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        parts.append(f'<polyline points="{line}" {style}/>')
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escaped(name)}</span>'
        for colour, name in zip(_cycle(len(thin)), thin, strict=True)
    )
    data = {name: [[x, float(f"{mean:.6g}")] for x, mean, _, _ in points] for name, points in thin.items()}
    frame = {"low": low_x, "high": high_x, "left": _LEFT, "right": WIDTH - _RIGHT, "width": WIDTH}
    told = escaped(json.dumps({**frame, "curves": data}, separators=(",", ":")))
    return (
        f'<figure class="chart"><figcaption><b>{escaped(title)}</b> {legend}<output></output></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" data-chart="{told}">{"".join(parts)}'
        f'<line class="here" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" x1="-9" x2="-9"/></svg></figure>'
    )


def thinned(points: Points, most: int = _POINTS) -> list[tuple[float, float, float, float]]:
    """Return (x, mean, lowest, highest) of at most so many runs of neighbouring points; x: of the last of a run."""
    size = math.ceil(len(points) / most)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    result = []
    for run in runs:
        ys = [y for _, y in run]
        result.append((run[-1][0], sum(ys) / len(ys), min(ys), max(ys)))
    return result


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers from low to high, about so many."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Return a number as a tick shows it: 0.05, 2e-05, 12k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{float(f'{value:.4g}'):g}"


def _range(ys: Sequence[float], zero: bool) -> tuple[float, float]:
    """Return the lowest and highest y to show; a few values far above all others do not flatten the rest."""
    ordered = sorted(ys)
    low, high = ordered[0], ordered[-1]
    usual = ordered[math.ceil(0.99 * (len(ordered) - 1))]
    if len(ordered) > 50 and high - low > 4 * (usual - low) > 0:
        high = usual + 0.25 * (usual - low)
    if zero:
        low = min(low, 0.0)
    if high == low:
        low, high = (low - 0.5, high + 0.5) if low == 0 else (min(0, 2 * low), max(0, 2 * high))
    return low, high


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 1rem; }
.chart { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .5rem .7rem; }
.chart svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--faint); }
.chart .grid { stroke: var(--line); } .chart .here { stroke: var(--faint); }
.chart figcaption { font-size: .9rem; min-height: 2.9em; } .chart span { margin-left: .7em; white-space: nowrap; }
.chart i { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .3em; }
.chart output { display: block; color: var(--faint); font-size: .85rem; }
"""
# The pointer's x picks the nearest point of each curve.
SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart), here = svg.querySelector(".here");
  const told = svg.parentElement.querySelector("output");
  const leave = () => { told.textContent = ""; here.setAttribute("x1", -9); here.setAttribute("x2", -9); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * chart.width;
    const x = chart.low + (at - chart.left) / (chart.right - chart.left) * (chart.high - chart.low);
    let shown = null, words = [];
    for (const [name, points] of Object.entries(chart.curves)) {
      const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      shown = shown ?? near[0];
      words.push(name + " " + near[1]);
    }
    const place = chart.left + (shown - chart.low) / ((chart.high - chart.low) || 1) * (chart.right - chart.left);
    here.setAttribute("x1", place); here.setAttribute("x2", place);
    told.textContent = "step " + shown + ": " + words.join(", ");
  });
}
"""
