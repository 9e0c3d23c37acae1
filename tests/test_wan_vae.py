import copy
import hashlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.diffusers_vae import diffusers_vae
from utils.errors import UserError
from utils.options import parse_options
from wan import vae_layers
from wan.vae import LATENT_MEAN, LATENT_STD, VaeOptions, VaeShape, WanVAE, build_vae, load_vae


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def random_vae(seed=0, **sizes):
    """A VAE of the official layout with levels at any place."""
    shape = VaeShape(**{"width": 8, "levels": (8, 16, 32, 32)} | sizes)
    table = {name: tuple(tensor.shape) for name, tensor in WanVAE(shape).state_dict().items()}
    return build_vae(tiny.random_weights(table, seed))


@pytest.fixture(scope="module")
def vae():
    return build_vae(tiny.state_dict("vae"))


@pytest.fixture(scope="module")
def video():
    return torch.rand(1, 3, 9, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ------------------------------------------------------------------------------------------------ against others
def test_recorded_latents_and_videos_are_reproduced(recipe, golden):
    vae = build_vae(recipe.state_dict("vae", golden))
    cases = recipe.cases("vae", golden)
    for name, case in cases.items():
        if name == "encode_9_bf16":
            continue
        if "video" in case["inputs"]:
            got, want = vae.encode(case["inputs"]["video"][None])[0], case["outputs"]["latent"]
        else:
            got, want = vae.decode(case["inputs"]["latent"][None])[0], case["outputs"]["video"]
        assert error(got, want) < 1e-5 and (got - want).abs().max() < 1e-4, name


def test_bfloat16_is_not_further_from_the_truth_than_the_original(recipe, golden):
    vae = build_vae(recipe.state_dict("vae", golden), torch.bfloat16)
    cases = recipe.cases("vae", golden)
    got = vae.encode(cases["encode_9"]["inputs"]["video"][None])[0]
    assert got.dtype == torch.float32
    assert error(got, cases["encode_9"]["outputs"]["latent"]) <= cases["encode_9_bf16"]["relative_error_to_fp32"]


@pytest.mark.parametrize(
    ("sizes", "frames", "height", "width"),
    [
        ({"width": 12, "levels": (12, 24, 48, 48)}, 9, 24, 16),
        ({"width": 8, "levels": (8, 16, 16), "in_time": (True, True), "residuals": 1}, 13, 12, 20),
        ({"width": 16, "levels": (16, 16, 32), "in_time": (False, True), "residuals": 3}, 7, 8, 8),
    ],
)
def test_diffusers_computes_the_same_at_other_sizes(sizes, frames, height, width):
    ours = random_vae(frames, **sizes)
    theirs = diffusers_vae(ours)
    generator = torch.Generator().manual_seed(frames)
    pixels = torch.rand(2, 3, frames, height, width, generator=generator) * 2 - 1
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (LATENT_MEAN, LATENT_STD))
    if ours.shape.frames_per_latent == 4:  # diffusers cuts videos into chunks of four frames in any case
        with torch.no_grad():
            want = (theirs.encode(pixels).latent_dist.mean - mean) / std
        assert error(ours.encode(pixels), want) < 1e-5
    latents = torch.randn(2, 16, 3, height // 8 + 1, width // 8, generator=generator)
    with torch.no_grad():
        want = theirs.decode(latents * std + mean).sample
    assert error(ours.decode(latents), want) < 1e-5


# ------------------------------------------------------------------------- the whole video at once, without a cache
def whole_conv(conv, x):
    zeros = conv.kernel_size[0] - 1
    return F.conv3d(F.pad(x, (0, 0, 0, 0, zeros, 0)), conv.weight, conv.bias, padding=(0, *conv.padding[1:]))


def whole_norm(norm, x):
    return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * norm.gamma


def whole_layer(layer, x):
    if isinstance(layer, vae_layers.ResidualBlock):
        y = whole_conv(layer.residual["2"], F.silu(whole_norm(layer.residual["0"], x)))
        y = whole_conv(layer.residual["6"], F.silu(whole_norm(layer.residual["3"], y)))
        return y + (x if layer.shortcut is None else whole_conv(layer.shortcut, x))
    batch, frames = x.shape[0], rearrange(x, "b c f h w -> (b f) c h w")
    if isinstance(layer, vae_layers.AttentionBlock):
        q, k, v = layer.to_qkv(whole_norm(layer.norm, frames)).flatten(2).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(dim=-1)
        y = layer.proj((v @ weights.transpose(1, 2)).view(frames.shape))
        return x + rearrange(y, "(b f) c h w -> b c f h w", b=batch)
    if isinstance(layer, vae_layers.Downsample):
        y = rearrange(layer.resample["1"](F.pad(frames, (0, 1, 0, 1))), "(b f) c h w -> b c f h w", b=batch)
        return y if layer.time_conv is None or y.shape[2] == 1 else torch.cat([y[:, :, :1], layer.time_conv(y)], dim=2)
    assert isinstance(layer, vae_layers.Upsample)
    if layer.time_conv is not None and x.shape[2] > 1:
        halves = whole_conv(layer.time_conv, x[:, :, 1:]).chunk(2, dim=1)
        x = torch.cat([x[:, :, :1], torch.stack(halves, dim=3).flatten(2, 3)], dim=2)
    frames = F.interpolate(rearrange(x, "b c f h w -> (b f) c h w"), scale_factor=2.0, mode="nearest-exact")
    return rearrange(layer.resample["1"](frames), "(b f) c h w -> b c f h w", b=batch)


def whole_coder(coder, x, layers):
    x = whole_conv(coder.conv1, x)
    for layer in layers:
        x = whole_layer(layer, x)
    return whole_conv(coder.head["2"], F.silu(whole_norm(coder.head["0"], x)))


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_chunks_give_what_the_whole_video_at_once_gives(vae, frames):
    generator = torch.Generator().manual_seed(frames)
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (LATENT_MEAN, LATENT_STD))
    pixels = torch.rand(1, 3, frames, 16, 16, generator=generator) * 2 - 1
    encoder, decoder = vae.encoder, vae.decoder
    moments = whole_conv(vae.conv1, whole_coder(encoder, pixels, (*encoder.downsamples, *encoder.middle)))
    assert error(vae.encode(pixels), (moments[:, :16] - mean) / std) < 1e-5
    latents = torch.randn(1, 16, (frames + 3) // 4, 2, 2, generator=generator)
    whole = whole_coder(
        decoder, whole_conv(vae.conv2, latents * std + mean), (*decoder.middle, *decoder.upsamples)
    ).clamp(-1, 1)
    assert error(vae.decode(latents), whole) < 1e-5


@torch.no_grad()
def test_doubling_and_convolving_at_once_gives_what_one_after_the_other_gives(vae):
    for layer in vae.decoder.upsamples:
        if isinstance(layer, vae_layers.Upsample):
            x = torch.randn(2, layer.resample["1"].in_channels, 1, 5, 6, generator=torch.Generator().manual_seed(0))
            assert error(layer(x, vae_layers.FrameCache()), whole_layer(layer, x)) < 1e-6
            layer, x = copy.deepcopy(layer).bfloat16(), x.bfloat16()
            assert torch.equal(layer(x, vae_layers.FrameCache()), whole_layer(layer, x))


# ---------------------------------------------------------------------------------------------------- properties
def test_a_latent_depends_only_on_frames_up_to_four_times_its_number(vae, video):
    changed = video.clone()
    changed[:, :, 5:] = 0.5
    before, after = vae.encode(video), vae.encode(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.allclose(before[:, :, 2], after[:, :, 2], atol=1e-3)
    torch.testing.assert_close(before[:, :, :1], vae.encode(video[:, :, :1]))


def test_the_first_frame_depends_only_on_the_first_latent(vae):
    latents = torch.randn(1, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.decode(latents)[:, :, :1], vae.decode(latents[:, :, :1]))


def test_each_video_of_a_batch_is_encoded_and_decoded_as_if_alone(vae, video):
    batch = torch.cat([video, video.flip(4), -video])
    latents = vae.encode(batch)
    torch.testing.assert_close(latents[1:2], vae.encode(video.flip(4)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents)[2:], vae.decode(latents[2:]), rtol=1e-4, atol=1e-5)


def test_a_cache_in_main_memory_changes_nothing(vae, video, monkeypatch):
    latents = vae.encode(video)
    pixels = vae.decode(latents)
    monkeypatch.setattr(vae, "cache_cpu", True)
    assert torch.equal(vae.encode(video), latents)
    assert torch.equal(vae.decode(latents), pixels)


def test_frames_wait_on_their_device_or_are_brought_to_main_memory(vae):
    frames = torch.empty(1, 1, 2, 2, 2, device="meta")  # stands for a device; copying from it is an error
    cache = vae_layers.FrameCache()
    cache.keep(vae.encoder.conv1, frames)
    assert cache.take(vae.encoder.conv1, frames.device).device.type == "meta"
    with pytest.raises(NotImplementedError, match="meta"):
        vae_layers.FrameCache(in_main_memory=True).keep(vae.encoder.conv1, frames)


# ---------------------------------------------------------------------------------------------------------- tiles
@pytest.mark.parametrize(
    ("sizes", "frames", "height", "width", "tile"),
    [
        ({}, 9, 40, 104, 32),  # 2 x 4 tiles at full resolution, 1 x 2 at half
        ({}, 1, 136, 72, 34),
        ({"residuals": 1, "levels": (8, 16, 16), "in_time": (True, True)}, 5, 44, 36, 32),
        ({"residuals": 3}, 5, 56, 64, 36),
    ],
)
def test_tiles_give_what_whole_frames_give(sizes, frames, height, width, tile):
    vae = random_vae(**sizes)
    generator = torch.Generator().manual_seed(tile)
    pixels = torch.rand(2, 3, frames, height, width, generator=generator) * 2 - 1
    latents = vae.encode(pixels)
    decoded = vae.decode(latents)
    vae.tile = tile
    assert error(vae.encode(pixels), latents) < 2e-6
    torch.testing.assert_close(vae.encode(pixels), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents), decoded, rtol=0, atol=1e-5)
    in_tiles = vae.decode(latents)
    vae.cache_cpu = True
    assert torch.equal(vae.decode(latents), in_tiles)


def test_a_tile_sees_as_far_as_its_layers():
    vae = random_vae()
    assert [vae_layers.reach(stage) for stage in vae.encoder.stages()[:-1]] == [6, 6, 6]
    assert [vae_layers.reach(stage) for stage in vae.decoder.stages()[1:]] == [8, 8, 8]
    assert vae_layers.cuts(100, 32) == [range(0, 24), range(24, 50), range(50, 74), range(74, 100)]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, without those of a model's weights."""

    def __init__(self, model):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {weight.untyped_storage()._cdata for weight in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return result

    def gone(self, storage, size):
        self.known.remove(storage)
        self.now -= size


@pytest.mark.parametrize("tile", [None, 256])
@pytest.mark.parametrize("frames", [1, 9])
def test_the_estimate_of_memory_covers_the_tensors_of_the_published_vae(frames, tile, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))  # as the kernels do
    monkeypatch.setattr(WanVAE, "_require_finite", lambda *_: None)  # tensors without memory are neither
    with torch.device("meta"):  # tensors without memory
        vae = WanVAE(VaeShape(), tile=tile or 1024).to(torch.bfloat16)
        pixels, latents = torch.empty(1, 3, frames, 480, 832), torch.empty(1, 16, (frames + 3) // 4, 60, 104)
    for coder, run in ((vae.encoder, lambda: vae.encode(pixels)), (vae.decoder, lambda: [*vae.decode_chunks(latents)])):
        with LiveBytes(vae) as live:
            run()
        estimate = vae.peak_bytes(coder, 1, frames, 480, 832, tile)
        assert live.peak < estimate < 2.5 * live.peak, (live.peak, estimate)


def test_tiles_come_by_themselves_where_memory_is_short_and_are_told_of_once(vae, video, monkeypatch, caplog):
    video = video.repeat(1, 1, 1, 4, 4)
    latents, told = vae.encode(video), []
    monkeypatch.setattr("wan.vae.SMALLER_TILES", (32, 16))
    whole = vae.peak_bytes(vae.encoder, 1, 9, 64, 96)
    for free in (whole, whole - 1, 0):
        monkeypatch.setattr("wan.vae.free_memory", lambda device, free=free: free)
        caplog.clear()
        with caplog.at_level("INFO", "wan.vae"):
            for _ in range(2):
                assert error(vae.encode(video), latents) < 2e-6
        told.append([message.split(":")[0] for message in caplog.messages])
    assert told == [[], ["encoding 96x64 in tiles of 32 pixels"], ["encoding 96x64 in tiles of 16 pixels"]]


def test_tiles_are_asked_for_by_an_option_or_by_their_size():
    def tile(*argv):
        return parse_options("", VaeOptions, argv=argv)[0].tile

    assert (tile(), tile("--vae_tiling"), tile("--vae_spatial_tile_sample_min_size", "384")) == (None, 256, 384)
    with pytest.raises(
        UserError, match="--vae_spatial_tile_sample_min_size.*even number of pixels, 32 or more, not 33"
    ):
        tile("--vae_spatial_tile_sample_min_size", "33")


@pytest.mark.gpu
def test_on_a_gpu_results_are_where_the_inputs_are_and_the_cache_where_it_is_asked_to_be(video, monkeypatch):
    vae, on_gpu = build_vae(tiny.state_dict("vae")), build_vae(tiny.state_dict("vae")).to("cuda")
    latents, devices = vae.encode(video), set()
    original = vae_layers.FrameCache.keep

    def keep(cache, layer, frames):
        original(cache, layer, frames)
        devices.update(kept.device.type for kept in cache._frames.values())

    monkeypatch.setattr(vae_layers.FrameCache, "keep", keep)
    for cache_cpu, device in ((False, "cuda"), (True, "cpu")):
        on_gpu.cache_cpu = cache_cpu
        devices.clear()
        got = on_gpu.encode(video)
        assert got.device.type == "cpu" and error(got, latents) < 5e-3  # TF32 convolutions
        assert on_gpu.decode(latents.cuda()).device.type == "cuda"
        assert devices == {device}


def test_an_image_leaves_nothing_in_the_cache(vae, video, monkeypatch):
    sizes = []
    original = vae_layers.FrameCache.keep

    def keep(cache, layer, frames):
        original(cache, layer, frames)
        sizes.append(len(cache._frames))

    monkeypatch.setattr(vae_layers.FrameCache, "keep", keep)
    vae.encode(video[:, :, :1])
    assert max(sizes) == 0
    vae.encode(video[:, :, :5])
    assert max(sizes) == 22 + 2  # 22 convolutions and two downsamplers look back in time


def test_decoded_frames_are_handed_over_as_they_come(vae):
    latents = torch.randn(2, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    pixels, chunks = vae.decode(latents), list(vae.decode_chunks(latents))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4]
    assert torch.equal(torch.cat(chunks, dim=2), pixels)
    assert pixels.shape == (2, 3, 9, 16, 16) and pixels.dtype == torch.float32 and pixels.abs().max() <= 1


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_16_bit_weights_give_float32_latents_near_the_exact_ones(vae, video, dtype, limit):
    low = build_vae(tiny.state_dict("vae"), dtype)
    assert low.dtype == dtype
    latents, exact = low.encode(video), vae.encode(video)
    assert latents.dtype == torch.float32 and 0 < error(latents, exact) < limit
    assert 0 < error(low.decode(exact), vae.decode(exact)) < limit


def test_numbers_too_large_for_float16_are_an_error_instead_of_black_frames(video):
    weights = tiny.state_dict("vae")
    for name in ("encoder.head.2.weight", "decoder.head.2.weight"):
        weights[name] = weights[name] * 1e5
    latents = torch.ones(1, 16, 2, 2, 2)
    wide, narrow = build_vae(weights, torch.bfloat16), build_vae(weights, torch.float16)
    assert wide.encode(video).isfinite().all() and wide.decode(latents).isfinite().all()
    with pytest.raises(UserError, match="--vae_dtype float16: the encoded latents are not finite. Use --vae_dtype"):
        narrow.encode(video)
    with pytest.raises(UserError, match="--vae_dtype float16: the decoded frames are not finite. Use --vae_dtype"):
        narrow.decode(latents)
    with pytest.raises(UserError, match="--vae_dtype bfloat16: the decoded frames are not finite. Check the weights"):
        wide.decode(latents * torch.nan)


def test_a_pixel_without_any_activation_stays_zero_in_float16():
    norm = vae_layers.ChannelNorm(4, axes=3).half()
    assert torch.equal(norm(torch.zeros(1, 4, 1, 2, 2, dtype=torch.float16)), torch.zeros(1, 4, 1, 2, 2).half())


@pytest.mark.parametrize("size", [(12, 16), (16, 20), (4, 4)])
def test_sizes_that_are_no_multiple_of_8_are_refused(vae, size):
    with pytest.raises(AssertionError, match=str(size[1])):
        vae.encode(torch.zeros(1, 3, 1, *size))


# ---------------------------------------------------------------------------------------------------------- files
def test_the_layout_is_that_of_the_published_file():
    with torch.device("meta"):
        tensors = WanVAE(VaeShape()).state_dict()
    lines = [f"{key}:{'_'.join(map(str, tensor.shape))}" for key, tensor in tensors.items()]
    assert sum(tensor.numel() for tensor in tensors.values()) == 126_892_531
    assert hashlib.md5(",".join(sorted([*lines, *tensors])).encode()).hexdigest() == "ccc42284ea13e1ad04693284c7a09be6"


def test_pth_and_safetensors_load_the_same(vae, models, tmp_path):
    torch.save(tiny.state_dict("vae"), tmp_path / "vae.pth")
    pixels = torch.zeros(1, 3, 1, 8, 8)
    for path in (models["vae"], tmp_path / "vae.pth"):
        loaded = load_vae(path, torch.float32, cache_cpu=True)
        assert loaded.cache_cpu and not any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(loaded.encode(pixels), vae.encode(pixels))


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_pickle_with_code_is_refused_without_running_it(tmp_path, capsys):
    torch.save({**tiny.state_dict("vae"), "x": Code()}, tmp_path / "vae.pth")
    with pytest.raises(UserError, match="--vae .*vae.pth.*could run code") as caught:
        load_vae(tmp_path / "vae.pth")
    assert "\n" not in str(caught.value) and "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "name"), [("dit_t2v", "a Wan DiT"), ("t5", "a T5 text encoder"), ("clip", "a CLIP image encoder")]
)
def test_another_model_is_refused_by_its_name(models, kind, name):
    with pytest.raises(UserError, match=f"this seems to be {name}, not the Wan2.1 VAE. Use Wan2.1_VAE.pth"):
        load_vae(models[kind])


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("encoder.downsamples.0.downsamples.0.residual.2.weight", "Wan2.2 VAE.*14B models of Wan2.2 work with"),
        ("encoder.down_blocks.0.conv1.weight", "a VAE in another layout"),
        ("lora_unet_blocks_0_ffn_0.lora_down.weight", "a LoRA"),
        ("some.weight", "an unknown model .with some.weight."),
    ],
)
def test_weights_of_something_else_are_refused(key, name):
    with pytest.raises(UserError, match=name):
        build_vae({key: torch.zeros(8, 8)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.head.2.bias"), "1 missing: decoder.head.2.bias"),
        (lambda w: w.pop("encoder.downsamples.4.residual.2.weight"), "missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda w: w.update({"decoder.conv1.bias": torch.zeros(3)}), "1 of the wrong shape: decoder.conv1.bias"),
        (lambda w: w.pop("conv2.weight"), "conv2.weight is missing"),
    ],
)
def test_weights_that_do_not_fit_are_named_in_one_line(change, message):
    weights = tiny.state_dict("vae")
    change(weights)
    with pytest.raises(UserError, match=message) as caught:
        build_vae(weights)
    assert "\n" not in str(caught.value)


def test_other_latent_channels_are_refused():
    with pytest.raises(UserError, match="8 latent channels, but the Wan2.1 VAE has 16"):
        build_vae(tiny.random_weights(tiny.vae_shapes(z=8)))


def test_formats_that_convolutions_lack_are_refused(models):
    with pytest.raises(UserError, match="--vae_dtype float8_e4m3fn.*bf16, fp16 or fp32"):
        load_vae(models["vae"], torch.float8_e4m3fn)
    with pytest.raises(UserError, match="--vae_dtype.*bf16, fp16 or fp32, not in fp8"):
        parse_options("", VaeOptions, argv=["--vae_dtype", "fp8"])
    assert parse_options("", VaeOptions, argv=["--vae_dtype", "float16"])[0].vae_dtype == "float16"
