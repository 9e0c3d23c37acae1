"""Training by two processes on a CPU, with whole and with shared-out DiTs, held against one process."""

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from modules.full_training import FullOptions, TrainedDit
from modules.lora_training import NetworkOptions, TrainedLora
from modules.run_logs import LoggingOptions
from modules.several import join, offloads, reshards, sharding
from modules.train_options import ProcessOptions, TrainOptions
from modules.trainer import Trainer, make_trainer
from tests.forked import fork, needs_fork
from tests.test_modules_trainer import BASE
from utils.errors import UserError
from utils.options import parse_options

GPU = torch.device("cuda")
shares_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason=f"torch {torch.__version__} has FSDP2 for GPUs alone"
)
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
TEN = "--max_train_steps 10 --learning_rate 1e-3 --lr_scheduler cosine"


@pytest.fixture(scope="module")
def even(dataset, tmp_path_factory) -> Path:
    """A dataset file of which an epoch has a number of batches that divides by four."""
    path = tmp_path_factory.mktemp("even") / "even.toml"
    path.write_text(re.sub(r"batch_size = \d+", "batch_size = 1", dataset.read_text()))
    return path


def make(words: str) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    groups = [field.type for field in fields(TrainOptions)]
    *options, network, logs = parse_options("doc", *groups, NetworkOptions, LoggingOptions, argv=shlex.split(words))
    return make_trainer(TrainOptions(*options), TrainedLora(network), logs)


def with_noise_of_its_own(run: Trainer) -> Trainer:
    """Let the noise of a batch depend on nothing but the batch, whichever process it is on."""
    loss = run.loss

    def reseeded(batch):
        run.generator.manual_seed(int(1000 * batch.latents.float().abs().sum()))
        return loss(batch)

    run.loss = reseeded
    return run


def close(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.allclose(first[k], second[k], rtol=0, atol=1e-6) for k in first)


def two(words: str, environment: dict[str, str]) -> Callable[[], None]:
    """Return the main() of each of two processes that train together."""

    def main() -> None:
        os.environ.update(environment)
        sys.argv = ["wan_train_network.py"]
        with_noise_of_its_own(make(words)).run()

    return main


@pytest.fixture(scope="module")
def words(models, even) -> Callable[..., str]:
    """Return a function that gives the command line of a run that makes samples and states too."""
    prompts = even.with_name("prompts.txt")
    prompts.write_text("a red circle --w 32 --h 32 --f 5 --s 2 --d 1 --l 4\n")
    given = {
        **{"task": "t2v-1.3B", "dit": models["dit_t2v"], "dataset_config": even, "sample_prompts": prompts},
        **{"vae": models["vae"], "t5": models["t5"], "t5_tokenizer": models["tokenizer"]},
    }
    paths = " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in given.items())

    def words(folder: Path, more: str = "") -> str:
        often = "--sample_at_first --sample_every_n_steps 4 --save_every_n_steps 5 --save_state"
        return f"{BASE} {TEN} {paths} {often} --output_dir {folder} {more}"

    yield words
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> Path:
    """The files of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with_noise_of_its_own(make(words(folder, "--gradient_accumulation_steps 4"))).run()
    return folder


@needs_fork
@pytest.mark.parametrize(
    ("environment", "flags"),
    [({}, ""), pytest.param(FSDP, "--gradient_checkpointing", marks=shares_on_cpu)],
    ids=["whole", "shared"],
)
def test_two_processes_train_what_one_does_with_the_batch_doubled(words, alone, tmp_path, environment, flags):
    both = tmp_path / "both"
    codes, said = fork(two(words(both, f"--gradient_accumulation_steps 2 {flags}"), environment), tmp_path, 2)
    assert codes == [0, 0], said
    for name in ("name-step00000005", "name-step00000010", "name"):
        assert close(alone / f"{name}.safetensors", both / f"{name}.safetensors"), name
    assert sorted(path.name for path in alone.iterdir()) == sorted(path.name for path in both.iterdir())
    samples = [sorted(path.name[:14] for path in (folder / "sample").iterdir()) for folder in (alone, both)]
    assert samples[0] == samples[1] == ["name_000004_00", "name_000008_00", "name_e000000_0"]


@needs_fork
@shares_on_cpu
def test_shared_weights_are_parts_of_the_whole_and_what_lies_outside_of_blocks_stays_whole(words, tmp_path):
    def main() -> None:
        os.environ.update(FSDP)
        run = make(words(tmp_path))
        held = {name: parameter.to_local().shape for name, parameter in run.dit.blocks.named_parameters()}
        assert held["0.ffn.0.weight"] == (96, 96) and held["1.self_attn.q.bias"] == (48,)
        assert run.dit.text_embedding[0].weight.shape == (96, 64)
        assert all(type(parameter) is torch.nn.Parameter for parameter in run.parameters)

    codes, said = fork(main, tmp_path, 2)
    assert codes == [0, 0], said


@needs_fork
@pytest.mark.parametrize("environment", [{}, pytest.param(FSDP, marks=shares_on_cpu)], ids=["whole", "shared"])
def test_a_killed_process_ends_the_others_with_a_line(words, tmp_path, environment):
    def main() -> None:
        os.environ.update(environment)
        sys.argv = ["wan_train_network.py"]
        run = make(words(tmp_path / "out"))
        after_step = run.after_step

        def killed(epoch: int) -> None:
            after_step(epoch)
            if run.step == 2 and run.accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        run.after_step = killed
        run.run()

    started = time.monotonic()
    codes, said = fork(main, tmp_path, 2)
    assert codes == [2, -signal.SIGKILL] and time.monotonic() - started < 60
    assert "wan_train_network.py: error: another process of this run has ended or does not answer (" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--fp8_base", "--fp8_base: cannot be had with accelerate launch --use_fsdp. Leave one of them out."),
        ("--quantize int8", "--quantize int8: cannot be had with accelerate launch --use_fsdp."),
        ("--blocks_to_swap 1", "--blocks_to_swap: cannot be had with accelerate launch --use_fsdp."),
        ("--dit_high_noise x", "--dit_high_noise: cannot be had with accelerate launch --use_fsdp."),
        ("--compile", "--compile: cannot be had with accelerate launch --use_fsdp."),
    ],
)
def test_what_cannot_be_had_with_a_shared_dit_is_refused(monkeypatch, flags, line):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError) as error:
        sharding(given(flags), TrainedLora(NetworkOptions()), 2, GPU)
    assert str(error.value).startswith(line)


def given(flags: str) -> TrainOptions:
    groups = [field.type for field in fields(TrainOptions)]
    return TrainOptions(*parse_options("doc", *groups, argv=flags.split()))


def test_fine_tuning_does_not_share_out_its_weights(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="fine-tuning changes them. Train a LoRA, or use --multi_gpu"):
        sharding(given(""), TrainedDit(FullOptions()), 2, GPU)


@pytest.mark.parametrize(
    ("environment", "reshard", "offload"),
    [
        ({"FSDP_VERSION": "2"}, True, False),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_OFFLOAD_PARAMS": "true"}, False, True),
        ({"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, True, False),
        ({"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP", "FSDP_OFFLOAD_PARAMS": "true"}, False, True),
    ],
)
def test_what_accelerate_is_told_of_either_version_is_understood(monkeypatch, environment, reshard, offload):
    for name, value in {"ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    plugin = sharding(given(""), TrainedLora(NetworkOptions()), 2, GPU)
    assert (reshards(plugin), offloads(plugin)) == (reshard, offload)


def test_a_torch_that_shares_on_gpus_alone_is_told(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.cpu, "Stream", object)
    with pytest.raises(UserError, match="use_fsdp: torch .* shares out weights on GPUs alone. Leave it out, or"):
        sharding(given(""), TrainedLora(NetworkOptions()), 2, torch.device("cpu"))


def test_strategies_that_are_not_known_are_refused(monkeypatch):
    for name, value in {"USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}.items():
        monkeypatch.setenv(name if name.startswith("FSDP") else f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match="Use --fsdp_reshard_after_forward true or false"):
        sharding(given(""), TrainedLora(NetworkOptions()), 2, GPU)


def test_one_process_alone_shares_with_nobody(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding(given(""), TrainedLora(NetworkOptions()), 1, GPU) is None
    assert "one process alone has nobody to share the DiT with" in caplog.text


def test_options_of_distributed_data_parallel_are_accepted_and_said_to_have_no_effect(caplog):
    AcceleratorState._reset_state(reset_partial_state=True)
    join(ProcessOptions(ddp_timeout=30, ddp_static_graph=True, ddp_gradient_as_bucket_view=True))
    for name in ("ddp_static_graph", "ddp_gradient_as_bucket_view"):
        assert f"--{name}: has no effect" in caplog.text
    with pytest.raises(UserError, match="--ddp_timeout 0: must be at least 1 minute"):
        join(ProcessOptions(ddp_timeout=0))


def test_how_a_gpu_computes_is_what_is_asked_for():
    backends = torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark
    try:
        join(ProcessOptions())
        assert (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark) == before
        join(ProcessOptions(cuda_allow_tf32=True, cuda_cudnn_benchmark=True))
        assert backends.cuda.matmul.allow_tf32 and backends.cudnn.allow_tf32 and backends.cudnn.benchmark
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark = before
