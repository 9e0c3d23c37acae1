"""LoHa and LoKr in training: what a LoRA can do, they can."""

import math

import pytest

from networks.formats import deltas
from tests.test_modules_states import HOW, same
from tests.test_modules_trainer import (
    _final_losses,
    _lora,
    _metadata,
    trainer,  # noqa: F401
)
from utils.errors import UserError
from utils.safetensors_io import read_metadata

KINDS = {
    "loha": "--network_module networks.loha --network_alpha 4",
    "lokr": "--network_module musubi_tuner.networks.lokr --network_alpha 4 --network_args factor=2",
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_the_loss_falls(trainer, kind):  # noqa: F811
    few = "--max_train_epochs 1 --sigmoid_scale 0.2"
    losses = _final_losses(trainer(f"{kind} --learning_rate 2e-2 --sigmoid_scale 0.2 --max_train_epochs 8"))
    assert sum(losses) < 0.8 * sum(_final_losses(trainer(f"{kind} --learning_rate 0 {few}")))


def test_files_say_what_they_are(trainer, kind):  # noqa: F811
    run = trainer(f"{kind} --max_train_steps 1")
    run.run()
    metadata, file = _metadata(run), _lora(run)
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == (kind.split()[1], "4")
    assert metadata["ss_network_alpha"] == "4.0" and metadata["modelspec.architecture"] == "wan2.1/lora"
    assert metadata.get("ss_network_args") == ('{"factor": "2"}' if "factor" in kind else None)
    assert {key.rpartition(".")[2][:5] for key in file} == {"alpha", "hada_" if "loha" in kind else "lokr_"}
    assert len(metadata["sshs_model_hash"]) == 64


@pytest.mark.parametrize(
    "flags",
    [
        "--gradient_checkpointing",
        "--blocks_to_swap 2 --block_swap_ring_size 1 --gradient_checkpointing --gradient_checkpointing_cpu_offload",
        "--blocks_to_swap 1 --fp8_base",
    ],
)
def test_ways_to_save_memory_change_nothing(trainer, kind, flags):  # noqa: F811
    options = f"{kind} --max_train_steps 2 --learning_rate 1e-3 --network_dropout 0.1"
    results = []
    for more in ("--fp8_base" if "fp8" in flags else "", flags):
        run = trainer(f"{options} {more}")
        run.run()
        results.append(_lora(run))
    assert same(*results)


def test_a_resumed_run_is_the_one_that_was_never_stopped(trainer, kind):  # noqa: F811
    args = "rank_dropout=0.1 module_dropout=0.1 loraplus_lr_ratio=4"
    kind = f"{kind} {args}" if "--network_args" in kind else f"{kind} --network_args {args}"
    options = f"{HOW} {kind} --max_train_steps 5 --save_every_n_steps 3 --save_state"
    straight = trainer(options)
    straight.run()
    state = straight.plan.options.saving.output_dir / "name-step00000003-state"
    resumed = trainer(f"{options} --resume {state}")
    resumed.run()
    assert same(_lora(straight), _lora(resumed))


def test_norms_are_limited(trainer, kind):  # noqa: F811
    run = trainer(f"{kind} --learning_rate 1e-1 --max_train_steps 3 --scale_weight_norms 0.5")
    run.run()
    assert 0.4 < max(branch.norm().item() for _, branch in run.module.branches()) <= 0.5 + 1e-5


@pytest.mark.parametrize("fp8", ["", "--fp8_base --fp8_scaled"])
def test_base_weights_are_in_the_model_as_if_they_were_attached(trainer, kind, fp8):  # noqa: F811
    made = trainer(f"{kind} --learning_rate 3e-1 --max_train_steps 2")
    made.run()
    path = made.plan.options.saving.output_dir / "name.safetensors"
    frozen = f"--learning_rate 0 --max_train_epochs 1 {fp8}"
    plain = _final_losses(trainer(frozen))
    merged = _final_losses(trainer(f"{frozen} --base_weights {path.as_posix()}"))
    attached = trainer(f"{frozen} {kind} --network_weights {path.as_posix()} --dim_from_weights")
    assert _final_losses(attached) == pytest.approx(merged, rel=0.01 if fp8 else 1e-4)
    assert math.dist(merged, plain) > 10 * math.dist(merged, list(attached.losses))
    assert same(_lora(attached), _lora(made))
    assert len(deltas([(_lora(made), 1.0, "")])) == 20 and read_metadata(path)["ss_network_dim"] == "4"


def test_networks_of_lycoris_are_refused_with_what_to_use_instead(trainer):  # noqa: F811
    with pytest.raises(UserError, match="--network_module lycoris.kohya: .* Use networks.loha or networks.lokr"):
        trainer("--network_module lycoris.kohya")


def test_auto_swap_counts_what_a_network_keeps_and_takes(trainer, kind):  # noqa: F811
    (step, *_) = trainer(f"{kind} --blocks_to_swap auto").plan.steps()
    assert step.rank == 0 and step.scratch == (4 * 4 * 96 * 192 if "loha" in kind else 0)
