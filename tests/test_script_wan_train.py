"""wan_train.py as a user runs it, on recorded caches and tiny weights, down to the file that takes the DiT's place."""

import os
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from utils.safetensors_io import read_metadata

OPTIONS = "--task t2v-1.3B --max_data_loader_n_workers 0 --timestep_sampling shift --seed 42 --output_name tuned"


@pytest.fixture
def paths(dataset, models, tmp_path):
    """The options that name files: tiny weights, the recorded caches, an output folder."""
    return list(
        map(str, ("--dit", models["dit_t2v"], "--dataset_config", dataset, "--output_dir", tmp_path / "models"))
    )


def _run(command, **environment):
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result


def test_the_documented_command_writes_a_dit_that_trains_on(paths, tmp_path):
    options = shlex.split(
        f"{OPTIONS} --sdpa --full_bf16 --fused_backward_pass --optimizer_type adamw8bit --learning_rate 1e-5"
        " --gradient_checkpointing --discrete_flow_shift 3.0 --max_train_epochs 2 --save_every_n_epochs 1"
    )
    launcher = shlex.split("accelerate.commands.launch --num_cpu_threads_per_process 1 --mixed_precision bf16")
    result = _run([*launcher, "wan_train.py", *options, *paths])
    assert "DiT in torch.bfloat16; trained: weights of 325,216 numbers in bfloat16" in result.stderr
    folder = tmp_path / "models"
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "tuned-000001.safetensors",
        "tuned.safetensors",
    ]
    metadata = read_metadata(folder / "tuned.safetensors")
    assert metadata["num_heads"] == "3" and metadata["ss_full_bf16"] == "True"
    again = ["--dit", folder / "tuned.safetensors", "--output_name", "further", "--max_train_steps", "1"]
    _run(["wan_train", *shlex.split(OPTIONS), *paths, *map(str, again)])
    assert read_metadata(folder / "further.safetensors")["ss_sd_model_name"] == "tuned.safetensors"


def test_two_processes_train_the_same_weights_fused_or_not_swapped_or_not(paths, tmp_path):
    launcher = shlex.split("torch.distributed.run --standalone --nproc_per_node 2")
    weights = []
    for flags in ("", "--blocks_to_swap 2 --block_swap_ring_size 1", "--fused_backward_pass --blocks_to_swap 1"):
        options = shlex.split(f"{OPTIONS} --learning_rate 1e-3 --max_train_epochs 1 --max_grad_norm 0 {flags}")
        result = _run([*launcher, "wan_train.py", *options, *paths], ACCELERATE_USE_CPU="true")
        # Seven batches on two processes: four rounds.
        assert "4 steps in 1 epochs of 4 batches on 2 process(es)" in result.stderr
        weights.append(load_file(tmp_path / "models" / "tuned.safetensors"))
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in weights[0])


def test_wrong_options_end_in_one_line_before_the_model_loads(run_cli, paths):
    result = run_cli("wan_train.py", *shlex.split(OPTIONS), *paths, "--mixed_precision", "fp16")
    assert result.returncode == 2
    line = (
        "wan_train.py: error: --mixed_precision fp16: the weights are trained either in float32 or, with --full_bf16,"
        " in bfloat16. Add --full_bf16, or use --mixed_precision no."
    )
    assert result.stderr.splitlines()[-1] == line
