"""Optimizers and schedules by name."""

import pytest
import torch

from modules.optimizers import OptimizerOptions, check_optimizer, make_optimizer, make_schedule, parse_arguments
from utils.errors import UserError
from utils.options import parse_options

CPU = torch.device("cpu")


def _groups(size=4):
    return [{"params": [torch.nn.Parameter(torch.ones(size, size))], "lr": 0.1, "name": "unet"}]


def _options(*argv):
    return parse_options("doc", OptimizerOptions, argv=list(argv))[0]


def test_adamw_is_the_default_and_takes_python_literals():
    optimizer, name = make_optimizer(_options("--optimizer_args", "weight_decay=0.5", "betas=0.8,0.99"), _groups())
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99) and optimizer.param_groups[0]["weight_decay"] == 0.5
    assert name == "torch.optim.adamw.AdamW(weight_decay=0.5,betas=(0.8, 0.99))"
    assert make_optimizer(_options(), _groups())[1] == "torch.optim.adamw.AdamW"


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_fused_step_is_the_step_up_to_rounding_and_stands_back_behind_arguments(name):
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(size)) for size in ((16, 4), (30,))]
        groups = [{"params": weights[:1], "lr": 1e-2}, {"params": weights[1:], "lr": 1e-3}]
        optimizer, described = make_optimizer(_options("--optimizer_type", name), groups, fused)
        assert bool(optimizer.defaults["fused"]) == fused and "fused" not in described
        for _ in range(4):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        results.append(torch.cat([weight.detach().flatten() for weight in weights]))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)
    for argument in ("fused=False", "foreach=True"):
        optimizer, described = make_optimizer(_options("--optimizer_args", argument), _groups())
        assert not optimizer.defaults["fused"] and argument in described


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("AdamW", "AdamW"),
        ("ADAMW", "AdamW"),
        ("SGD", "SGD"),
        ("torch.optim.Adam", "Adam"),
        ("adamw8bit", "AdamW8bit"),
        ("adafactor", "Adafactor"),
    ],
)
def test_names_find_their_class_whose_step_lowers_a_loss(name, kind):
    if kind == "AdamW8bit":
        pytest.importorskip("bitsandbytes")
    groups = _groups(64)
    optimizer, _ = make_optimizer(_options("--optimizer_type", name, "--learning_rate", "0.1"), groups)
    assert type(optimizer).__name__ == kind and optimizer.param_groups[0]["name"] == "unet"
    weight = groups[0]["params"][0]
    weight.square().sum().backward()
    optimizer.step()
    assert weight.square().sum() < 64 * 64


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--optimizer_type", "AdamWW"], "--optimizer_type AdamWW: unknown optimizer. Did you mean 'AdamW'?"),
        (
            ["--optimizer_type", "prodigyopt.Prodigy"],
            "--optimizer_type prodigyopt.Prodigy: prodigyopt is not installed.",
        ),
        (["--optimizer_type", "torch.nn.Linear"], "--optimizer_type torch.nn.Linear: torch.nn.Linear is no optimizer"),
        (["--lr_scheduler_type", "StepLRR"], "--lr_scheduler_type StepLRR: unknown ("),
        (
            ["--lr_scheduler_type", "ReduceLROnPlateau"],
            "--lr_scheduler_type ReduceLROnPlateau: is no schedule that goes",
        ),
        (["--lr_scheduler_type", "StepLR"], "--lr_scheduler_type StepLR: refuses its arguments ("),
        (
            ["--lr_scheduler", "piecewise_constant"],
            "--lr_scheduler_args step_rules='': no course of the learning rate.",
        ),
        (["--lr_scheduler", "rex", "--lr_scheduler_args", "a=1"], "--lr_scheduler_args a: rex has no such argument."),
        (
            ["--optimizer_type", "tests.test_modules_optimizers.MeanScheduleFree", "--lr_scheduler", "cosine"],
            "--lr_scheduler cosine: MeanScheduleFree has no schedule.",
        ),
        (
            ["--optimizer_args", "weight_decoy=1"],
            "--optimizer_args weight_decoy: AdamW has no such argument. Did you mean",
        ),
        (["--optimizer_args", "weight_decay"], "--optimizer_args weight_decay: not of the form key=value."),
        (["--optimizer_args", "fused=yes"], "--optimizer_args fused=yes: the value is no Python literal."),
        (["--optimizer_args", "eps=-1.0"], "--optimizer_type AdamW: AdamW refuses its arguments (Invalid epsilon"),
        (["--lr_warmup_steps", "5"], "--lr_warmup_steps 5: --lr_scheduler constant has no warm-up. Use --lr_scheduler"),
        (["--lr_warmup_steps", "some"], "--lr_warmup_steps: 'some' is neither a number of steps nor a share"),
        (["--learning_rate", "-1"], "--learning_rate -1: must not be negative."),
        (
            ["--lr_scheduler", "linear", "--lr_warmup_steps", "101"],
            "--lr_warmup_steps and --lr_decay_steps: together 101 of 100 steps. Use fewer.",
        ),
        (["--lr_scheduler", "cosine_with_min_lr"], "--lr_scheduler cosine_with_min_lr: needs the lowest rate."),
    ],
)
def test_wrong_settings_end_in_one_line(argv, line):
    with pytest.raises(UserError) as error:
        check_optimizer(_options(*argv), CPU, total_steps=100)
    assert str(error.value).startswith(line)


def test_an_optimizer_that_cannot_step_on_the_device_is_refused():
    options = _options("--optimizer_type", "tests.test_modules_optimizers.Broken")
    with pytest.raises(UserError, match=r"Broken: cannot run on cpu \(no kernel\). Use --optimizer_type AdamW"):
        check_optimizer(options, CPU, total_steps=100)


class Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("no kernel\nand more")


# Multiples of the learning rate over ten steps, as musubi-tuner was seen to give them.
@pytest.mark.parametrize(
    ("argv", "want"),
    [
        ([], [1.0] * 11),
        (["constant_with_warmup", "--lr_warmup_steps", "2"], [0, 0.5, 1, 1]),
        (["constant_with_warmup", "--lr_warmup_steps", "20%"], [0, 0.5, 1, 1]),
        (["linear", "--lr_warmup_steps", "0.2"], [0, 0.5, 1, 0.875]),
        (["cosine", "--lr_warmup_steps", "2"], [0, 0.5, 1, 0.9619, 0.8536]),
        (
            [
                "warmup_stable_decay",
                "--lr_warmup_steps",
                "2",
                "--lr_decay_steps",
                "3",
                "--lr_scheduler_min_lr_ratio",
                "0.1",
            ],
            [0.1, 0.55, 1, 1, 1, 1, 1, 1, 0.775, 0.325, 0.1],
        ),
        (["rex"], [1, 0.9891, 0.9759, 0.9593, 0.9381, 0.91, 0.8709, 0.8127, 0.7171, 0.5311, 0.01]),
        (["rex", "--lr_warmup_steps", "2", "--lr_scheduler_min_lr_ratio", "0"], [0, 0.5, 1, 0.9859]),
        (["piecewise_constant", "--lr_scheduler_args", "step_rules='1:2,0.5:3,0.1'"], [1, 1, 0.5, 0.1, 0.1]),
        (
            ["linear", "--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=2", "gamma=0.5"],
            [1, 1, 0.5, 0.5, 0.25],
        ),
    ],
)
def test_schedules_take_the_known_course(argv, want):
    options = _options("--learning_rate", "0.1", *(["--lr_scheduler", *argv] if argv else []))
    optimizer, _ = make_optimizer(options, _groups())
    schedule = make_schedule(options, optimizer, total_steps=10)
    got = []
    for _ in want:
        got.append(optimizer.param_groups[0]["lr"] / 0.1)
        optimizer.step()
        schedule.step()
    assert got == pytest.approx(want, abs=1e-4)


def test_adafactor_finds_its_own_rate_unless_told_otherwise():
    for arguments, rate in (([], None), (["--optimizer_args", "relative_step=False"], 0.1)):
        options, groups = _options("--optimizer_type", "Adafactor", *arguments), _groups()
        groups[0]["lr"] = 0.1
        optimizer, _ = make_optimizer(options, groups)
        assert optimizer.param_groups[0]["lr"] == rate
        schedule = make_schedule(options, optimizer, total_steps=10)
        before = [weight.detach().clone() for weight in groups[0]["params"]]
        for weight in groups[0]["params"]:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        schedule.step()
        assert not any(map(torch.equal, before, groups[0]["params"]))


class MeanScheduleFree(torch.optim.SGD):
    """Stands in for an optimizer without a schedule: outside of training the weights are twice what they are in it."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.training = False

    def _scale(self, factor: float, training: bool) -> None:
        if self.training != training:
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.data.mul_(factor)
        self.training = training

    def train(self) -> None:
        self._scale(0.5, True)

    def eval(self) -> None:
        self._scale(2.0, False)

    def step(self, closure=None):
        assert self.training
        return super().step(closure)


def test_only_the_first_equal_sign_separates():
    assert parse_arguments(["a='x=y'", "b=None"], "--optimizer_args") == {"a": "x=y", "b": None}
