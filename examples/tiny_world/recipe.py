"""Remake the tiny weights from nothing: the VAE, then text encoder and DiT; hours on a laptop CPU.

    python -m examples.tiny_world.recipe --folder output/tiny_world

Stopped at any time, the same command goes on where it was. At the end the weights and their SHA-256 sums are in
examples/tiny_world/weights, and the scores are printed.
"""

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError, run_script
from utils.files import atomic_path
from utils.options import option, parse_options

WEIGHTS = Path(__file__).resolve().parent / "weights"
FILES = ("vae.safetensors", "t5.safetensors", "spiece.model", "dit_t2v.safetensors")


@dataclass(frozen=True)
class RecipeOptions:
    """the recipe"""

    folder: Path | None = option(None, "where checkpoints and intermediate files go", required=True)
    weights: Path = option(WEIGHTS, "where the results go")
    vae_steps: int = option(2800, "optimizer steps of the VAE")
    steps: int = option(4500, "optimizer steps of text encoder and DiT")
    clips: int = option(3000, "clips for text encoder and DiT")
    threads: int = option(2, "CPU threads")


def main() -> None:
    (options,) = parse_options(__doc__, RecipeOptions)
    folder, threads = options.folder, ("--threads", options.threads)
    vae = folder / "vae" / "vae.safetensors"
    if not vae.is_file():
        run("vae_training", "--folder", vae.parent, "--steps", options.vae_steps, *threads)
    run("pretraining", "--folder", folder, "--vae", vae, "--steps", options.steps, "--clips", options.clips, *threads)
    shutil.copyfile(vae, folder / vae.name)
    publish(folder, options.weights)
    run("score", "--weights", options.weights)


def run(module: str, *arguments: object) -> None:
    """Run one of the recipe's scripts, showing its progress; UserError when it fails."""
    command = [sys.executable, "-m", f"examples.tiny_world.{module}", *map(str, arguments)]
    if subprocess.run(command).returncode:
        raise UserError(f"{module} did not finish", "run the same command again: it goes on from its last checkpoint")


def publish(folder: Path, weights: Path) -> None:
    """Copy the results to `weights`, and write their SHA-256 sums beside them."""
    sums = []
    for name in FILES:
        with atomic_path(weights / name) as temporary:
            shutil.copyfile(folder / name, temporary)
        sums.append(f"{hashlib.sha256((weights / name).read_bytes()).hexdigest()}  {name}\n")
    with atomic_path(weights / "SHA256SUMS") as temporary:
        temporary.write_text("".join(sums), encoding="ascii")


if __name__ == "__main__":
    run_script(main)
