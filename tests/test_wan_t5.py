import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.live_bytes import LiveBytes
from tests.test_wan_auto_swap import Small
from tests.test_wan_block_swap import Late
from utils.errors import UserError
from wan.block_swap import AUTO
from wan.t5 import (
    BLOCK_NAMES,
    NAMES,
    TextEncoder,
    build_t5,
    empty_t5,
    encoding_bytes,
    load_t5,
    t5_config,
    transformers_names,
)
from wan.tokenizer import load_tokenizer
from wan.weights import InMemory

PROMPTS = ["a red circle moves left", "the star", "green square turns slowly and a blue triangle moves up fast"]


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def run(model, ids, lengths):
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        rows = model(input_ids=torch.where(mask.bool(), ids, 0), attention_mask=mask).last_hidden_state
    return [row[:n] for row, n in zip(rows, lengths, strict=True)]


def official_name(name: str) -> str:
    """The key tables read backwards."""
    if not name.startswith("encoder.block."):
        return {theirs: ours for ours, theirs in NAMES.items()}[name.removesuffix(".weight")] + ".weight"
    _, _, number, layer = name.removesuffix(".weight").split(".", 3)
    return f"blocks.{number}.{ {theirs: ours for ours, theirs in BLOCK_NAMES.items()}[layer] }.weight"


def random_reference(seed=0, **sizes):
    """A transformers model of its own making, with distinct random weights everywhere."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    defaults = {"vocab_size": 90, "d_model": 48, "d_kv": 8, "num_heads": 5, "d_ff": 72, "num_layers": 3}
    config = UMT5Config(**(defaults | sizes), feed_forward_proj="gated-gelu", attn_implementation="eager")
    model = UMT5EncoderModel(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1) + (parameter.ndim == 1)
    return model


# ------------------------------------------------------------------------------------------------ against others
def test_recorded_features_are_reproduced(recipe, golden):
    model = build_t5(recipe.state_dict("t5", golden))
    for name, case in recipe.cases("t5", golden).items():
        if name in ("padded_bf16", "relative_buckets"):
            continue
        for k, row in enumerate(run(model, case["inputs"]["ids"], case["inputs"]["lengths"])):
            assert error(row, case["outputs"][f"out_{k}"]) < 1e-5, (name, k)


def test_positions_fall_into_the_buckets_of_the_original(recipe, golden):
    attention = build_t5(recipe.state_dict("t5", golden)).encoder.block[0].layer[0].SelfAttention
    want = recipe.cases("t5", golden)["relative_buckets"]["outputs"]
    (want,) = want.values()
    assert torch.equal(attention._relative_position_bucket(torch.arange(-400, 401)).int(), want.int().flatten())


def test_bfloat16_is_not_further_from_the_truth_than_the_original(recipe, golden):
    model = build_t5(recipe.state_dict("t5", golden), torch.bfloat16)
    cases = recipe.cases("t5", golden)
    case = cases["padded_bf16"]
    got = run(model, case["inputs"]["ids"], case["inputs"]["lengths"])[1]
    assert got.dtype == torch.bfloat16
    assert error(got, cases["padded"]["outputs"]["out_1"]) <= 1.05 * case["relative_error_to_fp32"]


def test_recorded_prompts_give_the_recorded_features(recipe, golden):
    encoder = TextEncoder(build_t5(recipe.state_dict("t5", golden)), load_tokenizer(golden / "tokenizer"))
    prompts = [row["prompt"] for row in json.loads((golden / "text.json").read_text(encoding="utf-8"))["prompts"]]
    cases = recipe.cases("text", golden)
    for k, rows in enumerate(encoder.encode(prompts)):
        want = cases[f"prompt_{k}"]["outputs"]["features"]
        assert rows.shape == want.shape and error(rows, want) < 1e-5, prompts[k]


@pytest.mark.parametrize(
    ("seed", "sizes"), [(0, {}), (1, {"d_model": 32, "d_kv": 16, "num_heads": 2, "relative_attention_num_buckets": 16})]
)
def test_official_prefixed_and_transformers_names_give_the_same_bits(seed, sizes):
    reference = random_reference(seed, **sizes)
    theirs = {name: tensor for name, tensor in reference.state_dict().items() if "embed_tokens" not in name}
    official = {official_name(name): tensor for name, tensor in theirs.items()}
    assert not official.keys() & theirs.keys()
    ids = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(seed))
    want = run(reference, ids, [30, 11])
    variants = {
        "official": official,
        "prefixed": {f"encoder.{name}": tensor for name, tensor in official.items()},
        "transformers": dict(reference.state_dict()),
        "untied": {name.replace("shared", "encoder.embed_tokens"): tensor for name, tensor in theirs.items()},
        "ComfyUI": {**theirs, "spiece_model": torch.zeros(9, dtype=torch.uint8)},
    }
    for name, weights in variants.items():
        for got, row in zip(run(build_t5(weights), ids, [30, 11]), want, strict=True):
            assert torch.equal(got, row), name


def test_the_layout_is_that_of_the_published_file():
    from transformers import UMT5Config

    config = UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    model = empty_t5(config)
    shapes = {
        official_name(name): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }
    lines = [f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items()]
    assert len(shapes) == 242
    assert hashlib.md5(",".join(sorted([*lines, *shapes])).encode()).hexdigest() == "9c8818c2cbea55eca56c7b447df170da"
    empty = InMemory({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    ours, theirs = t5_config(empty).to_dict(), config.to_dict()
    for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "dense_act_fn"):
        assert ours[name] == theirs[name]
    assert transformers_names(shapes).keys() == shapes.keys()


# ----------------------------------------------------------------------------------------------- prompts to rows
def test_a_prompt_gives_the_same_rows_alone_and_in_a_batch(models):
    encoder = load_t5(models["t5"], torch.float32, tokenizer=models["tokenizer"])
    batch = encoder.encode(PROMPTS)
    for prompt, rows in zip(PROMPTS, batch, strict=True):
        assert rows.shape == (len(encoder.tokenizer.ids(prompt)) + 1, 64)
        torch.testing.assert_close(rows, encoder.encode([prompt])[0], rtol=1e-4, atol=1e-5)
        assert rows.untyped_storage().nbytes() == rows.numel() * 4


def test_padding_up_to_512_changes_no_valid_row(models):
    encoder = load_t5(models["t5"], torch.float32, tokenizer=models["tokenizer"])
    (rows,) = encoder.encode(PROMPTS[:1])
    ids = torch.zeros(1, 512, dtype=torch.long)
    ids[0, : len(rows)] = torch.tensor([*encoder.tokenizer.ids(PROMPTS[0]), 1])
    torch.testing.assert_close(run(encoder.model, ids, [len(rows)])[0], rows, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- fp8
def test_fp8_holds_linear_weights_only_and_computes_with_their_rounded_values(models):
    weights = tiny.state_dict("t5")
    model = build_t5(weights, torch.float32, fp8=True)
    for name, parameter in model.named_parameters():
        linear = ".SelfAttention." in name and "bias" not in name or "DenseReluDense" in name
        assert parameter.dtype == (torch.float8_e4m3fn if linear else torch.float32), name
    rounded = {
        key: value.to(torch.float8_e4m3fn).float() if ".attn." in key or ".ffn." in key else value
        for key, value in weights.items()
    }
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    got, want, exact = (run(m, ids, [20, 7]) for m in (model, build_t5(rounded), build_t5(weights)))
    for k in range(2):
        assert torch.equal(got[k], want[k])  # activations are never rounded to float8
        assert 0.01 < error(got[k], exact[k]) < 0.2


def test_fp8_computes_in_bfloat16_as_the_rounded_weights_do():
    weights = tiny.state_dict("t5")
    rounded = {
        key: value.to(torch.float8_e4m3fn).float() if ".attn." in key or ".ffn." in key else value
        for key, value in weights.items()
    }
    ids = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    got = run(build_t5(weights, torch.bfloat16, fp8=True), ids, [20])[0]
    assert torch.equal(got, run(build_t5(rounded, torch.bfloat16), ids, [20])[0])


# --------------------------------------------------------------------------------------------------------- files
def test_pth_and_safetensors_load_the_same(models, tmp_path):
    torch.save(tiny.state_dict("t5"), tmp_path / "t5.pth")
    first, second = (
        load_t5(path, torch.float32, tokenizer=models["tokenizer"]) for path in (models["t5"], tmp_path / "t5.pth")
    )
    assert not any(p.requires_grad for p in first.model.parameters())
    for a, b in zip(first.encode(PROMPTS), second.encode(PROMPTS), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "name"), [("dit_t2v", "a Wan DiT"), ("vae", "the Wan2.1 VAE"), ("clip", "a CLIP image encoder")]
)
def test_another_model_is_refused_by_its_name(models, kind, name):
    with pytest.raises(UserError, match=f"--t5 .*this seems to be {name}, not umT5's text encoder"):
        load_t5(models[kind], tokenizer=models["tokenizer"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.ffn.fc2.weight"), "1 missing: encoder.block.1.layer.1.DenseReluDense.wo.weight"),
        (lambda w: w.update({"blocks.0.attn.x.weight": torch.zeros(1)}), "1 unexpected: blocks.0.attn.x.weight"),
        (lambda w: w.pop("token_embedding.weight"), "shared.weight missing"),
        (lambda w: w.update({"blocks.0.attn.q.scale_weight": torch.ones(1)}), "fp8_scaled file"),
    ],
)
def test_weights_that_do_not_fit_are_named_in_one_line(change, message):
    weights = tiny.state_dict("t5")
    change(weights)
    with pytest.raises(UserError, match=message) as caught:
        build_t5(weights)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(models, tmp_path):
    save_file(tiny.random_weights(tiny.t5_shapes(vocabulary=100)), tmp_path / "t5.safetensors")
    with pytest.raises(UserError, match="--t5_tokenizer: it has .* but the text encoder .* knows 100"):
        load_t5(tmp_path / "t5.safetensors", tokenizer=models["tokenizer"])


def test_a_missing_option_is_named():
    with pytest.raises(UserError, match="--t5 is missing"):
        load_t5(None)


# ---------------------------------------------------------------------------------------------------- block swap
@pytest.fixture(scope="module")
def deep(models, tmp_path_factory):
    """Load the same text encoder of four blocks in one of several ways."""
    path = tmp_path_factory.mktemp("t5") / "t5.safetensors"
    save_file(tiny.state_dict("t5", layers=4), path)

    def load(swapped: int | str = 0, **how) -> TextEncoder:
        return load_t5(path, torch.float32, tokenizer=models["tokenizer"], blocks_to_swap=swapped, **how)

    return load


def ring_of(encoder: TextEncoder):
    return encoder.model.encoder.block[0].forward.func.__self__


@pytest.mark.parametrize("fp8", [False, True])
def test_swapped_blocks_give_the_same_rows_bit_by_bit(deep, monkeypatch, fp8):
    want = deep(fp8=fp8).encode(PROMPTS)
    monkeypatch.setattr("wan.t5.streaming_device", lambda *_: Late())
    for swapped in range(1, 5):
        encoder = deep(swapped, fp8=fp8)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(encoder.encode(PROMPTS), want, strict=True))
        loads = swapped if swapped <= 2 else 2 * swapped + 1  # two stay in the ring; the next one is ahead
        assert ring_of(encoder).loads == loads and len(ring_of(encoder).numbers) == swapped


def test_only_what_stays_is_loaded_to_the_device(deep, models):
    encoder = deep(2, device="meta")
    for number, block in enumerate(encoder.model.encoder.block):
        assert {p.device.type for p in block.parameters()} == {"cpu" if number in (1, 3) else "meta"}
    assert encoder.model.shared.weight.device.type == "meta"


def test_blocks_are_swapped_by_themselves_where_memory_is_short(deep, monkeypatch, caplog):
    caplog.set_level("INFO")
    want = deep().encode(PROMPTS)
    plain = deep(AUTO)
    assert ring_of(plain).numbers == [] and "blocks of the text encoder" not in caplog.text
    every = sum(p.nbytes for p in plain.model.parameters())
    block = sum(p.nbytes for p in plain.model.encoder.block[0].parameters())
    working = encoding_bytes(plain.model.config, torch.float32)
    device = Small(LiveBytes(), 1.05 * (every + working - block) + 10_000)
    monkeypatch.setattr("wan.t5.streaming_device", lambda *_: device)
    encoder = deep(AUTO)
    assert len(ring_of(encoder).numbers) == 3  # two of them are in the ring
    assert "--t5_blocks_to_swap auto: 3 of 4 blocks of the text encoder stream from main memory" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(encoder.encode(PROMPTS), want, strict=True))


def test_texts_that_do_not_fit_are_encoded_with_more_blocks_swapped(deep, monkeypatch, caplog):
    want = deep().encode(PROMPTS)
    with LiveBytes() as live:
        monkeypatch.setattr("wan.t5.streaming_device", lambda *_: Small(live))
        encoder = deep(AUTO)
        assert ring_of(encoder).numbers == []
        live.peak = resident = live.now
        assert all(torch.equal(a, b) for a, b in zip(encoder.encode(PROMPTS), want, strict=True))
        live.capacity = resident + (live.peak - resident) // 2
        rows = encoder.encode(PROMPTS)
        assert len(ring_of(encoder).numbers) >= 3
        live.capacity = live.now + 20_000
        with pytest.raises(UserError, match="with all 4 blocks swapped. Use --fp8_t5, or encode fewer texts"):
            encoder.encode(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(rows, want, strict=True))
    assert "--t5_blocks_to_swap auto swaps" in caplog.text


@pytest.mark.parametrize("fp8", [False, True])
def test_encoding_takes_no_more_than_the_estimate(deep, fp8):
    encoder = deep(fp8=fp8)
    ids = torch.randint(3, 300, (1, 512), generator=torch.Generator().manual_seed(0))
    with LiveBytes() as live:
        run(encoder.model, ids, [512])
    assert live.peak <= encoding_bytes(encoder.model.config, torch.float32, fp8) <= 2.5 * live.peak


def test_numbers_that_cannot_be_are_refused(deep):
    for swapped, line in ((5, "5: the text encoder has 4 blocks. Use 4 or fewer"), (-1, "-1: must not be negative")):
        with pytest.raises(UserError, match=f"--t5_blocks_to_swap {line}"):
            deep(swapped)
