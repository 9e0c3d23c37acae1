"""Validation: what is held out, that it is measured the same every time, and that training does not notice."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dataset.cache import media_name
from dataset.config import load_config
from dataset.loader import CachedDataset
from modules.run_log import read_log
from modules.timestep_bins import NAMES
from modules.validation import fixed_noise
from tests.forked import fork, needs_fork
from tests.test_modules_trainer import trainer  # noqa: F401
from utils.errors import UserError

HOW = "--learning_rate 1e-2 --network_dropout 0.2"


@pytest.fixture
def validated(dataset, tmp_path):
    """The recorded dataset, whose last part, a movie of two clips, is only measured."""
    head, last = dataset.read_text().rsplit("[[datasets]]", 1)
    path = tmp_path / "validated.toml"
    path.write_text(f"{head}[[validation]]{last}")
    return path


@pytest.fixture
def trained_only(dataset, tmp_path):
    path = tmp_path / "trained.toml"
    path.write_text(dataset.read_text().rsplit("[[datasets]]", 1)[0])
    return path


def logged(run) -> list[tuple[int, dict[str, float]]]:
    """Run, and return what was logged of the validation, by step."""
    found, log = [], run.log
    run.log = lambda values, step: log(values, step) or ("loss/validation" in values and found.append((step, values)))
    run.run()
    return found


def lora(run):
    return load_file(run.plan.options.saving.output_dir / "name.safetensors")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_training_is_the_same_with_and_without_validation(trainer, validated, trained_only):  # noqa: F811
    runs = []
    for more, steps in ((f"{validated} --validate_every_n_steps 1", [0, 1, 2, 3, 4]), (trained_only, [])):
        runs.append(run := trainer(f"{HOW} --max_train_steps 4 --dataset_config {more}"))
        assert [step for step, _ in logged(run)] == steps
    assert same(*map(lora, runs)) and list(runs[0].losses) == list(runs[1].losses)
    assert runs[0].module.training  # and measured without dropout, as whose weights are no longer zero
    once, again = (runs[0].validator.measure(runs[0].dit, runs[0].module, 4) for _ in range(2))
    assert once == again and runs[0].module.training


def test_the_same_weights_have_the_same_loss_every_time_whatever_the_seed(trainer, validated):  # noqa: F811
    still = f"--learning_rate 0 --network_dropout 0.5 --max_train_steps 3 --dataset_config {validated}"
    runs = [trainer(f"{still} {more}") for more in ("", "--seed 9", "--max_data_loader_n_workers 1")]
    values = [measured for run in runs for _, measured in logged(run)]
    assert len(values) >= 6 and all(value == values[0] for value in values)
    assert set(values[0]) == {"loss/validation", *(f"loss/validation/{name}" for name in NAMES)}
    bins = [values[0][f"loss/validation/{name}"] for name in NAMES]
    assert values[0]["loss/validation"] == pytest.approx(sum(bins) / 10)


def test_the_loss_is_that_of_the_formula(trainer, validated):  # noqa: F811
    run = trainer(f"--max_train_steps 1 --validation_timesteps 2 --max_timestep 500 --dataset_config {validated}")
    values = run.validator.measure(run.dit, run.module, 0)
    (config, items), *_ = run.plan.validation.batches
    total = []
    for level, t in enumerate((0.125, 0.375)):
        for item in items:
            cached = CachedDataset([config], 0)
            (batch,) = [batch for i in range(len(cached)) if (batch := cached[i])]
            x = batch.latents[list(items).index(item)][None].float()
            noise = fixed_noise(item, level, x.shape[1:])[None]
            text = [batch.text[list(items).index(item)]]
            with torch.no_grad():
                predicted = run.dit((1 - t) * x + t * noise, torch.tensor([1000 * t]), text)
            total.append((predicted - (noise - x)).square().mean().item())
    assert len(items) == 2 and values["loss/validation"] == pytest.approx(sum(total) / 4, rel=1e-4)
    assert values.keys() == {"loss/validation", "loss/validation/t100-200", "loss/validation/t300-400"}


def test_learning_what_is_measured_lowers_the_loss(trainer, validated, dataset, tmp_path):  # noqa: F811
    both = tmp_path / "both.toml"
    shutil.copytree(load_config(validated)[-1].cache_directory, tmp_path / "copy")
    text = validated.read_text()
    last = text.rsplit("[[validation]]", 1)[1]
    before = str(load_config(validated)[-1].cache_directory.as_posix())
    both.write_text(f"{text}\n[[datasets]]{last.replace(before, (tmp_path / 'copy').as_posix())}")
    run = trainer(
        f"--learning_rate 5e-3 --network_dim 32 --network_alpha 32 --max_train_epochs 6 --dataset_config {both}"
    )
    values = [measured["loss/validation"] for _, measured in logged(run)]
    assert len(values) == 7 and values[-1] < 0.95 * values[0]


# --------------------------------------------------------------------------------------------------------- the split
def test_a_share_of_the_media_is_held_out_with_all_clips(dataset):
    def split(seed: int):
        data = CachedDataset(load_config(dataset), seed)
        before, media = (
            len(data),
            lambda groups: [
                {media_name(config, item.latents) for item in items}
                for config, items in zip(data.configs, groups, strict=True)
            ],
        )
        every = set.union(*media(data.items))
        names = data.choose_media(0.4)
        held = data.hold_out(names)
        assert set.union(*media(held)) == names and not set.union(*media(data.items)) & names
        assert len(names) == round(0.4 * len(every)) and len(data) < before
        data.set_epoch(1)
        assert all(batch is not None for batch in (data[len(data) + i] for i in range(len(data))))
        return names

    assert split(1) == split(1)
    assert len({frozenset(split(seed)) for seed in range(5)}) > 1


def test_what_is_to_be_kept_is_never_held_out(dataset, tmp_path):
    path = tmp_path / "reg.toml"
    path.write_text(dataset.read_text().replace("[[datasets]]", "[[datasets]]\nis_reg = true", 1))
    data = CachedDataset(load_config(path), 0)
    kept = data.items[0]
    held = data.hold_out(data.choose_media(0.9))
    assert held[0] == [] and data.items[0] == kept and any(held)


def test_a_run_holds_out_measures_and_tells(trainer, caplog):  # noqa: F811
    caplog.set_level("INFO")
    run = trainer("--max_train_epochs 2 --learning_rate 1e-3 --validation_split 0.3 --validate_every_n_epochs 2")
    names = [{path.latents.name for path in items} for items in run.plan.data.items]
    measured = {item.latents.name for _, items in run.plan.validation.batches for item in items}
    assert measured and not measured & set.union(*names)
    assert [step for step, _ in logged(run)] == [0, run.plan.total_steps]
    assert "held out for validation" in caplog.text and "validation loss" in caplog.text
    assert "epoch 2: loss by timestep:" in caplog.text
    assert run.saver.checkpoints.metadata["ss_validation_split"] == "0.3"
    with pytest.raises(UserError, match="there is nothing to validate on"):
        trainer("--validate_every_n_steps 5")
    for wrong in ("--validation_split 1", "--validation_split 0.1 --validation_timesteps 0"):
        with pytest.raises(UserError, match="must be"):
            trainer(wrong)


def test_a_resumed_run_logs_what_the_undisturbed_one_does(trainer, validated):  # noqa: F811
    def all_logged(run):
        run.run()
        lines = [line for line in read_log(run.record.log.path) if line["kind"] in ("step", "epoch", "validation")]
        own = ("time", "seconds", "memory_gb")  # of each run
        return {(e["kind"], e["step"], name): value for e in lines for name, value in e.items() if name not in own}

    how = f"{HOW} --max_train_epochs 3 --save_every_n_steps 4 --save_state --dataset_config {validated}"
    straight = trainer(how)
    everything = all_logged(straight)
    assert any(kind == "epoch" and name.startswith("t") for kind, _, name in everything)
    state = straight.plan.options.saving.output_dir / "name-step00000004-state"
    resumed = trainer(f"{how} --resume {state}")
    again = all_logged(resumed)
    assert again.keys() < everything.keys() and all(everything[key] == value for key, value in again.items())
    assert any((kind, name) == ("validation", "loss") for kind, _, name in again)
    assert same(lora(straight), lora(resumed))


@needs_fork
def test_two_processes_share_the_measurements(trainer, validated, tmp_path, monkeypatch):  # noqa: F811
    how = f"--network_dropout 0.5 --validation_timesteps 3 --dataset_config {validated}"
    alone = trainer(how)
    expected = alone.validator.measure(alone.dit, alone.module, 0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def measure() -> None:
        run = trainer(how)
        errors, measured = run.validator._errors, []
        run.validator._errors = lambda *given: measured.append(given) or errors(*given)
        print(json.dumps([len(measured), run.validator.measure(run.dit, run.module, 0), len(measured)]))

    codes, said = fork(measure, tmp_path, 2)
    assert codes == [0, 0], said
    for before, values, after in [json.loads(line) for line in said.splitlines() if line.startswith("[")]:
        assert (before, after) == (0, 2) and values == pytest.approx(expected)  # 3 in all, and one to fill up


def test_validation_caches_are_checked_like_the_others(trainer, validated, tmp_path):  # noqa: F811
    empty = tmp_path / "empty.toml"
    empty.write_text(f'{validated.read_text()}\n[[validation]]\nimage_directory = "{tmp_path / "none"}"\n')
    (tmp_path / "none").mkdir()
    only = tmp_path / "only.toml"
    head = validated.read_text().split("[[validation]]")[0]
    only.write_text(f'{head}[[validation]]\nimage_directory = "{tmp_path / "none"}"\n')
    with pytest.raises(UserError, match="there is nothing to validate on in"):
        trainer(f"--dataset_config {only}")
    trainer(f"--dataset_config {empty}")  # one of two is enough, with a warning
