"""lora_post_hoc_ema.py as a user runs it."""

import os
import sys

import pytest
import torch
from safetensors.torch import load_file

import lora_post_hoc_ema
from networks.formats import with_hashes
from utils.errors import UserError
from utils.safetensors_io import read_metadata, save_file_atomically


def test_files_are_averaged_in_the_order_of_their_change_into_a_new_one(run_cli, golden, tmp_path, monkeypatch, caplog):
    source = golden / "lora_t2v_upstream.safetensors"
    tensors = load_file(source)
    paths = [tmp_path / f"{name}.safetensors" for name in ("newest", "oldest", "middle")]
    for path, value in zip(paths, (4.0, 1.0, 2.0), strict=True):
        same = {key: tensor if "alpha" in key else torch.full_like(tensor, value) for key, tensor in tensors.items()}
        save_file_atomically(same, path, with_hashes(same, {"ss_steps": path.stem}))
        os.utime(path, (value, value))
    output, before = tmp_path / "ema.safetensors", [path.read_bytes() for path in paths]
    result = run_cli("lora_post_hoc_ema.py", *paths, "--beta", "0.5", "--output_file", output)
    assert result.returncode == 0, result.stderr
    shown = [line.split() for line in result.stderr.splitlines() if " % " in line]
    assert [(line[-3], line[-1].rpartition(os.sep)[2]) for line in shown] == [
        ("25.0", "oldest.safetensors"),
        ("25.0", "middle.safetensors"),
        ("50.0", "newest.safetensors"),
    ]
    averaged, metadata = load_file(output), read_metadata(output)
    assert averaged.keys() == tensors.keys()
    for key, tensor in averaged.items():
        assert tensor.dtype == tensors[key].dtype
        assert torch.equal(tensor, tensors[key]) if "alpha" in key else (tensor == 2.75).all()
    assert metadata["ss_steps"] == "newest" and metadata == with_hashes(averaged, metadata)
    assert metadata["sshs_model_hash"] != read_metadata(paths[0])["sshs_model_hash"]
    assert [path.read_bytes() for path in paths] == before
    words = ["script", *map(str, paths), "--no_sort", "--beta", "0.5", "--output_file", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    lora_post_hoc_ema.main()
    assert f"{output}: is replaced" in caplog.text
    assert all((tensor == 2.25).all() for key, tensor in load_file(output).items() if "alpha" not in key)


def test_what_cannot_be_is_refused_and_nothing_written(golden, tmp_path, monkeypatch):
    source, output = golden / "lora_t2v_upstream.safetensors", tmp_path / "o.safetensors"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(source.read_bytes())
    averaged = tmp_path / "a_ema.safetensors"  # as --ema_decay saves it beside the others
    save_file_atomically(load_file(source), averaged, {"ss_ema_decay": "0.9"})
    for arguments, line in (
        ([source, "--output_file", output], "one file has no average. Name two or more."),
        ([source, copy, "--output_file", copy], "is one of the files to average"),
        ([source, copy, "--output_file", output, "--sigma_rel", "0.3"], "--sigma_rel 0.3: must be greater than 0"),
        ([source, golden / "vae.safetensors", "--output_file", output], "has other tensors than"),
        ([source, averaged, "--output_file", output], f"{averaged}: is an average already, others are not."),
        ([source, tmp_path / "no.safetensors", "--output_file", output], "no such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        with pytest.raises(UserError) as error:
            lora_post_hoc_ema.main()
        assert line in str(error.value)
    assert not output.exists() and copy.read_bytes() == source.read_bytes()
