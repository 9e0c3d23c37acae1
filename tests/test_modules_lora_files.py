"""LoRA files of a generation: patterns, formats, and the DiT that they are merged into as a file."""

import json
import re
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wan_generate_video
from modules.lora_files import LoraFile, LoraOptions
from networks.formats import to_other
from tests import tiny
from tests.test_script_wan_generate_video import arguments
from utils.errors import UserError
from wan.dit_file import PREFIX

NAMES = ("blocks_0_self_attn_q", "blocks_0_ffn_0", "blocks_1_cross_attn_k")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name in NAMES:
        outputs = 192 if "ffn" in name else 96
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, 96, generator=generator)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator) * 0.1
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    path = tmp_path_factory.mktemp("loras") / "lora.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def generate(monkeypatch, models, tmp_path):
    def run(name, dits=(), **options):
        path = tmp_path / f"{name}.safetensors"
        given = {"output_type": "latent", "vae": None, "save_path": path, **options}
        monkeypatch.setattr(sys, "argv", ["wan_generate_video.py", *arguments({**models, **dict(dits)}, **given)])
        wan_generate_video.main()
        return load_file(path)["latent"] if path.exists() else None

    return run


def layers(file):
    return sorted({key.split(".")[0].removeprefix("lora_unet_") for key in file.read()})


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (None, None, NAMES),
        ("attn", None, ("blocks_0_self_attn_q", "blocks_1_cross_attn_k")),
        (None, r"blocks_[12]_", ("blocks_0_ffn_0", "blocks_0_self_attn_q")),
        ("blocks_0", "ffn", ("blocks_0_self_attn_q",)),
        (".*", "nothing", NAMES),
        (r"^lora_unet_blocks_1_.*lora_down\.weight$", None, ("blocks_1_cross_attn_k",)),
    ],
)
def test_patterns_leave_layers_by_their_keys(lora, tmp_path, include, exclude, left):
    patterns = (pattern and re.compile(pattern) for pattern in (include, exclude))
    assert layers(LoraFile(lora, 1.0, *patterns)) == sorted(left)
    other = tmp_path / "other.safetensors"
    save_file(to_other(load_file(lora)), other)
    patterns = (pattern and re.compile(pattern) for pattern in (include, exclude))
    assert layers(LoraFile(other, 1.0, *patterns)) == sorted(left), "whatever the file's own keys are"


def test_each_lora_has_its_own_pattern(lora):
    options = LoraOptions((lora, lora, lora), include_patterns=("attn", ".*"), exclude_patterns=("cross",))
    assert [layers(file) for file in options.files()] == [["blocks_0_self_attn_q"], sorted(NAMES), sorted(NAMES)]


def test_a_pattern_that_leaves_nothing_or_is_none_is_refused(lora):
    (file,) = LoraOptions((lora,), include_patterns=("blocks_7",), exclude_patterns=("ffn",)).files()
    with pytest.raises(UserError, match="--include_patterns blocks_7 and --exclude_patterns ffn: none of the 3 layers"):
        file.read()
    with pytest.raises(UserError, match=r"--exclude_patterns \(: not a regular expression"):
        LoraOptions((lora,), exclude_patterns=("(",)).files()
    with pytest.raises(UserError, match="--include_patterns: 2 for 1 LoRA files"):
        LoraOptions((lora,), include_patterns=("a", "b")).files()


def test_a_lora_in_halves_equals_the_whole(generate, lora):
    whole = generate("whole", lora_weight=[lora], lycoris=True)
    halves = generate("halves", lora_weight=[lora, lora], include_patterns=["attn", "ffn"])
    attention = generate("attention", lora_weight=[lora], include_patterns=["attn"])
    assert torch.equal(whole, halves) and not torch.equal(whole, attention)


# ------------------------------------------------------------------------------------------------------------ merged
def test_a_merged_model_is_the_model_with_its_lora(generate, lora, tmp_path, monkeypatch):
    attached = generate("attached", lora_weight=[lora], lora_multiplier=[0.7], exclude_patterns=["ffn"])
    path = tmp_path / "new" / "merged.safetensors"
    how = {"lora_weight": [lora], "lora_multiplier": [0.7], "exclude_patterns": ["ffn"], "save_merged_model": path}
    with monkeypatch.context() as patch:
        patch.setattr("modules.generation.load_text_encoder", lambda *arguments: pytest.fail("encoded"))
        assert generate("nothing", **how, t5=None, t5_tokenizer=None, prompt=None) is None
    assert torch.equal(generate("merged", dits={"merged": path}, dit="merged"), attached)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert (said["num_heads"], said["task"], said["dit"]) == ("3", "t2v-1.3B", "dit_t2v.safetensors")
    (entry,) = json.loads(said["lora"])
    assert (entry["file"], entry["multiplier"], entry["exclude"]) == ("lora.safetensors", 0.7, "ffn")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_other_names_and_number_formats_are_merged_too(generate, lora, tmp_path, dtype):
    weights, base = tiny.state_dict("dit_t2v"), tmp_path / "base.safetensors"
    linear = {name: tensor.to(dtype) for name, tensor in weights.items() if ".self_attn." in name and tensor.ndim == 2}
    linear |= {
        name: tensor.to(dtype) for name, tensor in weights.items() if ".cross_attn." in name and tensor.ndim == 2
    }
    stored = {f"{PREFIX}{name}": tensor for name, tensor in {**weights, **linear}.items()}
    save_file(stored, base, {"num_heads": "3", "ss_steps": "5", "note": "kept"})
    path = tmp_path / "merged.safetensors"
    generate("none", dits={"base": base}, dit="base", lora_weight=[lora], save_merged_model=path)
    found, parts = load_file(path), load_file(lora)
    assert found.keys() == weights.keys()
    name = "lora_unet_blocks_0_self_attn_q"
    delta = parts[f"{name}.lora_up.weight"] @ parts[f"{name}.lora_down.weight"]
    want = (linear["blocks.0.self_attn.q.weight"].float() + delta).to(torch.bfloat16)
    assert torch.equal(found["blocks.0.self_attn.q.weight"], want)
    assert found["blocks.1.self_attn.q.weight"].dtype == torch.bfloat16
    assert torch.equal(found["blocks.1.self_attn.q.weight"].float(), linear["blocks.1.self_attn.q.weight"].float())
    assert torch.equal(found["head.head.weight"], weights["head.head.weight"])
    with safe_open(path, "pt") as file:
        assert "ss_steps" not in file.metadata() and file.metadata()["note"] == "kept"


def test_what_cannot_be_merged_is_refused(generate, lora, models, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    for options, line in (
        ({"save_merged_model": tmp_path / "a.pth"}, "a.pth: not a .safetensors file. Give the name the suffix"),
        ({"save_merged_model": tmp_path / "folder.safetensors"}, "folder.safetensors: is a folder, not a file"),
        ({"save_merged_model": models["dit_t2v"]}, "is --dit itself"),
        ({"lora_weight": None}, "there is no LoRA to merge"),
        ({"task": "t2v-A14B", "dit_high_noise": models["dit_t2v"]}, "merges one model, --dit_high_noise is another"),
    ):
        given = {"lora_weight": [lora], "save_merged_model": tmp_path / "a.safetensors", **options}
        with pytest.raises(UserError, match=line):
            generate("none", **given)
