"""Set up the project in .venv and run the whole chain on a tiny model, or run the tests.

    python quickstart.py          clips > caches > LoRA training > videos without and with the LoRA > pictures of them
    python quickstart.py test     the tests

Needs Python 3.10 or newer and nothing else. Each command is printed as you would type it. A second run uses the same
environment again.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
WEIGHTS = Path("examples", "tiny_world", "weights")
OUTPUT = Path("output", "quickstart")
PROMPT = "a red zorb spins on a black background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="?", choices=("demo", "test"), default="demo", help="the chain (default) or the tests"
    )
    parser.add_argument("pytest_arguments", nargs="*", help="handed to pytest, e.g. tests/test_wan_vae.py")
    given, more = parser.parse_known_args()
    if given.what == "demo" and more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if sys.version_info < (3, 10):
        sys.exit(f"quickstart.py needs Python 3.10 or newer, this is {sys.version.split()[0]}")
    os.chdir(ROOT)
    # A broken print of a path must not end the run on a console with another encoding.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    if given.what == "test":
        set_up(".[dev]")
        several = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]  # processes, for all tests
        run([PYTHON, "-m", "pytest", *([*given.pytest_arguments, *more] or several)])
        if not (given.pytest_arguments or more) and shutil.which("nvidia-smi"):
            run([PYTHON, "-m", "pytest", "-m", "gpu"])  # the other tests do not see the GPU
    else:
        set_up(".")
        demo()


def set_up(requirement: str) -> None:
    """Make .venv and install the project into it, unless that is done and nothing it depends on has changed."""
    stamp = VENV / "installed.txt"
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    ).hexdigest()
    done = stamp.read_text(encoding="utf-8").split() if stamp.is_file() and PYTHON.is_file() else []
    if done[:1] == [wanted] and requirement in done[1:]:
        print(f"# {VENV.name} is up to date")
        return
    if not PYTHON.is_file():
        run([sys.executable, "-m", "venv", VENV.name])
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "-c", "constraints.txt", "-e", requirement])
    kept = done[1:] if done[:1] == [wanted] else []
    stamp.write_text("\n".join([wanted, *kept, requirement]), encoding="utf-8")


def demo() -> None:
    """Teach the tiny model a new thing from real mp4 files, and show videos made without and with what it learned."""
    start = time.monotonic()
    check_weights()
    data, videos, lora = OUTPUT / "data", OUTPUT / "videos", OUTPUT / "lora" / "zorb.safetensors"
    dit, vae, t5 = (WEIGHTS / f"{name}.safetensors" for name in ("dit_t2v", "vae", "t5"))
    config, text_encoder = data / "dataset.toml", ["--t5", t5, "--t5_tokenizer", WEIGHTS / "spiece.model"]
    module, script = [PYTHON, "-m"], [PYTHON]

    title("Twelve clips of a thing the tiny model has never seen: a striped, spinning star called zorb")
    print("# and 24 of anything else, so that it learns the thing alone")
    draw = [*module, "examples.tiny_world.draw", "--folder", data, "--clips", 12, "--others", 24]
    run([*draw, "--shape", "star", "--motion", "spins", "--striped", "--background", "black", "--name", "zorb"])

    title("Cache what does not change while training: latents and text")
    run([*script, "wan_cache_latents.py", "--dataset_config", config, "--vae", vae])
    run([*script, "wan_cache_text_encoder_outputs.py", "--dataset_config", config, *text_encoder, "--batch_size", 16])

    title("Train a LoRA")
    train = [*script, "wan_train_network.py", "--task", "t2v-1.3B", "--dit", dit, "--dataset_config", config]
    train += ["--optimizer_type", "adamw", "--learning_rate", "2e-3", "--lr_scheduler", "cosine"]
    train += ["--lr_warmup_steps", 20, "--max_train_steps", 1600, "--network_dim", 16, "--network_alpha", 16]
    train += ["--timestep_sampling", "shift", "--discrete_flow_shift", "3.0", "--seed", 42]
    train += ["--max_data_loader_n_workers", 0, "--output_dir", lora.parent, "--output_name", lora.stem]
    run(train)

    title("Generate the same prompt and seed without and with the LoRA")
    generate = [*script, "wan_generate_video.py", "--task", "t2v-1.3B", "--dit", dit, "--vae", vae, *text_encoder]
    generate += ["--prompt", PROMPT, "--video_size", 64, 64, "--video_length", 17, "--infer_steps", 20]
    generate += ["--flow_shift", "3.0", "--guidance_scale", "4.0", "--seed", 7]
    run([*generate, "--save_path", videos / "without_lora.mp4"])
    run([*generate, "--lora_weight", lora, "--save_path", videos / "with_lora.mp4"])

    sheet = OUTPUT / "contact_sheet.png"
    rows = [data / "clips" / "000.mp4", videos / "without_lora.mp4", videos / "with_lora.mp4"]
    show = [*module, "examples.tiny_world.contact_sheet", "--videos", *rows]
    labels = ["a training clip", f"'{PROMPT}' without the LoRA", "the same prompt and seed with the LoRA"]
    run([*show, "--labels", *labels, "--output", sheet])
    labels = ["training clip", "without the LoRA", "with the LoRA"]
    run([*show, "--labels", *labels, "--output", sheet.with_suffix(".gif")])

    title(f"Done in {time.monotonic() - start:.0f} seconds. Look at")
    for path in (sheet, sheet.with_suffix(".gif"), *rows[1:], lora):
        print(f"  {path}")


def check_weights() -> None:
    """End with a line that tells the fix unless the tiny model's files are those that were shipped."""
    sums = (WEIGHTS / "SHA256SUMS").read_text(encoding="ascii").split()
    for expected, name in zip(sums[::2], sums[1::2], strict=True):
        path = WEIGHTS / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            state = "is not the file that was shipped" if path.is_file() else "is missing"
            fix = f"`git checkout {WEIGHTS.as_posix()}` brings it back, `python -m examples.tiny_world.recipe "
            sys.exit(f"quickstart.py: error: {path} {state}. {fix}--folder output/tiny_world` remakes all (hours).")


def title(text: str) -> None:
    print(f"\n# {text}")


def run(command: list[object]) -> None:
    """Print a command as a user would type it, run it, and end with its exit code when it fails."""
    words = [str(word) for word in command]
    shown = [
        Path(word).relative_to(ROOT).as_posix() if Path(word).is_absolute() and ROOT in Path(word).parents else word
        for word in words
    ]
    print(f"$ {subprocess.list2cmdline(shown) if os.name == 'nt' else shlex.join(shown)}", flush=True)
    code = subprocess.run(words).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
