"""The command that goes on, as it was typed."""

import sys
from pathlib import Path

import psutil
import pytest

from modules.stopping import command_to_resume

OURS = ["wan_train_network.py", "--seed", "1", "--output_name", "my lora"]


@pytest.mark.parametrize(
    ("parent", "said"),
    [
        (None, "python"),
        (["/venv/bin/python", "/venv/bin/torchrun", "--nproc_per_node", "2"], "torchrun --nproc_per_node 2"),
        (["/bin/python3", "/x/accelerate", "launch", "--use_fsdp"], "accelerate launch --use_fsdp"),
        (["python", "-m", "torch.distributed.run"], "python -m torch.distributed.run"),
    ],
)
@pytest.mark.parametrize("resumed", [[], ["--resume", "old-state"], ["--resume=old-state"]])
def test_the_command_that_goes_on_is_the_one_that_started_the_run(monkeypatch, parent, said, resumed):
    words = [*OURS, *resumed]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if parent:
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setattr(psutil.Process, "cmdline", lambda self: [*parent, *words])
    want = f"{said} wan_train_network.py --seed 1 --output_name 'my lora' --resume new-state"
    assert command_to_resume(Path("new-state")) == want


def test_a_parent_that_says_nothing_of_the_script_is_no_launcher(monkeypatch):
    monkeypatch.setattr(sys, "argv", OURS[:1])
    monkeypatch.setenv("LOCAL_RANK", "0")
    for cmdline in ([], ["bash"], ["slurmstepd", "x"]):
        monkeypatch.setattr(psutil.Process, "cmdline", lambda self, cmdline=cmdline: cmdline)
        assert command_to_resume(Path("s")) == "python wan_train_network.py --resume s"
