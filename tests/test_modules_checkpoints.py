"""LoRA files of a run: names, what is kept, metadata."""

import pytest
import torch
from safetensors.torch import load_file

from modules.checkpoints import (
    OWN_KEY,
    Checkpoints,
    MetadataOptions,
    SavingOptions,
    check_saving,
    model_metadata,
    training_metadata,
)
from utils.errors import UserError
from utils.safetensors_io import read_metadata

TENSORS = {
    "lora_unet_blocks_0_ffn_0.lora_down.weight": torch.randn(2, 3),
    "lora_unet_blocks_0_ffn_0.alpha": torch.ones(()),
}


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_are_named_by_step_and_by_epoch(tmp_path):
    checkpoints = Checkpoints(SavingOptions(output_dir=tmp_path, output_name="name"), {"ss_seed": "1"})
    checkpoints.save(TENSORS, "step", 2, 2, 0)
    checkpoints.save(TENSORS, "epoch", 1, 4, 1)
    assert checkpoints.save(TENSORS, "end", 0, 8, 2) == tmp_path / "name.safetensors"
    assert _names(tmp_path) == ["name-000001.safetensors", "name-step00000002.safetensors", "name.safetensors"]
    metadata = read_metadata(tmp_path / "name-step00000002.safetensors")
    assert (metadata["ss_steps"], metadata["ss_epoch"], metadata["ss_seed"]) == ("2", "0", "1")


def test_of_files_by_step_those_of_the_last_n_steps_stay(tmp_path):
    options = SavingOptions(output_dir=tmp_path, output_name="n", save_every_n_steps=10, save_last_n_steps=30)
    checkpoints = Checkpoints(options, {})
    for step in range(10, 60, 10):
        checkpoints.save(TENSORS, "step", step, step, 0)
    assert _names(tmp_path) == [f"n-step000000{step}.safetensors" for step in (20, 30, 40, 50)]


def test_of_files_by_epoch_the_last_n_stay_and_older_runs_are_left_alone(tmp_path):
    (tmp_path / "n-000002.safetensors").write_bytes(b"of another run")
    options = SavingOptions(output_dir=tmp_path, output_name="n", save_every_n_epochs=2, save_last_n_epochs=1)
    checkpoints = Checkpoints(options, {})
    for epoch in (4, 6, 8):
        checkpoints.save(TENSORS, "epoch", epoch, epoch, epoch)
    assert _names(tmp_path) == ["n-000002.safetensors", "n-000008.safetensors"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.float32)],
)
def test_every_tensor_is_in_the_precision_asked_for(tmp_path, name, dtype):
    options = SavingOptions(output_dir=tmp_path, output_name="n", save_precision=name)
    path = Checkpoints(options, {}).save(TENSORS, "end", 0, 1, 1)
    assert all(tensor.dtype == dtype for tensor in load_file(path).values())


def test_without_metadata_a_file_still_says_how_to_load_it(tmp_path):
    options = SavingOptions(output_dir=tmp_path, output_name="n")
    metadata = training_metadata({"seed": 1, "network_dim": 4, "base_model_version": "wan"})
    metadata |= {"modelspec.title": "t", OWN_KEY: "{}"}
    path = Checkpoints(options, metadata, no_metadata=True).save(TENSORS, "end", 0, 1, 1)
    assert read_metadata(path).keys() == {
        "ss_network_dim",
        "ss_base_model_version",
        "modelspec.title",
        "modelspec.date",
        "sshs_model_hash",
        "sshs_legacy_hash",
    }


def test_model_metadata_states_what_was_given_and_no_more():
    entries = model_metadata(
        MetadataOptions(metadata_author="me", metadata_reso="832,480"), "n", "wan2.1", "/lora", (None, 900)
    )
    assert entries["modelspec.author"] == "me" and entries["modelspec.title"] == "n"
    assert entries["modelspec.architecture"] == "wan2.1/lora" and entries["modelspec.resolution"] == "832x480"
    assert entries["modelspec.timestep_range"] == "0,900" and "modelspec.license" not in entries
    plain = model_metadata(MetadataOptions(metadata_reso="960"), "n", "wan2.2", "", (None, None))
    assert plain["modelspec.resolution"] == "960x960" and plain["modelspec.architecture"] == "wan2.2"
    assert "modelspec.timestep_range" not in plain


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"output_name": "n"}, "--output_dir is missing. Name the folder"),
        ({"output_dir": "."}, "--output_name is missing. Name the trained files"),
        ({"output_dir": ".", "output_name": "a/b"}, "--output_name a/b: is a path. Put the folder into --output_dir."),
        ({"output_dir": ".", "output_name": ".."}, "--output_name ..: not every system can write that"),
        ({"output_dir": ".", "output_name": "a*b"}, "--output_name a*b: not every system can write that"),
        (
            {"output_dir": ".", "output_name": "n", "save_every_n_steps": 0},
            "--save_every_n_steps 0: must be at least 1.",
        ),
    ],
)
def test_what_could_not_be_saved_is_refused_at_once(tmp_path, options, line):
    if "output_dir" in options:
        options = {**options, "output_dir": tmp_path}
    with pytest.raises(UserError) as error:
        check_saving(SavingOptions(**options), MetadataOptions())
    assert str(error.value).startswith(line)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir .*file: cannot be written to"):
        check_saving(SavingOptions(output_dir=tmp_path / "file", output_name="n"), MetadataOptions())


def test_a_run_does_not_replace_the_dit_it_starts_from(tmp_path):
    for name in ("n.safetensors", "n-000002.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(
            UserError, match=f"--output_name n: .*{name} could be replaced. Choose another name or fold"
        ):
            check_saving(SavingOptions(output_dir=tmp_path, output_name="n"), MetadataOptions(), tmp_path / name)
    check_saving(SavingOptions(output_dir=tmp_path / "other", output_name="n"), MetadataOptions(), tmp_path / name)


def test_files_that_a_run_is_going_to_replace_are_named(tmp_path, caplog):
    for name in ("n.safetensors", "n-step00000002.safetensors", "nicer.safetensors"):
        (tmp_path / name).touch()
    check_saving(SavingOptions(output_dir=tmp_path, output_name="n"), MetadataOptions())
    assert "files of this name already (n-step00000002.safetensors, n.safetensors)" in caplog.text
    assert _names(tmp_path) == ["n-step00000002.safetensors", "n.safetensors", "nicer.safetensors"]
