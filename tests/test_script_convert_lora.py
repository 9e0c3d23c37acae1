"""convert_lora.py as a user runs it."""

import pytest
import torch
from safetensors.torch import load_file

import convert_lora
from networks.formats import with_hashes
from utils.errors import UserError
from utils.safetensors_io import read_metadata


def test_a_file_goes_to_the_other_format_and_back(run_cli, golden, tmp_path):
    source = golden / "lora_t2v_upstream.safetensors"
    other, back = tmp_path / "other.safetensors", tmp_path / "back.safetensors"
    result = run_cli("convert_lora.py", "--input", source, "--output", other, "--target", "other")
    assert result.returncode == 0, result.stderr
    result = run_cli("convert_lora.py", "--input", other, "--output", back, "--target", "default")
    assert result.returncode == 0, result.stderr
    assert load_file(other).keys() == load_file(golden / "lora_t2v_other.safetensors").keys()
    want = load_file(golden / "lora_t2v_back.safetensors")
    assert all(torch.equal(value, want[key]) for key, value in load_file(back).items())
    metadata = read_metadata(back)
    assert metadata["ss_network_dim"] == "4"
    assert metadata == with_hashes(load_file(back), metadata) != read_metadata(source)


def test_wrong_files_end_in_one_line(run_cli, golden, tmp_path):
    output = tmp_path / "out.safetensors"
    result = run_cli("convert_lora.py", "--input", golden / "vae.safetensors", "--output", output, "--target", "other")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "vae.safetensors: not a LoRA" in result.stderr and not output.exists()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"input": "no.safetensors"}, "no such file"),
        ({"target": "othr"}, "did you mean 'other'?"),
        ({"output": "folder"}, "not a .safetensors file"),
        ({"output": "folder.safetensors"}, "is a folder, not a file"),
    ],
)
def test_wrong_options_are_named(golden, tmp_path, monkeypatch, given, line):
    for name in ("folder", "folder.safetensors"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    options = {"input": golden / "lora_t2v_upstream.safetensors", "output": "a.safetensors", "target": "other", **given}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["convert_lora.py", *words])
    with pytest.raises(UserError) as caught:
        convert_lora.main()
    assert line in str(caught.value) or line in caught.value.fix
