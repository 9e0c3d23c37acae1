"""wan_train_network.py as a user runs it, on recorded caches and tiny weights, down to the files it writes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from networks.formats import with_hashes
from tests.conftest import ROOT
from utils.safetensors_io import read_metadata

BASE = "--task t2v-1.3B --max_data_loader_n_workers 0 --output_name name-of-lora --timestep_sampling shift"


@pytest.fixture
def train(run_cli, models, dataset, tmp_path):
    """Train with the base options and those given, and return (result, output folder)."""

    def run(options="", dit="dit_t2v", base=BASE, **environment):
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        given = shlex.split(f"{base} {options}")
        defaults = {"--dit": models[dit], "--dataset_config": dataset, "--output_dir": output}
        paths = [word for name, path in defaults.items() if name not in given for word in (name, path)]
        return run_cli("wan_train_network.py", *given, *paths, **environment), output

    return run


def test_files_tensors_and_metadata_are_those_of_the_recorded_run(train, golden):
    recorded = json.loads((golden / "train_files.json").read_text())
    result, output = train(
        "--sdpa --mixed_precision no --optimizer_type AdamW --learning_rate 2e-4 --gradient_checkpointing"
        " --network_module musubi_tuner.networks.lora_wan --network_dim 4 --network_alpha 2 --discrete_flow_shift 3.0"
        " --max_train_steps 3 --save_every_n_steps 2 --seed 42 --training_comment golden --metadata_author me"
        """ --min_timestep 100 --max_timestep 900 --network_args "exclude_patterns=[r'.*ffn.*']" loraplus_lr_ratio=4"""
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in output.glob("*.safetensors")) == sorted(recorded["files"])
    for name, want in recorded["files"].items():
        tensors, metadata = load_file(output / name), read_metadata(output / name)
        shapes = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in tensors.items()}
        assert shapes == want["tensors"]
        assert metadata.pop("ss_task") == "t2v-1.3B"
        own = json.loads(metadata.pop("wan_tuner"))
        assert own.keys() == {"task", "dit", "software"} and own["task"] == "t2v-1.3B"
        assert metadata.keys() == want["metadata"].keys()
        for key, text in want["metadata"].items():
            if key == "ss_datasets":
                assert json.loads(metadata[key]) == json.loads(text)
            elif text != "<varies>" and key != "ss_sd_model_name":
                assert metadata[key] == text, key
        assert metadata["ss_sd_model_name"] == "dit_t2v.safetensors"
        assert with_hashes(tensors, metadata) == metadata


def test_the_same_seed_gives_the_same_lora_bit_by_bit(train):
    dropouts = "--network_dropout 0.1 --network_args rank_dropout=0.1 module_dropout=0.1"
    options = f"--learning_rate 1e-3 --max_train_epochs 2 --num_timestep_buckets 4 {dropouts}"
    seeds = ("--seed 7", "--seed 7 --max_data_loader_n_workers 2 --persistent_data_loader_workers")
    loras = []
    for seed in seeds:
        result, output = train(f"{options} {seed}")
        assert result.returncode == 0, result.stderr
        loras.append(load_file(output / "name-of-lora.safetensors"))
    assert all(torch.equal(loras[0][key], loras[1][key]) for key in loras[0])


def test_the_documented_command_trains_through_accelerate_launch(models, dataset, tmp_path):
    command = (
        "accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 wan_train_network.py --task t2v-1.3B"
        f" --dit {models['dit_t2v'].as_posix()} --dataset_config {dataset.as_posix()} --sdpa --mixed_precision bf16"
        " --fp8_base --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing"
        " --max_data_loader_n_workers 2 --persistent_data_loader_workers --network_module networks.lora_wan"
        " --network_dim 32 --timestep_sampling shift --discrete_flow_shift 3.0 --max_train_epochs 2"
        f" --save_every_n_epochs 1 --seed 42 --output_dir {tmp_path.as_posix()} --output_name name-of-lora"
    )
    module = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(command)[2:]]
    result = subprocess.run(module, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert "avr_loss=" in result.stderr and "DiT in torch.bfloat16" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "name-of-lora-000001.safetensors",
        "name-of-lora.safetensors",
        "name-of-lora_log.jsonl",
        "name-of-lora_report.html",
    ]
    metadata = read_metadata(tmp_path / "name-of-lora.safetensors")
    assert metadata["ss_mixed_precision"] == "bf16" and metadata["ss_optimizer"].endswith("AdamW8bit")


def two_processes(models, dataset, output, options) -> subprocess.CompletedProcess:
    """Train by two processes on the CPU."""
    options = shlex.split(f"{BASE} --learning_rate 1e-3 --seed 1 --network_args module_dropout=0.3 {options}")
    paths = ["--dit", models["dit_t2v"], "--dataset_config", dataset, "--output_dir", output]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "wan_train_network.py", *options, *map(str, paths)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env=environment)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def by_two(models, dataset, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """An epoch by two processes: the folder of its files, and what was said."""
    output = tmp_path_factory.mktemp("by_two")
    return output, two_processes(models, dataset, output, "--max_train_epochs 1 --gradient_checkpointing")


def test_two_processes_share_the_batches_and_average_their_gradients(by_two):
    output, result = by_two
    # Seven batches on two processes: four rounds an epoch.
    assert "4 steps in 1 epochs of 4 batches on 2 process(es)" in result.stderr
    assert result.stderr.count("saved ") == 1
    assert read_metadata(output / "name-of-lora.safetensors")["ss_num_batches_per_epoch"] == "4"


def test_two_processes_with_swapped_blocks_train_the_same_lora(models, dataset, by_two, tmp_path):
    two_processes(models, dataset, tmp_path, "--max_train_epochs 1 --gradient_checkpointing --blocks_to_swap 2")
    plain, swapped = (load_file(folder / "name-of-lora.safetensors") for folder in (by_two[0], tmp_path))
    assert all(torch.equal(plain[key], swapped[key]) for key in plain)


def test_wrong_options_end_in_one_line_before_the_model_loads(train):
    result, output = train("--learnin_rate 1e-4")
    assert result.returncode == 2 and not output.exists()
    line = "wan_train_network.py: error: --learnin_rate: unknown option. Did you mean '--learning_rate'?"
    assert result.stderr.strip() == line
