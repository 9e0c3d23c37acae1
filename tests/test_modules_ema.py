"""The average of the weights: torch's own, beside the LoRA, through states, and no part of training."""

import pytest
import torch
from safetensors.torch import load_file

from modules.checkpoints import _is_of
from modules.ema import EmaOptions, check_ema
from modules.full_training import TrainedDit
from modules.lora_training import TrainedLora
from tests.forked import fork, needs_fork
from tests.test_modules_trainer import trainer  # noqa: F401
from utils.errors import UserError
from utils.safetensors_io import read_metadata

HOW = "--learning_rate 1e-2 --network_dropout 0.2"


def result(run, name="name"):
    return load_file(run.plan.options.saving.output_dir / f"{name}.safetensors")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_average_is_that_of_the_formula_and_training_does_not_notice(trainer):  # noqa: F811
    run = trainer(f"{HOW} --max_train_steps 5 --ema_decay 0.8 --save_every_n_steps 1 --scale_weight_norms 0.5")
    run.run()
    plain = trainer(f"{HOW} --max_train_steps 5 --scale_weight_norms 0.5")
    plain.run()
    assert same(result(run), result(plain))
    steps = [result(run, f"name-step0000000{n}") for n in range(1, 6)]
    for key, average in result(run, "name_ema").items():
        expected = steps[0][key].double()
        for step in steps[1:]:
            expected = 0.8 * expected + 0.2 * step[key].double()
        torch.testing.assert_close(average, expected.float(), rtol=1e-5, atol=1e-7)
    assert not same(result(run, "name_ema"), result(run))
    metadata = read_metadata(run.plan.options.saving.output_dir / "name_ema.safetensors")
    assert metadata["ss_ema_decay"] == "0.8" and metadata["ss_steps"] == "5"
    assert "ss_ema_decay" not in read_metadata(run.plan.options.saving.output_dir / "name.safetensors")


def test_a_resumed_run_has_the_average_of_the_undisturbed_one(trainer, caplog):  # noqa: F811
    how = f"{HOW} --max_train_steps 6 --ema_decay 0.9 --save_every_n_steps 3 --save_state"
    straight = trainer(how)
    straight.run()
    folder = straight.plan.options.saving.output_dir
    resumed = trainer(f"{how} --resume {folder / 'name-step00000003-state'}")
    resumed.run()
    assert same(result(straight), result(resumed)) and same(result(straight, "name_ema"), result(resumed, "name_ema"))
    without = trainer(f"{HOW} --max_train_steps 3 --save_state_on_train_end")
    without.run()
    state = without.plan.options.saving.output_dir / "name-state"
    trainer(f"{how} --resume {state}").run()
    assert "holds no average of the weights, which begins anew" in caplog.text
    assert "which ends without --ema_decay" not in caplog.text
    trainer(f"{how.replace('--ema_decay 0.9', '')} --resume {folder / 'name-step00000003-state'}")
    assert "holds an average of the weights, which ends without --ema_decay" in caplog.text


def test_files_of_the_average_rotate_with_the_others_and_are_no_states(trainer):  # noqa: F811
    how = f"{HOW} --ema_decay 0.9 --max_train_epochs 3 --save_every_n_epochs 1 --save_last_n_epochs 1 --save_state"
    run = trainer(how)
    run.run()
    folder = run.plan.options.saving.output_dir
    names = sorted(path.name for path in folder.iterdir() if path.suffix not in (".jsonl", ".html"))
    stems = ("name-000002", "name-000002_ema", "name", "name_ema")
    assert names == sorted([f"{stem}.safetensors" for stem in stems] + ["name-000002-state", "name-state"])
    assert all(_is_of("name", folder / name) for name in names)
    assert trainer(f"{how.replace('epochs 3', 'epochs 4')} --resume latest --output_dir {folder}").step == run.step
    again = trainer(f"{how.replace('epochs 3', 'epochs 4')} --resume {folder}/name-000002-state --output_dir {folder}")
    again.run()
    assert sorted(path.name for path in folder.glob("*_ema.*")) == [
        "name-000003_ema.safetensors",
        "name_ema.safetensors",
    ]


def test_validation_sees_the_average_on_request_and_training_goes_on_with_the_weights(trainer):  # noqa: F811
    how = f"{HOW} --max_train_steps 4 --ema_decay 0.9 --validation_split 0.3 --validation_timesteps 2"
    for more in ("", "--ema_for_samples"):
        run = trainer(f"{how} {more}")
        values = []
        run.log = lambda logged, step: values.append(logged.get("loss/validation"))  # noqa: B023
        run.run()
        measured = [value for value in values if value is not None]
        with run.ema.shown():
            average = run.validator.measure(run.dit, run.module, 0)["loss/validation"]
        live = run.validator.measure(run.dit, run.module, 0)["loss/validation"]
        assert measured[-1] == (average if more else live) != (live if more else average)
        assert same(run.trained.tensors(), result(run))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--ema_decay 1", "--ema_decay 1: must be between 0 and 1. 0.99 to 0.9999 are usual."),
        ("--ema_for_samples", "--ema_for_samples: there is no average. Add --ema_decay 0.999."),
    ],
)
def test_an_average_that_cannot_be_is_refused(trainer, options, line):  # noqa: F811
    with pytest.raises(UserError) as error:
        trainer(options)
    assert str(error.value) == line


def test_an_optimizer_that_averages_by_itself_is_told(trainer, caplog):  # noqa: F811
    trainer("--optimizer_type tests.test_modules_optimizers.MeanScheduleFree --learning_rate 1e-3 --ema_decay 0.9")
    assert "--ema_decay: MeanScheduleFree averages the weights already" in caplog.text


def test_fine_tuning_refuses_it_in_a_line_with_what_works():
    assert TrainedLora.beside and not TrainedDit.beside
    with pytest.raises(UserError, match="--ema_decay: is not available in fine-tuning, .* lora_post_hoc_ema.py"):
        check_ema(EmaOptions(ema_decay=0.9), beside=False)


@needs_fork
def test_two_processes_have_the_same_average(trainer, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def train() -> None:
        run = trainer(f"{HOW} --max_train_steps 3 --ema_decay 0.5 --output_dir {tmp_path / 'two'}")
        run.run()
        values = torch.cat([value.flatten() for value in run.ema.model.parameters()])
        print("average", values.double().sum().item(), values.double().square().sum().item())

    codes, said = fork(train, tmp_path, 2)
    assert codes == [0, 0], said
    averages = [line for line in said.splitlines() if line.startswith("average")]
    assert len(averages) == 2 and averages[0] == averages[1]
    assert not same(*(load_file(tmp_path / "two" / f"{name}.safetensors") for name in ("name", "name_ema")))
