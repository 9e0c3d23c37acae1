"""Weights & Biases and TensorBoard: what they are given, and what is refused before a model loads."""

import json
from pathlib import Path

import pytest

from modules.run_logs import LoggingOptions, plan_tracking, rates_of
from tests.test_script_wan_train_network import train  # noqa: F401
from utils.errors import UserError

# The few functions of wandb that are called, each of which writes down what it was given.
WANDB = """
import json, os, sys

def note(kind, *values):
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps([kind, *values]) + "\\n")

class Config:
    def update(self, values, allow_val_change):
        note("config", values)

config = Config()

class Run:
    def log(self, values, step):
        note("log", {name: v if isinstance(v, (int, float)) else vars(v) for name, v in values.items()}, step)
    def finish(self):
        note("finish")

class Video:
    def __init__(self, path, caption):
        self.kind, self.path, self.caption = type(self).__name__, path, caption

class Image(Video):
    pass

def login(key):
    note("login", key)

def init(project, **arguments):
    note("init", project, arguments, sys.argv)
    return Run()
"""


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Have a stand-in for wandb on the path of scripts, and return what reads what it was told."""
    (tmp_path / "lib" / "wandb-1.dist-info").mkdir(parents=True)
    (tmp_path / "lib" / "wandb-1.dist-info" / "METADATA").write_text("Name: wandb\nVersion: 1\n")
    (tmp_path / "lib" / "wandb.py").write_text(WANDB)
    monkeypatch.setenv("TOLD", str(tmp_path / "told.jsonl"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))

    def read():
        return [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]

    return read


def test_wandb_gets_curves_samples_and_settings_but_no_secrets_and_no_paths(train, told, tmp_path, models):  # noqa: F811
    (tmp_path / "prompts.txt").write_text(
        "a cat --w 32 --h 32 --f 5 --s 1 --l 1\na dog --w 32 --h 32 --f 1 --s 1 --l 1"
    )
    (tmp_path / "trackers.toml").write_text('[wandb]\ntags = ["t"]\n')
    encoders = f"--vae {models['vae']} --t5 {models['t5']} --t5_tokenizer {models['tokenizer']}"
    result, output = train(
        "--max_train_epochs 2 --log_with wandb --log_config --wandb_run_name mine --wandb_api_key S3CRET "
        f"--log_tracker_config {tmp_path / 'trackers.toml'} --log_tracker_name project --learning_rate 1e-3 "
        f"--sample_prompts {tmp_path / 'prompts.txt'} --sample_every_n_epochs 2 --network_args loraplus_lr_ratio=4 "
        f"{encoders}"
    )
    assert result.returncode == 0, result.stderr
    lines = told()
    assert lines[0] == ["login", "S3CRET"]
    assert lines[1][:3] == ["init", "project", {"name": "mine", "tags": ["t"]}] and "S3CRET" not in str(lines[1])
    config = lines[2][1]
    assert config["learning_rate"] == 1e-3 and config["task"] == "t2v-1.3B"
    paths = {"dit", "vae", "t5", "dataset_config", "output_dir", "sample_prompts", "wandb_api_key", "resume", "clip"}
    assert not paths & config.keys() and str(tmp_path) not in str(config)
    logged = [line[1:] for line in lines if line[0] == "log"]
    steps = [(values, step) for values, step in logged if "loss/current" in values]
    assert [step for _, step in steps] == list(range(1, 15))
    assert set(steps[0][0]) == {"loss/current", "loss/average", "lr/unet", "lr/unet plus"}
    assert [(v["epoch"], step) for v, step in logged if "loss/epoch" in v] == [(1, 7), (2, 14)]
    ((samples, step),) = [(values, step) for values, step in logged if "sample_0" in values]
    assert step == 14 and {name: (s["kind"], s["caption"]) for name, s in samples.items()} == {
        "sample_0": ("Video", "a cat"),
        "sample_1": ("Image", "a dog"),
    }
    assert [step for _, step in logged] == sorted(step for _, step in logged)  # wandb drops what comes late
    assert lines[-1] == ["finish"]
    assert "environment variable WANDB_API_KEY is better" in result.stderr
    for path in output.glob("*.*"):
        assert b"S3CRET" not in path.read_bytes()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"log_with": "all"}, "--log_with all: needs a folder. Add --logging_dir PATH."),
        ({"log_with": "wandb"}, "--log_with wandb: wandb is not installed. Pip install wandb."),
        ({"logging_dir": Path("x")}, "--logging_dir: tensorboard is not installed. Pip install tensorboard."),
        ({"log_tracker_config": Path("nowhere.toml")}, "--log_tracker_config nowhere.toml: no such file"),
        ({"log_tracker_config": Path("wrong.toml")}, "[wandbb] is no tracker. Did you mean 'wandb'?"),
        ({"log_tracker_config": Path("broken.toml")}, "not valid TOML"),
    ],
)
def test_what_cannot_be_tracked_is_refused(tmp_path, monkeypatch, options, line):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    Path("wrong.toml").write_text("[wandbb]\nname = 'x'")
    Path("broken.toml").write_text("name = ")
    with pytest.raises(UserError) as error:
        plan_tracking(LoggingOptions(**options))
    assert line in str(error.value)


def test_options_for_wandb_without_it_are_told_to_be_ignored(caplog):
    assert plan_tracking(LoggingOptions(wandb_run_name="x")).names == ()
    assert "--wandb_run_name: ignored without --log_with wandb" in caplog.text


def test_rates_of_optimizers_that_find_their_own_are_multiplied_out():
    groups = [{"name": "unet", "lr": 1.0, "d": 1e-4, "effective_lr": 0.5}, {"name": "unet plus", "lr": None}]
    assert rates_of(groups) == {"lr/unet": 1.0, "lr/d*lr/unet": 1e-4, "lr/d*eff_lr/unet": 5e-5}
