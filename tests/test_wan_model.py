"""The DiT against the official code's recorded outputs, against diffusers, and against itself."""

import hashlib

import pytest
import torch
from torch import Tensor, nn

from examples.tiny_world.recipe import WEIGHTS
from tests import tiny
from tests.diffusers_dit import diffusers_dit, padded
from wan.checkpointing import save_memory
from wan.configs import TASKS
from wan.loading import build_dit, load_dit
from wan.model import WanModel, WanShape, sinusoid


def distance(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def random_inputs(model: WanModel, batch: int = 1, grid=(3, 6, 8), rows=(9, 70), seed: int = 0) -> dict:
    """Return arguments for forward() of any kind of model."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = model.shape
    more = shape.in_channels - 16
    pictures = 2 if shape.image_tokens else 1
    return {
        "x": noise(batch, 16, *grid),
        "timestep": torch.linspace(30.5, 970, batch) if batch > 1 else torch.tensor([617.25]),
        "text": [noise(rows[i % len(rows)], shape.text_dim) for i in range(batch)],
        "y": noise(batch, more, *grid) if more else None,
        "image_features": noise(batch * pictures, 257, shape.clip_dim) if shape.clip_dim else None,
    }


def model_of(kind: str, dtype: torch.dtype = torch.float32, **sizes: int) -> WanModel:
    return build_dit(tiny.state_dict(kind, **sizes), heads=3, dtype=dtype)


# --------------------------------------------------------------------------------------------- the official code
NOT_MATCHED = {"one_musubi", "no_clip", "batch2_bf16"}  # recorded to recognise errors of another implementation


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "fun"])
@torch.no_grad()
def test_the_velocity_is_that_of_the_official_code(golden, recipe, kind):
    model = build_dit(recipe.state_dict(f"dit_{kind}", golden), heads=3)
    cases = {name: case for name, case in recipe.cases(f"dit_{kind}", golden).items() if name not in NOT_MATCHED}
    for name, case in cases.items():
        given = case["inputs"]
        rows = [[i] for i in range(len(given["x"]))] if name == "padded_batch" else [list(range(len(given["x"])))]
        for row in rows:
            out = model(
                torch.stack([given["x"][i] for i in row]),
                given["t"][row],
                [given["context"][i] for i in row],
                torch.stack(given["y"]) if "y" in given else None,
                given.get("clip_fea"),
                given.get("f_indices"),
                given.get("skip_block_indices") or (),
            )
            for i, velocity in zip(row, out, strict=True):
                assert distance(velocity, case["outputs"][f"out_{i}"]) <= 5e-6, name


@pytest.mark.parametrize("kind", ["dit_flf2v", "dit_i2v"])
@torch.no_grad()
def test_the_second_picture_can_be_seen_as_text_as_musubi_tuner_does(golden, recipe, kind):
    """Its prediction of a model for two pictures is that; a model for one has none to see so."""
    model = build_dit(recipe.state_dict(kind, golden), heads=3)
    model.second_picture_as_text = True
    case = recipe.cases(kind, golden)["one_musubi" if kind == "dit_flf2v" else "one"]
    given = case["inputs"]
    for reused in (False, True):  # with keys and values that are kept, as in generation
        context = model.context(given["context"], given["clip_fea"], reused)
        velocity = model(torch.stack(given["x"]), given["t"], context, y=torch.stack(given["y"]))
        assert distance(velocity[0], case["outputs"]["out_0"]) <= 5e-6


@torch.no_grad()
def test_in_bfloat16_it_is_closer_to_float32_than_the_official_code(golden, recipe):
    model = build_dit(recipe.state_dict("dit_t2v", golden), heads=3, dtype=torch.bfloat16)
    cases = recipe.cases("dit_t2v", golden)
    given = cases["batch2"]["inputs"]
    out = model(torch.stack(given["x"]), given["t"], given["context"])
    theirs = cases["batch2_bf16"]["relative_error_to_fp32"]["official_fp32_weights_autocast"]
    for i, error in enumerate(theirs):
        assert distance(out[i], cases["batch2"]["outputs"][f"out_{i}"]) <= error


@pytest.mark.parametrize("width", [64, 256])
def test_the_timestep_embedding_is_that_of_the_official_code(golden, recipe, width):
    case = recipe.cases("dit_parts", golden)[f"timestep_embedding_{width}"]
    assert (sinusoid(case["inputs"]["t"], width) - case["outputs"]["out"]).abs().max() <= 1e-6


DIGESTS = {
    "t2v-1.3B": "9269f8db9040a9d860eaca435be61814",
    "t2v-14B": "aafcfd9672c3a2456dc46e1cb6e52c70",
    "i2v-14B": "6bfcfb3b342cb286ce886889d519a77e",
    "flf2v-14B": "3ef3b1f8e1dab83d5b71fd7b617f859f",
    "t2v-1.3B-FC": "349723183fc063b2bfc10bb2835cf677",
    "t2v-14B-FC": "efa44cddf936c70abd0ea28b6cbe946c",
    "i2v-A14B": "5b013604280dd715f8457c6ed6d6a626",
}


@pytest.mark.parametrize("task", DIGESTS)
def test_names_and_shapes_are_those_of_the_published_file(task):
    config = TASKS[task]
    shape = WanShape(
        *(config.dim, config.ffn_dim, config.heads, config.blocks, config.in_channels),
        clip_dim=1280 if config.clip else None,
        image_tokens=514 if len(config.images) == 2 else None,
    )
    with torch.device("meta"):
        tensors = WanModel(shape).state_dict()
    lines = [text for name, x in tensors.items() for text in (name, f"{name}:{'_'.join(map(str, x.shape))}")]
    assert hashlib.md5(",".join(sorted(lines)).encode()).hexdigest() == DIGESTS[task]


# -------------------------------------------------------------------------------------------------- diffusers
@pytest.mark.parametrize(
    "kind, heads, sizes, grid",
    [
        ("dit_t2v", 2, {"dim": 256, "ffn": 320, "blocks": 3, "text": 48}, (5, 6, 10)),
        ("dit_t2v", 4, {"dim": 96, "ffn": 128, "blocks": 1, "text": 32}, (1, 16, 4)),
        ("dit_i2v", 3, {"dim": 144, "ffn": 256, "blocks": 2, "text": 40}, (2, 8, 6)),
        ("dit_flf2v", 1, {"dim": 128, "ffn": 96, "blocks": 2, "text": 64}, (3, 4, 8)),
    ],
)
@torch.no_grad()
def test_the_velocity_is_that_of_diffusers_at_other_sizes(kind, heads, sizes, grid):
    weights = tiny.state_dict(kind, seed=sum(sizes.values()), **sizes)
    model = build_dit(weights, heads)
    given = random_inputs(model, batch=2, grid=grid, seed=heads)
    x = given["x"] if given["y"] is None else torch.cat([given["x"], given["y"]], dim=1)
    theirs = diffusers_dit(weights, model.shape)(
        x, given["timestep"], padded(given["text"]), given["image_features"], return_dict=False
    )[0]
    assert distance(model(**given), theirs) <= 5e-6


# ----------------------------------------------------------------------------------------------- against itself
KINDS = ["dit_t2v", "dit_i2v", "dit_flf2v", "dit_fun", "dit_i2v_a14b"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one(kind):
    model = model_of(kind)
    given = random_inputs(model, batch=2)
    both = model(**given)
    assert both.dtype == torch.float32 and both.shape == given["x"].shape
    pictures = len(given["image_features"]) // 2 if given["image_features"] is not None else 0
    for i in range(2):
        single = model(
            given["x"][i : i + 1],
            given["timestep"][i : i + 1],
            given["text"][i : i + 1],
            None if given["y"] is None else given["y"][i : i + 1],
            given["image_features"][i * pictures : (i + 1) * pictures] if pictures else None,
        )
        assert distance(both[i], single[0]) <= 2e-6


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("lengths", [(3, 40), (1, 510), (511, 7), (512, 5)])
@torch.no_grad()
def test_a_prompt_is_the_same_with_rows_of_zeros_behind_it(lengths, split):
    """One row of padding that counts for all is what 512 rows written out are."""
    model = model_of("dit_t2v")
    model.split_attn = split
    given = random_inputs(model, batch=2)
    given["text"] = [torch.randn(length, 64) for length in lengths]
    shorter = model(**given)
    given["text"] = list(padded(given["text"], 512))
    assert distance(model(**given), shorter) <= 2e-6
    given["text"][1][lengths[1] - 1] += 1
    assert distance(model(**given), shorter) > 1e-5


@pytest.mark.parametrize("kind", ["dit_i2v", "dit_flf2v", "dit_fun"])
@torch.no_grad()
def test_no_picture_is_a_picture_whose_features_are_zeros(kind):
    model = model_of(kind)
    given = random_inputs(model, batch=2)
    with_picture = model(**given)
    given["image_features"] = torch.zeros_like(given["image_features"])
    zeros = model(**given)
    given["image_features"] = None
    assert torch.equal(model(**given), zeros)
    assert distance(zeros, with_picture) > 1e-4


@torch.no_grad()
def test_frame_indices_move_frames_in_time_for_each_video_apart():
    model = model_of("dit_i2v")
    given = random_inputs(model, batch=2)
    usual = model(**given)
    assert torch.equal(model(**given, frame_indices=torch.tensor([[0, 1, 2], [0, 1, 2]])), usual)
    moved = model(**given, frame_indices=[[0, 1, 2], [0, 1, 9]])
    assert distance(moved[0], usual[0]) <= 1e-6
    assert distance(moved[1], usual[1]) > 1e-4
    # Only differences of positions count.
    later = model(**given, frame_indices=[[5, 6, 7], [3, 4, 12]])
    assert distance(later, moved) <= 1e-5


@torch.no_grad()
def test_a_skipped_block_is_as_if_it_were_not_there():
    weights = tiny.state_dict("dit_t2v", blocks=3)
    model = build_dit(weights, heads=3)
    renamed = {name.replace("blocks.2.", "blocks.1."): x for name, x in weights.items() if "blocks.1." not in name}
    given = random_inputs(model)
    assert torch.equal(model(**given, skip_blocks=[1]), build_dit(renamed, heads=3)(**given))


@torch.no_grad()
def test_attention_one_sample_at_a_time_gives_the_same_velocity():
    model = model_of("dit_i2v")
    given = random_inputs(model, batch=2)
    whole = model(**given)
    model.split_attn = True
    torch.testing.assert_close(model(**given), whole)


@torch.no_grad()
def test_weights_in_half_precision_leave_time_norms_and_head_in_float32():
    seen = {}
    model = model_of("dit_i2v", torch.bfloat16)
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out.dtype))
    velocity = model(**random_inputs(model))
    assert velocity.dtype == torch.float32 and model.dtype == torch.bfloat16
    exact = {name for name, dtype in seen.items() if dtype == torch.float32}
    times = {"time_embedding.0", "time_embedding.1", "time_embedding.2", "time_projection.0", "time_projection.1"}
    assert exact == times | {"head.head"}
    assert seen["blocks.0.self_attn.q"] == seen["blocks.1.ffn.2"] == torch.bfloat16
    norm, x = model.blocks[0].norm3, 100 + torch.randn(1, 3, 96)  # in bfloat16 nearly all of it would be rounded off
    in_float32 = torch.nn.functional.layer_norm(x, (96,), norm.weight.float(), norm.bias.float(), norm.eps)
    assert torch.equal(norm(x, torch.bfloat16), in_float32.bfloat16())


@torch.no_grad()
def test_float16_stays_within_its_rounding_of_float32():
    exact, half = model_of("dit_i2v"), model_of("dit_i2v", torch.float16)
    given = random_inputs(exact)
    assert distance(half(**given), exact(**given)) < 2e-3


class Branch(nn.Module):
    """The low-rank branch of a linear layer, attached by taking over its forward."""

    def __init__(self, layer: nn.Linear, generator: torch.Generator):
        super().__init__()
        self.down = nn.Parameter(torch.randn(4, layer.in_features, generator=generator) * 0.05)
        self.up = nn.Parameter(torch.randn(layer.out_features, 4, generator=generator) * 0.05)
        self.original, layer.forward = layer.forward, self.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x) + x @ self.down.to(x).T @ self.up.to(x).T


def trained_gradients(model: WanModel, given: dict) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of a step and the gradients of branches on every linear layer of the blocks."""
    generator = torch.Generator().manual_seed(3)
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    branches = nn.ModuleList(Branch(layer, generator) for layer in layers)
    loss = model(**given).square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in branches.parameters()]


@pytest.mark.parametrize(
    "kind, dtype", [("dit_t2v", torch.float32), ("dit_i2v", torch.float32), ("dit_t2v", torch.bfloat16)]
)
def test_checkpointed_gradients_are_the_gradients_although_the_model_is_frozen(kind, dtype):
    plain, saving = model_of(kind, dtype), model_of(kind, dtype)
    assert not any(parameter.requires_grad for parameter in saving.parameters())
    save_memory(saving, checkpointing=True)
    given = random_inputs(plain, batch=2)
    (loss, gradients), (same_loss, same) = trained_gradients(plain, given), trained_gradients(saving, given)
    assert torch.equal(loss, same_loss)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    for gradient, other in zip(gradients, same, strict=True):
        assert torch.equal(gradient, other)


def test_checkpointing_runs_each_block_again_in_the_backward_pass():
    model = model_of("dit_t2v")
    save_memory(model, checkpointing=True)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(0))
    with torch.no_grad():
        model(**random_inputs(model))
    assert len(calls) == 1
    trained_gradients(model, random_inputs(model))
    assert len(calls) == 3


def test_a_sample_drawn_in_inference_mode_does_not_disturb_training():
    model = model_of("dit_t2v")
    given = random_inputs(model)
    with torch.inference_mode():
        model(**given)
    _, gradients = trained_gradients(model, given)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_rotary_factors_of_a_grid_are_computed_once(monkeypatch):
    model = model_of("dit_t2v")
    given = random_inputs(model)
    with torch.no_grad():
        model(**given)
        model(**given)
    assert model._rope_factors.cache_info().misses == 1


@pytest.mark.parametrize("kind", ["dit_t2v", "dit_flf2v"])
@torch.no_grad()
def test_what_a_video_should_show_is_computed_once_for_all_steps(kind):
    model, calls = model_of(kind), []
    given = random_inputs(model, batch=2)
    expected = model(**given)
    for name, layer in model.named_modules():
        if name.endswith(("cross_attn.k", "cross_attn.v_img", "text_embedding", "img_emb")):
            layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    context = model.context(given.pop("text"), given.pop("image_features"), reused=True)
    for _ in range(3):
        assert torch.equal(model(**given, text=context), expected)
    assert len(calls) == len(set(calls)) == (3 if kind == "dit_t2v" else 6)


@torch.no_grad()
def test_a_video_of_many_tokens_keeps_no_keys():
    model = model_of("dit_t2v")
    given = random_inputs(model, grid=(3, 16, 16), rows=(3,))
    context = model.context(given["text"], reused=True)
    assert torch.equal(model(given["x"], given["timestep"], context), model(**given))
    assert context.keys_values == {}


@torch.no_grad()
def test_a_residual_stream_in_bfloat16_is_half_the_memory_for_twice_the_rounding_of_a_bfloat16_dit():
    def load(dtype, residual_dtype):
        return load_dit(WEIGHTS / "dit_t2v.safetensors", TASKS["t2v-1.3B"], dtype, "cpu", residual_dtype=residual_dtype)

    bf16 = torch.bfloat16
    exact, half, both = load(torch.float32, torch.float32), load(bf16, torch.float32), load(bf16, bf16)
    given = random_inputs(exact, batch=4, grid=(5, 8, 8), rows=(20, 9, 16, 40))
    velocity = exact(**given)
    alone, together = distance(half(**given), velocity), distance(both(**given), velocity)
    assert 1e-3 < alone < 0.7 * together < 0.7 * 2e-2
    assert exact.token_bytes(given["x"]) == 2 * both.token_bytes(given["x"])
