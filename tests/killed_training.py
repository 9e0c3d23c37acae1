"""Training runs that are killed at any moment, and go on until there is nothing left to do.

    python -m tests.killed_training FOLDER KILLS

prints what was found. What has its place on the disk must be whole and, to the bit, what an undisturbed run writes.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tqdm import tqdm

from modules.lora_training import NetworkOptions, TrainedLora
from modules.run_log import log_path, read_log
from modules.run_logs import LoggingOptions
from modules.states import states_of, why_broken
from modules.train_options import TrainOptions
from modules.trainer import make_trainer
from tests import tiny
from utils.errors import run_script
from utils.options import parse_options

ROOT = Path(__file__).resolve().parent.parent
NAME, EVERY = "name", 3  # steps between states
OPTIONS = (
    "--task t2v-1.3B --timestep_sampling shift --seed 3 --network_dim 4 --max_data_loader_n_workers 0"
    " --learning_rate 1e-3 --network_dropout 0.2 --lr_scheduler cosine --save_state --save_last_n_steps 12"
    f" --output_name {NAME} --save_every_n_steps {EVERY} --ema_decay 0.9"
    " --validation_split 0.2 --validate_every_n_steps 4 --validation_timesteps 2"
)


@dataclass
class Found:
    """What kills have left behind."""

    kills: int = 0
    saving: int = 0  # of them, those in the middle of writing
    checked: int = 0  # files and states that were read
    resumed: int = 0  # runs that went on from a state
    trainings: int = 0  # that were finished in the end


def train(words: Sequence[str]) -> None:
    """Train in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    groups = [field.type for field in fields(TrainOptions)]
    *options, network, logs = parse_options("doc", *groups, NetworkOptions, LoggingOptions, argv=list(words))
    make_trainer(TrainOptions(*options), TrainedLora(network), logs).run()


def kill_at_random(folder: Path, dit: Path, dataset: Path, steps: int, kills: int, seed: int = 0) -> Found:
    """Train so many steps again and again, each time killed and resumed until it is finished, until all kills are done.

    Asserts that all files and states are whole and those of an undisturbed run, at any time.
    """
    words = [*OPTIONS.split(), "--max_train_steps", str(steps), "--dit", str(dit), "--dataset_config", str(dataset)]
    straight, said = folder / "straight", folder / "said.txt"
    tqdm.monitor_interval = 0  # no thread, whose locks a forked process would never get
    if tqdm.monitor:
        tqdm.monitor.exit()
    tqdm.set_lock(threading.RLock())  # no semaphore, which all would share, and one that is killed never let go of
    for _ in range(2):  # once for what is imported at first use: those that are forked have it then
        started = time.monotonic()
        train([*words, "--output_dir", str(straight), "--save_last_n_steps", str(steps)])
        duration = time.monotonic() - started
    AcceleratorState._reset_state(reset_partial_state=True)
    chance, found = random.Random(seed), Found()
    expected = {path.name: load_file(path) for path in straight.glob("*.safetensors")}
    expected |= {path.name: load_file(path / "model.safetensors") for path in states_of(straight, NAME)}
    while found.kills < kills:
        output, finished = folder / f"killed{found.trainings}", False
        while not finished:
            states = states_of(output, NAME)
            resume = ["--resume", "latest"] if states else []
            before = _temporary(output)
            process = _start([*words, "--output_dir", str(output), *resume], said)
            deadline = time.monotonic() + 60 + 10 * duration
            if found.kills < kills:
                # At any moment; every second one when there is one more state, or it would often not get so far.
                while found.kills % 2 and states_of(output, NAME) == states and process.is_alive():
                    process.join(0.001)
                    assert time.monotonic() < deadline, "the process hangs"
                process.join(chance.uniform(0, duration / 2))
                process.kill()
            process.join(deadline - time.monotonic())
            assert process.exitcode in (0, -signal.SIGKILL), said.read_text()
            killed = process.exitcode != 0
            found.kills, found.resumed = found.kills + killed, found.resumed + bool(resume)
            found.saving += killed and bool(_temporary(output) - before)
            found.checked += _check(output, expected)
            finished = (output / f"{NAME}.safetensors").exists()
        assert _logged(output) == _logged(straight)
        found.trainings += 1
    return found


def _logged(output: Path) -> list[dict]:
    """Return what a run's log says of its steps and validation, without what no two runs share."""
    own = ("time", "seconds", "memory_gb")
    lines = [line for line in read_log(log_path(output, NAME)) if line["kind"] in ("step", "validation")]
    return [{name: value for name, value in line.items() if name not in own} for line in lines]


def _temporary(output: Path) -> set[str]:
    return {path.name for path in output.glob(".*")} if output.is_dir() else set()


def _check(output: Path, expected: dict[str, dict[str, torch.Tensor]]) -> int:
    """Return how many files and states there are, each of them whole and as expected."""
    count = 0
    for path in sorted(output.glob("[!.]*")) if output.is_dir() else ():
        if path.suffix in (".jsonl", ".html"):
            continue
        if path.is_dir():
            assert why_broken(path) is None, f"{path}: {why_broken(path)}"
            json.loads((path / "progress.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "model.safetensors" if path.is_dir() else path)
        assert tensors.keys() == expected[path.name].keys()
        assert all(torch.equal(tensor, expected[path.name][key]) for key, tensor in tensors.items()), path
        count += 1
    return count


def _start(words: Sequence[str], said: Path) -> multiprocessing.process.BaseProcess:
    """Start a process that trains, and that has its imports already."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(words, said))
    process.start()
    return process


def _train(words: Sequence[str], said: Path) -> None:
    with open(said, "w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        run_script(lambda: train(words))
        os._exit(0)  # not on into what belongs to the process that was forked


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    golden = ROOT / "tests" / "golden"
    toml = json.loads((golden / "cache_index.json").read_text())["plans"]["t2v"]["toml"]
    dataset = folder / "data.toml"
    dataset.write_text(toml.replace("<GOLDEN>", golden.as_posix()))
    started = time.monotonic()
    print(kill_at_random(folder, tiny.write_models(folder, ["dit_t2v"])["dit_t2v"], dataset, 30, kills))
    print(f"{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
