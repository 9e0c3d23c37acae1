"""convert_lora.py as a user runs it."""

import torch
from safetensors.torch import load_file

from networks.formats import with_hashes
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
    result = run_cli("convert_lora.py", "--input", tmp_path / "no.safetensors", "--output", output, "--target", "other")
    assert result.returncode == 2 and "no such file" in result.stderr
    result = run_cli("convert_lora.py", "--input", "a.safetensors", "--output", output, "--target", "othr")
    assert result.returncode == 2 and "Did you mean 'other'?" in result.stderr
    for wrong, line in ((tmp_path, "not a .safetensors file"), (tmp_path / "d.safetensors", "is a folder, not a file")):
        wrong.mkdir(exist_ok=True)
        result = run_cli("convert_lora.py", "--input", "a.safetensors", "--output", wrong, "--target", "other")
        assert result.returncode == 2 and line in result.stderr
