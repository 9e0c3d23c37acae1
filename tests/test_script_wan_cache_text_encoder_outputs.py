import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wan_cache_text_encoder_outputs
from tests.media import write_pictures, write_toml
from utils.errors import UserError
from wan.t5 import load_t5


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images = write_pictures(tmp_path / "images", {"a": (64, 64), "b": (64, 64)}, "a red square moves right")
    (images / "b.txt").write_text("a blue circle")
    general = {"resolution": 64, "caption_extension": ".txt", "enable_bucket": True}
    return write_toml(tmp_path / "data.toml", general, {"image_directory": images})


def error_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["wan_cache_text_encoder_outputs.py", *map(str, arguments)])
    with pytest.raises(UserError) as error:
        wan_cache_text_encoder_outputs.main()
    return str(error.value)


def test_a_run_writes_what_the_text_encoder_says_and_a_second_one_keeps_it(data: Path, models, run_cli):
    command = ["wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--device", "cpu", "--batch_size", "16"]
    weights = ["--t5", models["t5"], "--t5_tokenizer", models["tokenizer"]]
    done = run_cli(*command, *weights)
    assert done.returncode == 0 and "2 cache files written, 0 kept, 0 failed" in done.stderr, done.stderr
    encoder = load_t5(models["t5"], torch.float32, tokenizer=models["tokenizer"])
    for name, caption in (("a", "a red square moves right"), ("b", "a blue circle")):
        stored = load_file(data.parent / "images" / f"{name}_wan_te.safetensors")
        assert stored.keys() == {"varlen_t5_bfloat16"}
        (want,) = encoder.encode([caption])
        torch.testing.assert_close(stored["varlen_t5_bfloat16"].float(), want, rtol=1e-2, atol=1e-2)
    again = run_cli(*command, "--skip_existing", *weights)
    assert again.returncode == 0 and "0 cache files written, 2 kept" in again.stderr


def test_what_is_missing_is_said_before_anything_loads(data: Path, models, monkeypatch, tmp_path: Path):
    assert "--t5 is missing" in error_of(monkeypatch, "--dataset_config", data)
    given = ["--dataset_config", data, "--t5", models["t5"], "--device", "cpu"]
    for path in (data.parent / "images").glob("*.txt"):
        path.unlink()
    assert "none of the 2 images" in error_of(monkeypatch, *given)


def test_weights_of_another_kind_are_refused_by_name(data: Path, models, monkeypatch):
    given = ["--dataset_config", data, "--t5", models["vae"], "--t5_tokenizer", models["tokenizer"], "--device", "cpu"]
    assert str(models["vae"]) in error_of(monkeypatch, *given)
