"""Remake the tiny weights from nothing: VAE, text encoder and DiT, CLIP, image-to-video DiT; hours on a laptop CPU.

    python -m examples.tiny_world.recipe --folder output/tiny_world

Stopped at any time, the same command goes on where it was; what is there is not made again, so delete the folders of
the steps that are to be. At the end the weights and their SHA-256 sums are in examples/tiny_world/weights, and the
scores are printed.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from examples.tiny_world.training import run
from utils.errors import UserError, run_script
from utils.files import atomic_path
from utils.options import option, parse_options

WEIGHTS = Path(__file__).resolve().parent / "weights"
MODELS = ("vae", "t5", "clip", "dit_t2v", "dit_i2v")
FILES = (*(f"{name}.safetensors" for name in MODELS), "spiece.model")


@dataclass(frozen=True)
class RecipeOptions:
    """the recipe"""

    folder: Path | None = option(None, "where checkpoints and intermediate files go", required=True)
    weights: Path = option(WEIGHTS, "where the results go")
    vae_steps: int = option(2800, "optimizer steps of the VAE")
    steps: tuple[int, ...] = option((4500, 5200), "optimizer steps of text encoder and DiT, round by round")
    clips: tuple[int, ...] = option((3000, 4000), "clips for text encoder and DiT, round by round")
    learning_rates: tuple[float, ...] = option((4e-3, 3e-3), "of Muon for the DiT, round by round")
    clip_steps: int = option(2400, "optimizer steps of CLIP")
    i2v_steps: int = option(500, "optimizer steps of the image-to-video DiT, in each of its four rounds")
    i2v_clips: int = option(1500, "clips for the image-to-video DiT")
    processes: int = option(2, "processes, of one thread each, for the DiTs; as many threads for the others")


def main() -> None:
    (options,) = parse_options(__doc__, RecipeOptions)
    if not len(options.steps) == len(options.clips) == len(options.learning_rates):
        raise UserError("--steps, --clips and --learning_rates: need as many numbers each, one for every round")
    folder, threads = options.folder, ("--threads", options.processes)
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    vae, clip = folder / "vae" / "vae.safetensors", folder / "clip" / "clip.safetensors"
    if not vae.is_file():
        run("-m", "examples.tiny_world.vae_training", "--folder", vae.parent, "--steps", options.vae_steps, *threads)
    if not clip.is_file():
        run("-m", "examples.tiny_world.clip_training", "--folder", clip.parent, "--steps", options.clip_steps, *threads)
    earlier = None
    rounds = zip(options.steps, options.clips, options.learning_rates, strict=True)
    for number, (steps, clips, learning_rate) in enumerate(rounds, 1):
        here = folder / f"dit_{number}"
        command = ["-m", "examples.tiny_world.pretraining", "--folder", here, "--vae", vae, "--threads", 1]
        command += ["--steps", steps, "--clips", clips, "--learning_rate", learning_rate]
        run(*command, *(["--start_from", earlier] if earlier else []), processes=options.processes)
        earlier = here
    for path in (vae, clip, *(earlier / name for name in ("t5.safetensors", "dit_t2v.safetensors", "spiece.model"))):
        copy(path, results / path.name)
    i2v = ["--steps", options.i2v_steps, "--clips", options.i2v_clips, "--processes", options.processes]
    run("-m", "examples.tiny_world.i2v_training", "--folder", folder / "i2v", "--weights", results, *i2v)
    copy(folder / "i2v" / "dit_i2v.safetensors", results / "dit_i2v.safetensors")
    publish(results, options.weights)
    run("-m", "examples.tiny_world.score", "--weights", options.weights)


def copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def publish(folder: Path, weights: Path) -> None:
    """Copy the results to `weights`, and write their SHA-256 sums beside them."""
    sums = []
    for name in FILES:
        copy(folder / name, weights / name)
        sums.append(f"{hashlib.sha256((weights / name).read_bytes()).hexdigest()}  {name}\n")
    with atomic_path(weights / "SHA256SUMS") as temporary:
        temporary.write_text("".join(sums), encoding="ascii")


if __name__ == "__main__":
    run_script(main)
