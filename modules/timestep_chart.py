"""How the noise levels of a training run will be distributed, on the console or as a picture, without a model."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dataset.config import DatasetConfig, load_config
from dataset.loader import find_cached
from modules.flow_matching import TimestepOptions, check_timesteps, sample_timesteps
from modules.losses import LossOptions, check_loss, loss_weights
from modules.outputs import save_picture
from modules.train_options import TrainOptions
from utils.files import require_writable_folder

logger = logging.getLogger(__name__)

DRAWS, ROWS = 100_000, 40  # of timesteps; of the table, 25 timesteps each
_BAR = 64  # characters at most
_SIDE = 128  # of the latents where there is no dataset


@dataclass(frozen=True)
class Chart:
    """The timesteps of one dataset, or of several that have the same."""

    title: str
    share: np.ndarray  # [ROWS] of all draws
    weights: np.ndarray | None  # [ROWS] mean loss weight, NaN where nothing is drawn; None where all weigh the same


def show_timesteps(options: TrainOptions) -> None:
    """Print the distribution for each dataset, or write it as a picture and print its path."""
    check_timesteps(options.timesteps)
    check_loss(options.loss, options.timesteps.weighting_scheme)
    sizes, gamma = latent_sizes(options.data.dataset_config), options.loss.min_snr_gamma
    charts = make_charts(options.timesteps, sizes, options.training.seed or 0, gamma)
    if options.show.show_timesteps == "console":
        print("\n\n".join(map(as_text, charts)))
        return
    saving = options.saving
    folder = require_writable_folder(saving.output_dir or Path("."), "--output_dir")
    path = folder / f"{saving.output_name + '_' if saving.output_name else ''}timesteps.png"
    if path.exists():
        logger.warning("%s exists and is replaced", path)
    save_picture(path, as_picture(charts))
    print(path)


def latent_sizes(dataset_config: Path | None) -> list[tuple[str, Counter]]:
    """Return by dataset how often it has latents of each (height, width)."""
    if dataset_config is None:
        return [(f"no --dataset_config: latents of {_SIDE}x{_SIDE}", Counter({(_SIDE, _SIDE): 1}))]
    return [_sizes_of(config) for config in load_config(dataset_config)]


def _sizes_of(config: DatasetConfig) -> tuple[str, Counter]:
    items, _ = find_cached(config)
    found = Counter(dict(item.shapes)["latents"][-2:] for item in items)
    if found:
        named = [f"{8 * width}x{8 * height}" for (height, width), _ in found.most_common(3)]
        return f"{config.where}, {len(items):,} of {', '.join(named)}{', ...' * (len(found) > 3)}", found
    width, height = config.resolution
    return f"{config.where}, not cached: {width}x{height} as its file says", Counter({(height // 8, width // 8): 1})


def make_charts(
    options: TimestepOptions,
    datasets: Sequence[tuple[str, Counter]],
    seed: int,
    gamma: float = LossOptions.min_snr_gamma,
) -> list[Chart]:
    """Return a chart for each dataset; those that come out equal, as they do where sizes do not count, share one."""
    drawn: dict[bytes, tuple[list[str], Tensor]] = {}
    for title, sizes in datasets:
        t = draw(options, sizes, seed)
        drawn.setdefault(t.numpy().tobytes(), ([], t))[0].append(title)
    return [_chart(options, "; ".join(titles), t, gamma) for titles, t in drawn.values()]


def draw(options: TimestepOptions, sizes: Counter, seed: int) -> Tensor:
    """Return DRAWS noise levels t, of each (height, width) of latents according to its share."""
    generator = torch.Generator().manual_seed(seed)
    buckets = options.num_timestep_buckets or 1
    uniforms = torch.rand(DRAWS, generator=generator)
    if buckets > 1:
        uniforms = (torch.arange(DRAWS) % buckets + uniforms) / buckets
    uniforms = uniforms[torch.randperm(DRAWS, generator=generator)]
    ends = (np.cumsum(list(sizes.values())) / sizes.total() * DRAWS).round().astype(int)
    parts = zip(sizes, np.split(uniforms.numpy(), ends[:-1]), strict=True)
    return torch.cat([sample_timesteps(options, len(u), *size, generator, u.tolist()) for size, u in parts if len(u)])


def _chart(options: TimestepOptions, title: str, t: Tensor, gamma: float) -> Chart:
    row = (t * ROWS).long().clamp(max=ROWS - 1)
    counts = torch.bincount(row, minlength=ROWS).double()
    weights = loss_weights(options.weighting_scheme, t, gamma)
    if weights is not None:
        weights = (torch.bincount(row, weights.double(), minlength=ROWS) / counts).numpy()
    low, mean, high = t.quantile(0.05).item(), t.mean().item(), t.quantile(0.95).item()
    words = (
        f"{title}\n{options.timestep_sampling}: mean {1000 * mean:.0f}, 90 % from {1000 * low:.0f} to {1000 * high:.0f}"
    )
    return Chart(words, (counts / counts.sum()).numpy(), weights)


def as_text(chart: Chart) -> str:
    """Return a chart as a table: a row for 25 timesteps, a bar for how many of all are there."""
    width, lines = 1000 // ROWS, [chart.title]
    lines += [
        f"{row * width:4d} to {row * width + width:4d}  {100 * share:5.2f} %  " + "#" * round(_BAR * share / top)
        for top in [chart.share.max()]
        for row, share in enumerate(chart.share)
    ]
    if chart.weights is not None:
        top = np.nanmax(chart.weights)
        lines.append("mean loss weight")
        for row, weight in enumerate(chart.weights):
            bar = "none drawn" if np.isnan(weight) else f"{weight:10.4g}  " + "#" * round(_BAR * weight / top)
            lines.append(f"{row * width:4d} to {row * width + width:4d}  {bar}")
    return "\n".join(line.rstrip() for line in lines)


def as_picture(charts: Sequence[Chart]) -> np.ndarray:
    """Return the charts below each other, uint8 [H W 3]."""
    panels = []
    for chart in charts:
        panels.append(_panel(chart.title, 100 * chart.share, "% of all", (59, 130, 246)))
        if chart.weights is not None:
            panels.append(_panel("mean loss weight", np.nan_to_num(chart.weights), "", (249, 115, 22)))
    return np.concatenate(panels)


def _panel(title: str, values: np.ndarray, unit: str, colour: tuple[int, int, int]) -> np.ndarray:
    """Return bars of values over timesteps, with axes and a title of up to two lines."""
    width, height, left, top, bottom = 900, 300, 60, 60, 36
    image = Image.new("RGB", (width, height), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    scale_x, scale_y = (width - left - 20) / len(values), (height - top - bottom) / (values.max() or 1)
    floor = height - bottom
    lines = [line if len(line) < 120 else f"...{line[-116:]}" for line in title.splitlines()]
    canvas.multiline_text((left, 12), "\n".join(lines), "black", font=font, spacing=6)
    for share in (0, 0.5, 1):
        y = floor - share * (floor - top)
        canvas.line((left, y, width - 20, y), (222, 222, 222))
        canvas.text((left - 8, y), f"{share * values.max():.3g}", (120, 120, 120), font=font, anchor="rm")
    for number, value in enumerate(values):
        x = left + number * scale_x
        canvas.rectangle((x + 1, floor - value * scale_y, x + scale_x - 1, floor), colour)
    for timestep in range(0, 1001, 100):
        x = left + timestep / 1000 * len(values) * scale_x
        canvas.text((x, floor + 8), str(timestep), (120, 120, 120), font=font, anchor="mt")
    canvas.text((width - 20, 30), unit, (120, 120, 120), font=font, anchor="rt")
    return np.asarray(image)
