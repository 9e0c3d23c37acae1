"""The estimate of a run's memory, and what is recommended where it does not suffice."""

import pytest
import torch

from modules.memory_advice import estimate, savings
from modules.run_summary import summary
from tests.test_modules_full_training import trainer as full_trainer  # noqa: F401
from tests.test_modules_trainer import trainer  # noqa: F401
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("more", ["", "--fp8_base", "--blocks_to_swap 2 --block_swap_ring_size 1", "--quantize int8"])
def test_weights_are_those_that_are_loaded(trainer, more):  # noqa: F811
    run = trainer(f"--max_train_steps 1 {more}")
    tensors = {t.data_ptr(): t for t in (*run.dit.parameters(), *run.dit.buffers())}
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    if "swap" in more:
        block = run.dit.blocks[0]
        held -= sum(t.numel() * t.element_size() for t in block.parameters())  # two in a ring of one
    lora = {p.data_ptr() for p in run.parameters}
    held -= sum(t.numel() * t.element_size() for pointer, t in tensors.items() if pointer in lora)
    assert estimate(run.plan, CPU).weights == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize(
    ("more", "bytes_each"),
    [
        ("--optimizer_type AdamW", 16),
        ("--optimizer_type AdamW --fused_backward_pass", 12),
        ("--optimizer_type SGD --full_bf16", 4),
    ],
)
def test_fine_tuning_counts_gradients_and_averages_of_every_weight(full_trainer, more, bytes_each):  # noqa: F811
    run = full_trainer(f"--max_train_steps 1 --learning_rate 1e-4 {more}")
    numbers = sum(parameter.numel() for parameter in run.parameters)
    assert estimate(run.plan, CPU).weights == pytest.approx(numbers * bytes_each, rel=0.1)
    assert run.plan.steps()[0].trained == 1


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            "",
            "use --blocks_to_swap auto; if that is not enough --gradient_checkpointing, --fp8_base, "
            "batch_size 1 in the dataset file or a smaller resolution or fewer frames",
        ),
        (
            "--blocks_to_swap auto --gradient_checkpointing --fp8_base",
            "use --gradient_checkpointing_cpu_offload; if that is not enough batch_size 1 in the dataset file or "
            "a smaller resolution or fewer frames",
        ),
    ],
)
def test_what_is_in_use_is_not_recommended(trainer, more, line):  # noqa: F811
    assert savings(trainer(f"--max_train_steps 1 {more}").plan) == line


def test_fine_tuning_has_advice_of_its_own(full_trainer):  # noqa: F811
    line = savings(full_trainer("--max_train_steps 1").plan)
    assert line.startswith("use --blocks_to_swap 2; if that is not enough --gradient_checkpointing, --full_bf16, ")
    assert "--fused_backward_pass, --optimizer_type adamw8bit" in line and "fp8_base" not in line


@pytest.mark.parametrize("where", ["accelerator.backward", "optimizer.step"])
def test_running_out_of_memory_anywhere_is_one_line(trainer, monkeypatch, where):  # noqa: F811
    run = trainer("--max_train_steps 1 --gradient_checkpointing")

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    owner, name = where.split(".")
    monkeypatch.setattr(getattr(run, owner), name, fail)
    with pytest.raises(UserError) as error:
        run.run()
    assert str(error.value).startswith(
        "not enough GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB). Use --blocks_to_swap auto; if that is "
        "not enough --gradient_checkpointing_cpu_offload, --fp8_base"
    )


def test_the_table_tells_steps_files_disk_and_memory_before_the_model_loads(trainer, caplog):  # noqa: F811
    caplog.set_level("INFO")
    run = trainer("--max_train_epochs 4 --gradient_accumulation_steps 2 --save_every_n_epochs 1 --save_state")
    lines = dict(line.split(maxsplit=1) for line in summary(run.plan, CPU))
    assert lines["steps"] == "16, each of 2 batches" and lines["epochs"] == "4 of 7 batches, 4 steps"
    assert lines["files"].startswith("4 of ") and lines["states"].startswith("4 of ")
    assert "are free" in lines["disk"] and lines["memory"].startswith("about ")
    loading = [record.message for record in caplog.records]
    assert loading.index("  steps   16, each of 2 batches") < loading.index("attention: torch's own")
