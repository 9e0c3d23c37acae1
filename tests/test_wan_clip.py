import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests import tiny
from utils.errors import UserError
from wan.clip import MEAN, STD, ImageEncoder, build_clip, clip_config, empty_clip, load_clip


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def small(seed=0, width=48, layers=3, ffn=80):
    return tiny.random_weights(tiny.clip_shapes(width, layers, ffn), seed)


def transformers_twin(official, heads):
    """transformers' model of all layers, filled from the official weights by a table of its own."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    width = official["visual.cls_embedding"].shape[-1]
    layers = 1 + max(int(key.split(".")[2]) for key in official if key.startswith("visual.transformer."))
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=official["visual.transformer.0.mlp.0.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )
    model = CLIPVisionModel(config).eval()
    weights = {
        "embeddings.class_embedding": official["visual.cls_embedding"].flatten(),
        "embeddings.position_embedding.weight": official["visual.pos_embedding"][0],
        "embeddings.patch_embedding.weight": official["visual.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        weights[f"pre_layrnorm.{kind}"] = official[f"visual.pre_norm.{kind}"]
        weights[f"post_layernorm.{kind}"] = official[f"visual.post_norm.{kind}"]
        for i in range(layers):
            ours, theirs = f"visual.transformer.{i}", f"encoder.layers.{i}"
            for part, rows in zip("qkv", official[f"{ours}.attn.to_qkv.{kind}"].chunk(3), strict=True):
                weights[f"{theirs}.self_attn.{part}_proj.{kind}"] = rows
            weights[f"{theirs}.self_attn.out_proj.{kind}"] = official[f"{ours}.attn.proj.{kind}"]
            weights[f"{theirs}.layer_norm1.{kind}"] = official[f"{ours}.norm1.{kind}"]
            weights[f"{theirs}.layer_norm2.{kind}"] = official[f"{ours}.norm2.{kind}"]
            weights[f"{theirs}.mlp.fc1.{kind}"] = official[f"{ours}.mlp.0.{kind}"]
            weights[f"{theirs}.mlp.fc2.{kind}"] = official[f"{ours}.mlp.2.{kind}"]
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    model.load_state_dict({prefix + name: tensor for name, tensor in weights.items()}, strict=True)
    return model


def preprocessed(pixels):
    resized = F.interpolate(pixels, size=(224, 224), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (resized * 0.5 + 0.5 - mean) / std


# ------------------------------------------------------------------------------------------------ against others
def test_recorded_features_are_reproduced(recipe, golden):
    model = build_clip(recipe.state_dict("clip", golden), heads=4)
    encoder = ImageEncoder(model)
    cases = recipe.cases("clip", golden)
    for name in ("small", "same_size", "tall"):
        got = encoder.encode(cases[name]["inputs"]["image"][:, 0][None])
        assert error(got, cases[name]["outputs"]["features"].reshape(got.shape)) < 1e-5, name
    with torch.no_grad():
        got = model(pixel_values=cases["preprocessed"]["inputs"]["pixels"]).last_hidden_state
    for k, features in enumerate(got):
        assert error(features, cases["preprocessed"]["outputs"][f"features_{k}"].reshape(257, -1)) < 1e-5


def test_float16_is_not_further_from_the_truth_than_the_original(recipe, golden):
    encoder = ImageEncoder(build_clip(recipe.state_dict("clip", golden), torch.float16, heads=4))
    cases = recipe.cases("clip", golden)
    got = encoder.encode(cases["small_fp16"]["inputs"]["image"][:, 0][None])
    assert got.dtype == torch.float16
    want = cases["small"]["outputs"]["features"].reshape(got.shape)
    assert error(got, want) <= 1.05 * cases["small_fp16"]["relative_error_to_fp32"]


@pytest.mark.parametrize(
    ("seed", "width", "layers", "heads", "size"), [(0, 48, 3, 3, (30, 50)), (1, 80, 2, 5, (224, 300))]
)
def test_transformers_gives_the_same_features_before_its_last_layer(seed, width, layers, heads, size):
    official = small(seed, width, layers)
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    with torch.no_grad():
        reference = transformers_twin(official, heads)
        want = reference(pixel_values=preprocessed(pixels), output_hidden_states=True).hidden_states[-2]
    assert error(ImageEncoder(build_clip(official, heads=heads)).encode(pixels), want) < 1e-5


def test_official_and_transformers_names_give_the_same_bits():
    official = small()
    theirs = {name.removeprefix("vision_model."): t for name, t in transformers_twin(official, 4).state_dict().items()}
    text = {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2), "logit_scale": torch.zeros(())}
    variants = {
        "with text tower": official | {"textual.token_embedding.weight": torch.zeros(4, 4)},
        "plain": theirs | {"visual_projection.weight": torch.zeros(4, 48)},
        "prefixed": {f"vision_model.{name}": tensor for name, tensor in theirs.items()} | text,
        "with position ids": theirs | {"embeddings.position_ids": torch.arange(257)[None]},
    }
    pixels = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    want = ImageEncoder(build_clip(official, heads=4)).encode(pixels)
    for name, weights in variants.items():
        assert torch.equal(ImageEncoder(build_clip(weights, heads=4)).encode(pixels), want), name


def test_the_published_shapes_give_the_published_model():
    table = tiny.clip_shapes(width=1280, layers=32, ffn=5120)
    weights = {key: torch.empty(shape, device="meta") for key, shape in table.items()}
    twin = {
        name: shape
        for name, shape in named_shapes(weights).items()
        if not name.startswith(("encoder.layers.31.", "post_layernorm"))
    }
    config = clip_config(named_shapes(weights))
    assert (config.num_attention_heads, config.num_hidden_layers, config.intermediate_size) == (16, 31, 5120)
    assert (config.image_size, config.patch_size, config.hidden_act) == (224, 14, "gelu")
    model = empty_clip(config)
    names = {name.removeprefix("vision_model."): tuple(t.shape) for name, t in model.state_dict().items()}
    assert names == twin
    assert round(sum(tensor.numel() for tensor in model.state_dict().values()) / 1e6) == 611


def named_shapes(weights):
    from wan.clip import ImageTower
    from wan.weights import InMemory

    return ImageTower(InMemory(weights)).shapes()


# ---------------------------------------------------------------------------------------------------- properties
def test_pictures_are_resized_whole_without_clamping_or_cropping():
    encoder = ImageEncoder(build_clip(small(), heads=4))
    seen = []
    encoder.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    features = encoder.encode(pixels)
    assert features.shape == (1, 257, 48)
    torch.testing.assert_close(seen[0]["pixel_values"], preprocessed(pixels))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    restored = seen[0]["pixel_values"] * std + mean
    assert restored.min() < -0.05 and restored.max() > 1.05  # the cubic's overshoot


def test_the_number_of_heads_comes_from_the_file_or_is_one_per_80_channels(tmp_path):
    pixels = torch.zeros(1, 3, 4, 4)
    wide = small(width=160)
    save_file(wide, tmp_path / "plain.safetensors")
    save_file(wide, tmp_path / "named.safetensors", {"num_heads": "5"})
    for name, heads in (("plain", 2), ("named", 5)):
        loaded = load_clip(tmp_path / f"{name}.safetensors", torch.float32)
        assert torch.equal(loaded.encode(pixels), ImageEncoder(build_clip(wide, heads=heads)).encode(pixels))


# --------------------------------------------------------------------------------------------------------- files
def test_pth_and_safetensors_load_the_same(tmp_path):
    weights = small(width=80)
    torch.save(weights, tmp_path / "clip.pth")
    save_file(weights, tmp_path / "clip.safetensors")
    pixels = torch.zeros(1, 3, 16, 16)
    first, second = (load_clip(tmp_path / f"clip.{suffix}", torch.float32) for suffix in ("pth", "safetensors"))
    assert torch.equal(first.encode(pixels), second.encode(pixels))
    assert not any(p.requires_grad for p in first.model.parameters())


def test_the_default_is_float16(models):
    assert load_clip(models["clip"]).encode(torch.zeros(1, 3, 16, 16)).dtype == torch.float16


@pytest.mark.parametrize(("kind", "name"), [("dit_i2v", "a Wan DiT"), ("vae", "the Wan2.1 VAE"), ("t5", "a T5")])
def test_another_model_is_refused_by_its_name(models, kind, name):
    with pytest.raises(UserError, match=f"--clip .*this seems to be {name}.*, not the CLIP image encoder"):
        load_clip(models[kind])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("visual.transformer.1.mlp.2.bias"), "1 missing: encoder.layers.1.mlp.fc2.bias"),
        (lambda w: w.update({"visual.transformer.0.attn.extra": torch.zeros(1)}), "1 unexpected: visual.transformer.0"),
        (lambda w: w.pop("visual.pos_embedding"), "embeddings.position_embedding.weight missing"),
        (lambda w: w.update({"visual.pre_norm.bias": torch.zeros(2)}), "1 of the wrong shape: pre_layrnorm.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named_in_one_line(change, message):
    weights = small()
    change(weights)
    with pytest.raises(UserError, match=message) as caught:
        build_clip(weights, heads=4)
    assert "\n" not in str(caught.value)


def test_a_clip_of_another_width_is_refused():
    with pytest.raises(UserError, match="another CLIP model, 1030 channels wide instead of 1280"):
        build_clip(small(width=1030, layers=2, ffn=8))
