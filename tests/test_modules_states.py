"""States of a run: complete or absent; a run that goes on from one is the run that was never stopped, bit by bit."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modules import states
from modules.run_log import read_log
from modules.states import Progress, find_state, states_of, why_broken, write_state
from tests.conftest import ROOT
from tests.forked import needs_fork
from tests.killed_training import kill_at_random
from tests.test_modules_trainer import trainer  # noqa: F401
from utils.errors import UserError

# Dropout and noise draw random numbers; a cosine falls; seven batches an epoch.
HOW = "--learning_rate 1e-3 --network_dropout 0.2 --lr_scheduler cosine --sigmoid_scale 0.3"


def result(run, name="name"):
    return load_file(run.plan.options.saving.output_dir / f"{name}.safetensors")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("more", "every"),
    [
        ("--max_train_steps 17", 3),  # in the middle of epochs
        ("--max_train_steps 14", 7),  # at their ends
        ("--max_train_epochs 3 --gradient_accumulation_steps 2", 2),
        ("--max_train_steps 9 --optimizer_type adamw8bit --network_dim 64", 4),
        ("--max_train_steps 9 --num_timestep_buckets 3 --gradient_checkpointing --blocks_to_swap 2", 4),
    ],
)
def test_a_resumed_run_is_the_one_that_was_never_stopped(trainer, more, every):  # noqa: F811
    straight = trainer(f"{HOW} {more} --save_every_n_steps {every} --save_state")
    straight.run()
    folder = straight.plan.options.saving.output_dir
    taken = sorted(path for path in folder.glob("name-step*-state"))
    assert len(taken) > 1
    for path in taken:
        if straight.plan.total_steps == json.loads((path / "progress.json").read_text())["step"]:
            continue
        resumed = trainer(f"{HOW} {more} --save_every_n_steps {every} --save_state --resume {path}")
        resumed.run()
        assert same(result(straight), result(resumed)), path
        assert list(straight.losses) == list(resumed.losses)
        names = sorted(path.name for path in resumed.plan.options.saving.output_dir.iterdir())
        assert (
            set(names) <= {path.name for path in folder.iterdir()}
            and f"{resumed.plan.options.saving.output_name}-state" in names
        )


# ---------------------------------------------------------------------------------------------- whole or not at all
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that writes a small state of a step."""
    folder = tmp_path_factory.mktemp("states")

    def write(step: int, name: str = "name", where=folder):
        path = where / f"{name}-step{step:08d}-state"
        progress = Progress(step=step, epoch=0, batches=step, seed=3)
        tensors = {"w": torch.full((2,), float(step))}
        write_state(path, tensors, {"optimizer": {"state": {}, "param_groups": []}, "scheduler": {}}, {}, progress)
        os.utime(path, (step, step))
        return path

    write.folder = folder
    return write


def test_latest_is_the_newest_state_that_is_whole(saved, caplog):
    older, newer = saved(5), saved(20)
    saved(30, name="name-of-another-run")
    assert states_of(saved.folder, "name") == [newer, older]
    assert find_state("latest", saved.folder, "name").path == newer
    (newer / "optimizer.bin").write_bytes(b"cut")
    os.utime(newer, (20, 20))
    assert find_state("latest", saved.folder, "name").path == older
    assert "passed over: optimizer.bin is not what was saved" in caplog.text


def test_a_state_that_is_damaged_is_refused_and_the_one_before_it_named(saved, tmp_path):
    older, newer = saved(5, where=tmp_path), saved(20, where=tmp_path)
    for name in ("model.safetensors", "progress.json", "manifest.json"):
        content = (newer / name).read_bytes()
        for damage in (None, content[:-3], content + b"x"):
            (newer / name).unlink(missing_ok=True)
            if damage is not None:
                (newer / name).write_bytes(damage)
            os.utime(newer, (20, 20))
            with pytest.raises(UserError) as error:
                find_state(str(newer), tmp_path, "name")
            assert name in str(error.value) and f"The one before it is {older}" in str(error.value)
        (newer / name).write_bytes(content)
        os.utime(newer, (20, 20))
    assert find_state(str(newer), tmp_path, "name").progress.step == 20


@pytest.mark.parametrize(
    ("resume", "line"),
    [
        ("nowhere", "--resume nowhere: no such folder. Name the folder that ends in -state."),
        ("latest", "holds no complete state of name. Leave it out to begin anew."),
    ],
)
def test_a_state_that_is_not_there_is_named(tmp_path, resume, line):
    with pytest.raises(UserError) as error:
        find_state(resume, tmp_path, "name")
    assert line in str(error.value)


def test_a_state_appears_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    path = saved(5, where=tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        for step in (5, 6):
            with pytest.raises(OSError, match="No space"):
                saved(step, where=tmp_path)
    assert [other.name for other in tmp_path.iterdir()] == [path.name]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_what_a_killed_run_had_begun_goes_when_it_goes_on_and_nothing_else(trainer, tmp_path):  # noqa: F811
    run = trainer(f"{HOW} --max_train_steps 2 --save_state_on_train_end")
    run.run()
    folder = run.plan.options.saving.output_dir
    begun = [".name-state.0123abcd.tmp", ".name-step00000003-state.0123abcd.old", ".name.0123abcd.unfinished"]
    others = [".name-of-another-state.0123abcd.tmp", ".name-state.0123abcd", "name-step00000001-state", ".mine"]
    for name in (*begun, *others):
        (folder / name).touch() if name.endswith("unfinished") else (folder / name).mkdir()
    trainer(f"{HOW} --max_train_steps 4 --resume {folder / 'name-state'} --output_dir {folder}")
    there = {path.name for path in folder.iterdir() if not path.name.startswith(("name_log", "name_report"))}
    assert there == {*others, "name-state", "name.safetensors"}


# --------------------------------------------------------------------------------------------------- other states
def test_a_state_of_another_program_gives_weights_optimizer_and_schedule(trainer, caplog):  # noqa: F811
    run = trainer(f"{HOW} --max_train_steps 4 --save_state_on_train_end")
    run.run()
    state = run.plan.options.saving.output_dir / "name-state"
    for name in ("progress.json", "manifest.json", "random.safetensors"):
        (state / name).unlink()
    resumed = trainer(f"{HOW} --max_train_steps 6 --resume {state}")
    assert "was written by another program" in caplog.text
    assert (resumed.step, resumed.epochs, resumed.batches) == (4, 0, 0)
    assert all(torch.equal(value, result(run)[key]) for key, value in resumed.trained.tensors().items())
    moments = [values["exp_avg"] for values in resumed.optimizer.optimizer.state.values()]
    assert any(moment.abs().sum() > 0 for moment in moments)
    resumed.run()
    assert resumed.step == 6


def test_a_run_that_was_killed_before_its_last_file_has_only_that_to_write(trainer):  # noqa: F811
    options = f"{HOW} --max_train_steps 4 --save_every_n_steps 2 --save_state"
    run = trainer(options)
    run.run()
    state = run.plan.options.saving.output_dir / "name-step00000004-state"
    resumed = trainer(f"{options} --resume {state}")
    resumed.run()
    assert same(result(resumed), result(run)) and resumed.step == 4
    assert {path.name for path in resumed.plan.options.saving.output_dir.iterdir()} == {
        "name.safetensors",
        "name-state",
        "name_log.jsonl",
        "name_report.html",
    }


def test_the_last_file_of_a_shorter_run_or_without_its_average_is_no_end(trainer):  # noqa: F811
    options = f"{HOW} --save_every_n_steps 2 --save_state --ema_decay 0.9 --max_train_steps"
    run = trainer(f"{options} 4")
    run.run()
    folder = run.plan.options.saving.output_dir
    last = {name: load_file(folder / f"{name}.safetensors") for name in ("name", "name_ema")}
    for name in last:  # killed before it was written
        (folder / f"{name}.safetensors").unlink()
        if name == "name":
            shutil.copy(folder / "name-step00000002.safetensors", folder / "name.safetensors")
        trainer(f"{options} 4 --resume {folder / 'name-step00000004-state'} --output_dir {folder}").run()
        assert all(same(load_file(folder / f"{each}.safetensors"), tensors) for each, tensors in last.items())


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            "--max_train_steps 3",
            "is at the end already, after 4 steps and 0 epochs. Ask for more with --max_train_steps",
        ),
        (
            "--max_train_steps 4 --output_dir FOLDER",
            "is at the end already, after 4 steps and 0 epochs. Ask for more with --max_train_steps",
        ),
        ("--max_train_steps 9 --network_dim 8", "here (8, "),
        ("--max_train_steps 9 --network_args exclude_patterns='[\".*ffn.*\"]'", "of its tensors differ"),
        ("--max_train_steps 9 --optimizer_type SGD", "--optimizer_type"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(trainer, more, line):  # noqa: F811
    run = trainer(f"{HOW} --max_train_steps 4 --save_state_on_train_end")
    run.run()
    state = run.plan.options.saving.output_dir / "name-state"
    with pytest.raises(UserError) as error:
        trainer(f"{HOW} {more.replace('FOLDER', str(state.parent))} --resume {state}")
    assert line in str(error.value)


def test_states_rotate_as_files_do_and_on_after_a_resumption(trainer):  # noqa: F811
    rotate = "--save_every_n_steps 1 --save_state --save_last_n_steps 3 --save_last_n_steps_state 1"
    run = trainer(f"{HOW} --max_train_steps 5 {rotate}")
    folder = run.plan.options.saving.output_dir
    run.run()
    names = sorted(path.name for path in folder.iterdir())
    assert [name for name in names if name.endswith("-state")] == [
        "name-state",
        "name-step00000004-state",
        "name-step00000005-state",
    ]
    again = trainer(f"{HOW} --max_train_steps 7 {rotate} --resume latest --output_dir {folder}")
    again.run()
    kept = sorted(path.name for path in folder.iterdir() if path.name.startswith("name-step"))
    assert kept == [
        *(f"name-step0000000{n}{ending}" for n, ending in ((4, ".safetensors"), (5, ".safetensors"))),
        "name-step00000006-state",
        "name-step00000006.safetensors",
        "name-step00000007-state",
        "name-step00000007.safetensors",
    ]
    page = (folder / "name_report.html").read_text(encoding="utf-8")
    assert "Files saved: 8, 8 more are gone" in page
    there = sorted(path.name for path in folder.iterdir() if re.search(r"-state$|\.safetensors$", path.name))
    assert sorted(re.findall(r"<td>\d+</td><td>(name[^<]*)</td>", page)) == there


def test_a_state_that_vanishes_meanwhile_is_passed_over(trainer, monkeypatch, caplog):  # noqa: F811
    run = trainer(f"{HOW} --max_train_steps 3 --save_every_n_steps 1 --save_state")
    run.run()
    folder = run.plan.options.saving.output_dir
    shutil.rmtree(folder / "name-state")
    newest, before = folder / "name-step00000003-state", folder / "name-step00000002-state"
    hashed = states.file_hash

    def too_late(path):
        if path.parent == newest:
            shutil.rmtree(newest)
        return hashed(path)

    monkeypatch.setattr(states, "file_hash", too_late)
    assert find_state("latest", folder, "name").path == before
    assert f"{newest} is passed over: it is gone" in caplog.text

    stat = Path.stat

    def gone(path, **how):
        if path == before:
            raise FileNotFoundError(path)
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", gone)
    monkeypatch.setattr(Path, "is_dir", lambda path: True)  # when it was asked
    assert [path.name for path in states_of(folder, "name")] == ["name-step00000001-state"]


def test_another_batch_size_goes_on_by_what_has_been_seen(trainer, dataset, tmp_path, caplog):  # noqa: F811
    run = trainer(f"{HOW} --max_train_steps 3 --save_state_on_train_end")
    run.run()
    state = run.plan.options.saving.output_dir / "name-state"
    larger = tmp_path / "larger.toml"
    text = re.sub(r"batch_size = \d+", "batch_size = 4", dataset.read_text())
    larger.write_text(text if "batch_size" in text else text.replace("[general]", "[general]\nbatch_size = 4"))
    resumed = trainer(f"{HOW} --max_train_epochs 2 --resume {state} --dataset_config {larger}")
    assert "goes on after 43 % of its batches, in another order" in caplog.text
    assert resumed.batches == round(3 / 7 * len(resumed.plan.data))
    resumed.run()
    assert resumed.epochs == 2


# ------------------------------------------------------------------------------------------------------ bad steps
def test_steps_without_a_finite_loss_are_left_out_and_too_many_end_the_run(trainer, monkeypatch, caplog):  # noqa: F811
    def losing(run, bad):
        loss, count = run.loss, iter(range(1000))
        monkeypatch.setattr(run, "loss", lambda batch: loss(batch) * (math.nan if next(count) in bad else 1.0))
        return run

    run = losing(trainer(f"{HOW} --max_train_steps 4"), {1})
    weights = []
    run.after_step = lambda epoch: weights.append({k: v.clone() for k, v in run.trained.tensors().items()})
    run.run()
    assert same(weights[0], weights[1]) and not same(weights[1], weights[2])
    assert "step 2 is left out: its loss is no finite number (1 in a row)" in caplog.text
    noted = list(read_log(run.record.log.path))
    assert [line["loss"] is None for line in noted if line["kind"] == "step"] == [False, True, False, False]
    assert all(line["average"] for line in noted if line["kind"] == "step"), "one bad loss spoils no average"
    (epoch,) = (line for line in noted if line["kind"] == "epoch")
    assert None not in epoch.values()
    run = losing(trainer(f"{HOW} --max_train_steps 9 --max_nan_steps 3"), {2, 4, 5, 6})
    with pytest.raises(
        UserError, match="was no finite number in 3 steps in a row, from step 5 on; the state is"
    ) as error:
        run.run()
    path = run.plan.options.saving.output_dir / "name-step00000006-state"
    assert str(path) in str(error.value) and why_broken(path) is None


# ------------------------------------------------------------------------------------------------- real processes
@needs_fork
def test_after_random_kills_all_is_whole_and_the_resumed_run_is_the_one_never_stopped(models, dataset, tmp_path):
    found = kill_at_random(tmp_path, models["dit_t2v"], dataset, steps=18, kills=4, seed=1)
    assert found.kills == 4 and found.resumed >= 2 and found.checked >= 10


CLI = (
    "--max_data_loader_n_workers 0 --output_name name --timestep_sampling shift --seed 3 --network_dim 4"
    f" {HOW} --max_train_steps 12 --save_every_n_steps 3 --save_state"
)


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such signals")
def test_a_stopped_or_killed_run_goes_on_bit_by_bit(trainer, models, dataset, tmp_path):  # noqa: F811
    straight = trainer(CLI, base="")
    straight.run()
    for number, name in ((signal.SIGTERM, "term"), (signal.SIGKILL, "kill")):
        output = tmp_path / name
        paths = ["--dit", models["dit_t2v"], "--dataset_config", dataset, "--output_dir", output]
        words = ["wan_train_network.py", "--task", "t2v-1.3B", *CLI.split(), *paths]
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not (output / "name-step00000003-state").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(number)
        text = process.communicate()[1]
        states = [path for path in output.iterdir() if path.name.endswith("-state") and path.name[0] != "."]
        assert states and all(why_broken(path) is None for path in states)
        resume = "latest"
        if number == signal.SIGTERM:
            assert process.returncode == 143
            resume = shlex.split(text.splitlines()[-1].partition("go on with: python ")[2])[-1]
        run = trainer(f"{CLI} --resume {resume} --output_dir {output}", base="")
        run.run()
        for file in ("name", "name-step00000009"):
            assert same(result(run, file), result(straight, file)), (name, file)


def test_two_processes_go_on_together(run_cli, models, dataset, tmp_path):
    paths = ["--dit", models["dit_t2v"], "--dataset_config", dataset]
    launch = ["torch.distributed.run", "--nproc_per_node", 2, ROOT / "wan_train_network.py", "--task", "t2v-1.3B"]
    words = [*launch, *CLI.replace("--max_train_steps 12", "--max_train_steps 6").split(), *paths]
    first, second = tmp_path / "one", tmp_path / "two"
    for more in (["--output_dir", first], ["--output_dir", second, "--resume", first / "name-step00000003-state"]):
        done = run_cli("-m", *words, *more)
        assert done.returncode == 0, done.stderr
    assert same(*(load_file(folder / "name.safetensors") for folder in (first, second)))
    assert not (second / "name-step00000003.safetensors").exists()
