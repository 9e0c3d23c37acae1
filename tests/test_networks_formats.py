"""Key names of LoRA files and the deltas they stand for, held against recorded files and dense formulas."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from networks.formats import (
    added_shapes,
    deltas,
    detect_format,
    layer_path,
    read_lora,
    to_default,
    to_other,
    weight_deltas,
    with_hashes,
)
from utils.errors import UserError
from utils.safetensors_io import read_metadata


def _same(got, want):
    assert sorted(got) == sorted(want)
    for key, value in want.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


def test_conversions_give_the_recorded_files_bit_by_bit(golden):
    _same(
        to_other(load_file(golden / "lora_t2v_upstream.safetensors")), load_file(golden / "lora_t2v_other.safetensors")
    )
    _same(to_default(load_file(golden / "lora_t2v_other.safetensors")), load_file(golden / "lora_t2v_back.safetensors"))


def test_the_prefix_of_dotted_keys_can_be_chosen(golden, recipe):
    names = json.loads((golden / "lora_names.json").read_text())
    upstream = load_file(golden / "lora_t2v_upstream.safetensors")
    assert sorted(to_other(upstream, "transformer")) == names["convert/transformer_prefix_keys"]
    assert sorted(to_other(recipe.state_dict("lora_i2v"))) == names["convert/i2v_other_keys"]


def test_hashes_are_those_that_the_file_was_saved_with(golden):
    path = golden / "lora_t2v_upstream.safetensors"
    metadata = read_metadata(path)
    assert (
        with_hashes(load_file(path), {key: value for key, value in metadata.items() if "hash" not in key}) == metadata
    )


@pytest.mark.parametrize(
    "path",
    [
        "blocks.3.self_attn.o",
        "blocks.10.cross_attn.k_img",
        "blocks.0.cross_attn.norm_k_img",
        "blocks.0.ffn.2",
        "time_projection.1",
        "text_embedding.0",
        "patch_embedding",
        "img_emb.proj.3",
        "head.head",
    ],
)
def test_layer_names_with_underscores_are_read_back(path):
    assert layer_path("lora_unet_" + path.replace(".", "_")) == path


def test_every_format_gives_the_same_deltas(recipe):
    default = recipe.state_dict("lora_i2v")
    other = to_other(default)
    diffusers = {_diffusers_name(key): value for key, value in other.items()}
    peft = {
        key.replace("diffusion_model", "base_model.model").replace(".weight", ".default.weight"): value
        for key, value in other.items()
    }
    bare = {key.removeprefix("diffusion_model."): value for key, value in other.items()}
    want = deltas([(default, 1.0, "default")])
    assert len(want) == 24 and "blocks.0.cross_attn.k_img.weight" in want
    for state_dict in (other, diffusers, peft, bare):
        got = deltas([(state_dict, 1.0, "converted")])
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key](), want[key](), rtol=1e-5, atol=1e-7)
    assert [detect_format(list(x)) for x in (default, other, diffusers)] == ["default", "other", "diffusers"]
    assert detect_format(["blocks.0.ffn.0.weight"]) is None


def _diffusers_name(key):
    table = {
        "diffusion_model.": "transformer.",
        "self_attn.": "attn1.to_",
        "cross_attn.": "attn2.to_",
        "to_k_img": "add_k_proj",
        "to_v_img": "add_v_proj",
        "to_o.": "to_out.0.",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
    }
    for ours, theirs in table.items():
        key = key.replace(ours, theirs)
    return key


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_merged_weights_are_the_recorded_ones(recipe, kind):
    weights, lora, cases = (
        recipe.state_dict(f"dit_{kind}"),
        recipe.state_dict(f"lora_{kind}"),
        recipe.cases(f"lora_{kind}"),
    )
    for case, multipliers in (("merged", [0.8]), ("merged_twice", [0.8, -0.3])):
        added = deltas([(lora, multiplier, "lora") for multiplier in multipliers])
        outputs = cases[case]["outputs"]
        assert len(outputs) > 0
        for key, want in outputs.items():
            got = weights[key[7:]] + added[key[7:]]()
            assert float((got - want).norm() / want.norm()) <= 1e-6


def test_several_files_add_up(recipe, tmp_path):
    from utils.safetensors_io import save_file_atomically

    lora = recipe.state_dict("lora_t2v")
    save_file_atomically(lora, tmp_path / "a.safetensors")
    save_file_atomically(to_other(lora), tmp_path / "b.safetensors")
    both = weight_deltas([(tmp_path / "a.safetensors", 1.0), (tmp_path / "b.safetensors", 0.5)])
    one = deltas([(lora, 1.5, "lora")])
    assert both.keys() == one.keys()
    for key in one:
        torch.testing.assert_close(both[key](), one[key](), rtol=1e-5, atol=1e-7)


def test_loha_is_the_elementwise_product_of_two_low_rank_matrices():
    parts = {"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (6, 2), "w2_b": (2, 5)}
    weights = {f"lora_unet_blocks_0_ffn_0.hada_{name}": torch.randn(shape) for name, shape in parts.items()}
    a, b, c, d = weights.values()
    weights["lora_unet_blocks_0_ffn_0.alpha"] = torch.tensor(3.0)
    (delta,) = deltas([(weights, 2.0, "loha")]).values()
    torch.testing.assert_close(delta(), 2.0 * (a @ b) * (c @ d) * 3 / 2)


@pytest.mark.parametrize("full", [True, False])
def test_lokr_is_a_kronecker_product_scaled_only_where_it_is_of_low_rank(full):
    name = "lora_unet_blocks_0_ffn_0"
    w1, a, b = torch.randn(2, 3), torch.randn(4, 2), torch.randn(2, 5)
    second = {"lokr_w2": a @ b} if full else {"lokr_w2_a": a, "lokr_w2_b": b}
    weights = {f"{name}.{part}": value for part, value in {"lokr_w1": w1, **second, "alpha": torch.tensor(1.0)}.items()}
    (delta,) = deltas([(weights, 1.0, "lokr")]).values()
    torch.testing.assert_close(delta(), torch.kron(w1, a @ b) * (1.0 if full else 0.5))


def test_plain_differences_of_weights_and_biases_are_added_and_survive_conversion():
    weights = {
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(4),
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.ones(3),
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.ones(1, 2),
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.ones(4, 1),
    }
    back = to_other(to_default(weights))
    for state_dict in (weights, back):
        added = deltas([(state_dict, 0.5, "lora")])
        assert sorted(added) == [
            "blocks.0.cross_attn.norm_k_img.weight",
            "blocks.0.ffn.0.bias",
            "blocks.0.ffn.0.weight",
        ]
        assert torch.equal(added["blocks.0.ffn.0.bias"](), torch.full((4,), 0.5))
        assert torch.equal(added["blocks.0.ffn.0.weight"](), torch.full((4, 2), 0.5))


def test_a_convolutions_factors_give_a_delta_in_the_shape_of_its_weight():
    down, up = torch.randn(2, 3, 1, 2, 2), torch.randn(5, 2, 1, 1, 1)
    weights = {"lora_unet_patch_embedding.lora_down.weight": down, "lora_unet_patch_embedding.lora_up.weight": up}
    (delta,) = deltas([(weights, 1.0, "lora")]).values()
    torch.testing.assert_close(delta(), torch.einsum("or...,rcfhw->ocfhw", up[..., 0, 0, 0], down))


def test_what_is_no_lora_is_refused_and_what_is_no_part_of_one_is_named(recipe, tmp_path, caplog):
    with pytest.raises(UserError, match=r"lora.safetensors: not a LoRA: none of its \d+ tensors is a LoRA's, e.g. "):
        deltas([(recipe.state_dict("dit_t2v"), 1.0, "--lora_weight lora.safetensors")])
    with pytest.raises(UserError, match="is a DoRA, which is not supported"):
        deltas(
            [({"blocks.0.ffn.0.lora_A.weight": torch.ones(1, 2), "blocks.0.ffn.0.dora_scale": torch.ones(2)}, 1, "x")]
        )
    with pytest.raises(UserError, match="blocks.0.ffn.0: incomplete, it has only lora_down.weight. Use a complete"):
        deltas([({"blocks.0.ffn.0.lora_A.weight": torch.ones(1, 2)}, 1.0, "x")])
    to_default({**recipe.state_dict("lora_t2v"), "blocks.0.norm3.weight": torch.ones(1)}, "--input x")
    assert "--input x: 1 tensors are no part of a LoRA and ignored, e.g. blocks.0.norm3.weight" in caplog.text


def _layer(down=(4, 96), up=(96, 4), alpha=2.0, value=0.1, name="lora_unet_blocks_0_self_attn_q"):
    factors = {"lora_down.weight": torch.full(down, value), "lora_up.weight": torch.full(up, value)}
    return {f"{name}.{part}": tensor for part, tensor in {**factors, "alpha": torch.tensor(alpha)}.items()}


@pytest.mark.parametrize("use", [to_default, to_other, lambda layer: deltas([(layer, 1.0, "LoRA")])])
@pytest.mark.parametrize("layer", [_layer(up=(96, 3)), _layer(down=()), _layer(alpha=[2.0, 3.0])])
def test_parts_of_a_layer_that_do_not_fit_each_other_are_named_with_their_sizes(layer, use):
    with pytest.raises(UserError, match=r"blocks.0.self_attn.q: parts that do not fit .* lora_up.weight \[96, \d\]"):
        use(layer)


def test_a_factor_without_the_other_is_an_error_in_conversion_too():
    layer = {key: tensor for key, tensor in _layer().items() if "lora_up" not in key}
    with pytest.raises(UserError, match="blocks.0.self_attn.q: incomplete, it has only alpha, lora_down.weight"):
        to_other(layer)


def test_an_alpha_that_cannot_be_folded_in_is_an_error_and_not_nan():
    with pytest.raises(UserError, match="alpha is -2"):
        to_other(_layer(alpha=-2.0))


def test_the_prefix_may_end_with_a_dot_or_be_empty():
    keys = [list(to_other(_layer(), prefix))[0] for prefix in ("transformer", "transformer.", "")]
    path = "blocks.0.self_attn.q.lora_A.weight"
    assert keys == [f"transformer.{path}", f"transformer.{path}", path]


def test_a_lora_whose_training_diverged_is_refused(tmp_path):
    save_file(_layer(value=float("nan")), tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"--lora_weight .*nan.safetensors: .*lora_down.weight has values that are not"):
        weight_deltas([(tmp_path / "nan.safetensors", 1.0)])


def test_a_file_that_is_no_lora_is_refused_before_its_tensors_are_read(recipe, tmp_path, monkeypatch):
    save_file(recipe.state_dict("dit_t2v"), tmp_path / "dit.safetensors")
    monkeypatch.setattr("utils.safetensors_io.TensorFile.get", lambda self, key: pytest.fail(f"{key} was read"))
    with pytest.raises(UserError, match="not a LoRA: none of its"):
        read_lora(tmp_path / "dit.safetensors", "--lora_weight")


def test_shapes_of_deltas_are_known_without_computing_them(recipe):
    state_dict = {**recipe.state_dict("lora_i2v"), "lora_unet_blocks_0_ffn_0.diff_b": torch.zeros(7)}
    want = {name: tuple(delta().shape) for name, delta in deltas([(state_dict, 1.0, "LoRA")]).items()}
    assert added_shapes(state_dict, "LoRA") == want and want["blocks.0.ffn.0.bias"] == (7,)
