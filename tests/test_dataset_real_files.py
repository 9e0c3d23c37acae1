"""Videos as they come: every codec and container, frame by frame in order, in the right size, upright, in colour.

Each frame shows its own number, as big black and white blocks, so that a frame lost, doubled or out of order is seen.
"""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dataset.config import VideoConfig, load_config
from dataset.decoding import MediaError, decoded_frames
from dataset.items import Source, find_sources
from dataset.media import plan_items, read_clips
from modules.caching import CachingOptions
from modules.latent_caching import cache_latents
from modules.latent_encoding import LatentEncoders
from tests import tiny
from tests.media import write_toml
from utils.errors import UserError
from wan.vae import build_vae

WIDTH, HEIGHT, BITS = 96, 64, 6
COLOURS = [(230, 30, 20), (20, 200, 40), (30, 40, 220), (240, 220, 30), (128, 128, 128), (245, 245, 245)]
FAST = {"deadline": "realtime", "cpu-used": "8"}
X265 = {"x265-params": "log-level=none"}


def numbered(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Return a picture uint8 [H W 3]: the number in blocks in its second quarter from above, colours below them."""
    picture = np.full((height, width, 3), 60, np.uint8)
    for bit in range(BITS):
        columns = slice(bit * width // BITS, (bit + 1) * width // BITS)
        picture[height // 4 : height // 2, columns] = 230 if number >> bit & 1 else 20
        picture[height // 2 :, columns] = COLOURS[bit]
    return picture


def number_of(picture: np.ndarray) -> int:
    height, width = picture.shape[:2]
    centres = picture[3 * height // 8, width // BITS // 2 :: width // BITS][:BITS].mean(axis=1)
    return sum(int(centre > 125) << bit for bit, centre in enumerate(centres))


def write(
    path: Path,
    frames: int = 11,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    audio: str | None = None,
) -> Path:
    """Write a video of numbered frames; times: of each frame in milliseconds, in place of 16 a second."""
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=16, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            _write_silence(container, audio)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i, *size), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _write_silence(container: av.container.OutputContainer, codec: str) -> None:
    stream = container.add_stream(codec, rate=48000)
    for i in range(20):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, 960 * i
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def config(**keys: object) -> VideoConfig:
    given = {"frame_extraction": "chunk", "target_frames": (1, 5), **keys}
    return VideoConfig(where="test", cache_directory=Path("c"), resolution=(WIDTH, HEIGHT), **given)


def assert_whole(path: Path, frames: int = 11, size: tuple[int, int] = (WIDTH, HEIGHT), tolerance: int = 10) -> None:
    """Check count, order, size and colours of the frames, and that plan and clips are what they give."""
    decoded = list(decoded_frames(path))
    assert [number_of(picture) for picture in decoded] == list(range(frames))
    assert {picture.shape for picture in decoded} == {(size[1], size[0], 3)}
    for bit, colour in enumerate(COLOURS):
        shown = decoded[-1][7 * size[1] // 8, (2 * bit + 1) * size[0] // (2 * BITS)].astype(int)
        assert np.abs(shown - colour).max() <= tolerance, (path.name, colour, shown)
    source, items = Source(path, "x", is_video=True), set()
    for clip in read_clips(source, config()):
        first = clip.item.first_frame
        assert [number_of(p) for p in clip.pixels] == list(range(first, first + clip.item.frames))
        items.add(clip.item)
    windows = {(i, 1) for i in range(frames)} | {(i, 5) for i in range(0, frames - 4, 5)}
    assert {(item.first_frame, item.frames) for item in items} == windows
    assert set(plan_items(source, config())) == items


FILES = {
    "h264.mp4": {"options": {"bf": "3", "b_strategy": "0", "g": "6"}},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "open_gop.mkv": {"codec": "libx265", "options": {"x265-params": "log-level=none:open-gop=1:keyint=5:min-keyint=5"}},
    # With frames that are decoded and never shown.
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"auto-alt-ref": "1", "lag-in-frames": "10", "cpu-used": "5"}},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "10", "cpu-used": "5"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "8", "crf": "20"}},
    "h264_10_bits.mp4": {"pixels": "yuv420p10le"},
    "hevc_10_bits.mp4": {"codec": "libx265", "pixels": "yuv420p10le", "options": X265},
    "prores.mov": {"codec": "prores", "pixels": "yuv422p10le"},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "b": "2M"}},
    "wmv2.wmv": {"codec": "wmv2", "options": {"b": "2M"}},
    "fragments.mp4": {"options": {"g": "4"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "aac.mp4": {"audio": "aac"},
    "opus.webm": {"codec": "libvpx-vp9", "options": FAST, "audio": "libopus"},
    "uneven.mp4": {"times": [0, 10, 90, 100, 340, 350, 351, 400, 900, 905, 1000]},
    "uneven.mkv": {"times": [0, 10, 90, 100, 340, 350, 351, 400, 900, 905, 1000]},
    "palette.gif": {"codec": "gif", "pixels": "rgb8"},
    "h264_odd.mp4": {"pixels": "yuv444p", "size": (97, 65)},
    "vp9_odd.webm": {"codec": "libvpx-vp9", "size": (97, 65), "options": FAST},
    "h264_no_multiple_of_16.mp4": {"size": (98, 66)},
}


@pytest.mark.parametrize("name", FILES)
def test_every_frame_is_there_once_and_in_order(tmp_path: Path, name: str):
    given = FILES[name]
    coarse = 45 if name.endswith("gif") else 20 if name.startswith(("wmv2", "mpeg4", "vp8")) else 10
    assert_whole(write(tmp_path / name, **given), size=given.get("size", (WIDTH, HEIGHT)), tolerance=coarse)


def test_a_webm_without_duration_is_read_to_its_end(tmp_path: Path):
    path = write(tmp_path / "live.webm", codec="libvpx-vp9", options=FAST, container_options={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None and container.streams.video[0].frames == 0
    assert_whole(path)


def test_a_gif_of_partial_frames_with_times_of_their_own_is_a_video(tmp_path: Path):
    pictures = [Image.fromarray(numbered(i)).quantize(64) for i in range(11)]
    times = [40 + 30 * i for i in range(11)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=times, optimize=True)
    assert_whole(tmp_path / "a.gif", tolerance=3)


def test_frames_that_an_edit_list_cuts_away_are_neither_counted_nor_shown(tmp_path: Path):
    """Phones trim a video so: the frames before the cut stay in the file, for those behind it to be decoded from."""
    write(tmp_path / "whole.mp4", frames=20, options={"bf": "2", "b_strategy": "0"})
    with av.open(str(tmp_path / "whole.mp4")) as whole, av.open(str(tmp_path / "trimmed.mp4"), "w") as trimmed:
        stream = trimmed.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(whole.streams.video[0]):
            if packet.dts is not None:
                shift = int(2.5 / 16 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                trimmed.mux(packet)
    source = Source(tmp_path / "trimmed.mp4", "x", is_video=True)
    assert [number_of(picture) for picture in decoded_frames(source.path)] == list(range(3, 20))
    items = {clip.item for clip in read_clips(source, config(target_frames=(1,)))}
    assert len(items) == 17 and set(plan_items(source, config(target_frames=(1,)))) == items


# The matrix in a track's header as a phone writes it, [a b u c d v x y w]: x' = a x + c y, y' = b x + d y.
TURNED = {"clockwise": (0, 1, -1, 0, 1), "counter-clockwise": (0, -1, 1, 0, 3), "half": (-1, 0, 0, -1, 2)}


@pytest.mark.parametrize("turn", TURNED)
def test_a_phone_video_is_turned_as_the_matrix_in_its_track_says(tmp_path: Path, turn: str):
    a, b, c, d, quarters = TURNED[turn]
    lying = [np.rot90(numbered(i), quarters) for i in range(11)]  # counter-clockwise, as the sensor saw it
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = *lying[0].shape[:2], "yuv420p"
        for picture in lying:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    one, upright = 1 << 16, path.read_bytes()
    plain = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    place = upright.index(plain, upright.index(b"tkhd"))
    path.write_bytes(upright[:place] + turned + upright[place + len(turned) :])
    assert_whole(path)


# ------------------------------------------------------------------------------------------------------- colours
MATRICES = {  # name > weights of red and blue; how matrix and primaries, and how the transfer curve are tagged
    "bt601": (0.299, 0.114, 6, 6),
    "bt709": (0.2126, 0.0722, 1, 1),
    "bt2020": (0.2627, 0.0593, 9, 14),
}
CODECS = {  # name > codec, pixel format, bits, options
    "h264": ("libx264", "yuv420p", 8, {"crf": "4"}),
    "h264_10": ("libx264", "yuv420p10le", 10, {"crf": "4"}),
    "hevc": ("libx265", "yuv420p", 8, {"x265-params": "log-level=none:bframes=0", "crf": "4"}),
    "vp9": ("libvpx-vp9", "yuv420p", 8, FAST | {"crf": "4", "b": "0"}),
}


def planes(picture: np.ndarray, kr: float, kb: float, full: bool, bits: int) -> list[np.ndarray]:
    """Return Y [H W], Cb and Cr [H/2 W/2] of an RGB picture by the definition (ITU-R BT.709 and BT.2100)."""
    r, g, b = np.moveaxis(picture / 255, -1, 0)
    luma = kr * r + (1 - kr - kb) * g + kb * b
    chroma = (b - luma) / (2 - 2 * kb), (r - luma) / (2 - 2 * kr)
    step = 1 << (bits - 8)
    scale = ((1 << bits) - 1, 0, (1 << bits) - 1) if full else (219 * step, 16 * step, 224 * step)
    values = [scale[0] * luma + scale[1], *(scale[2] * c[::2, ::2] + 128 * step for c in chroma)]
    return [np.clip(np.round(v), 0, (1 << bits) - 1).astype(np.uint8 if bits == 8 else np.uint16) for v in values]


def write_yuv(path: Path, codec: str, matrix: str | None, full: bool) -> Path:
    """Write frames whose YUV values come from the definition of a matrix, named in the file unless it is None."""
    encoder, pixels, bits, options = CODECS[codec]
    kr, kb, tag, curve = MATRICES[matrix or "bt601"]
    frame = av.VideoFrame(WIDTH, HEIGHT, pixels)
    for plane, values in zip(frame.planes, planes(numbered(5), kr, kb, full, bits), strict=True):
        lines = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
        lines[:, : values.shape[1]] = values
        plane.update(lines.tobytes())
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=16, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        if matrix:
            context = stream.codec_context
            context.colorspace, context.color_primaries, context.color_trc = tag, tag, curve
            context.color_range = 2 if full else 1
        for i in range(5):
            frame.pts, frame.time_base = i, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("matrix", [*MATRICES, None])
def test_colours_are_those_that_the_file_says(tmp_path: Path, codec: str, matrix: str | None):
    """Without a word from the file, bt601 in the limited range, as FFmpeg takes it."""
    for full in (False, True) if matrix else (False,):
        path = write_yuv(tmp_path / f"{full}.{'webm' if codec == 'vp9' else 'mp4'}", codec, matrix, full)
        shown = next(decoded_frames(path))
        for bit, colour in enumerate(COLOURS):
            got = shown[7 * HEIGHT // 8, (2 * bit + 1) * WIDTH // (2 * BITS)].astype(int)
            assert np.abs(got - colour).max() <= 4, (full, colour, got)


# ---------------------------------------------------------------------------------------------- what is no video
def broken_files(folder: Path) -> dict[Path, str]:
    """Write files that cannot be used, and return what is to be said of each."""
    good = write(folder / "good.mp4", frames=40, container_options={"movflags": "faststart"}, options={"crf": "10"})
    data = good.read_bytes()
    with av.open(str(good)) as container:
        places = [entry.pos for entry in container.streams.video[0].index_entries]
    named = {
        "cut_between_frames.mp4": (data[: places[30]], "is cut off, 10 frames are missing"),
        "cut_in_a_frame.mp4": (data[: places[30] + 3], "is cut off, 10 frames are missing"),
        "without_index.mp4": (write(folder / "tail.mp4").read_bytes()[:900], "cannot be read (Invalid data found"),
        "unknown_codec.mp4": (
            data.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"),
            "is in a codec that cannot be decoded",
        ),
        "damaged.mp4": (data[: places[9]] + bytes(places[29] - places[9]) + data[places[29] :], "cannot be read ("),
        "empty.mp4": (b"", "cannot be read (Invalid data found"),
        "cut.gif": (b"GIF89a", "cannot be read (Invalid data found"),
    }
    said = {}
    for name, (content, words) in named.items():
        (folder / name).write_bytes(content)
        said[folder / name] = words
    with av.open(str(folder / "no_frames.mp4"), "w", options={"movflags": "empty_moov+frag_keyframe"}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.start_encoding()
    with av.open(str(folder / "sound.mp4"), "w") as container:
        _write_silence(container, "aac")
    fragments = write(
        folder / "f.mp4", 20, options={"g": "4"}, container_options=FILES["fragments.mp4"]["container_options"]
    )
    (folder / "cut_fragments.mp4").write_bytes(fragments.read_bytes()[: fragments.stat().st_size * 7 // 10])
    for path in (good, folder / "tail.mp4", fragments):
        path.unlink()
    said[folder / "no_frames.mp4"] = "holds no frames"
    said[folder / "sound.mp4"] = "holds no video stream"
    said[folder / "cut_fragments.mp4"] = "is cut off, "
    return said


def test_what_cannot_be_used_is_named_with_the_reason_and_the_rest_is_cached(tmp_path: Path):
    (tmp_path / "v").mkdir()
    said = broken_files(tmp_path / "v")
    good = [write(tmp_path / "v" / "a.gif", codec="gif", pixels="rgb8"), write(tmp_path / "v" / "b.mp4")]
    for path in (*said, *good):
        path.with_suffix(".txt").write_text("x")
    dataset = {"video_directory": tmp_path / "v", "cache_directory": tmp_path / "cache", "frame_extraction": "full"}
    general = {"resolution": [32, 32], "caption_extension": ".txt"}
    configs = load_config(write_toml(tmp_path / "data.toml", general, dataset))
    encoders = LatentEncoders(build_vae(tiny.state_dict("vae")), None)
    for _ in range(2):
        options = CachingOptions(device="cpu", num_workers=1, skip_existing=True)
        result = cache_latents(configs, lambda: encoders, torch.float32, options)
        assert result.failed.keys() == said.keys()
        for path, reason in result.failed.items():
            assert reason.startswith(f"{path}: {said[path]}") and "\n" not in reason, reason
        names = sorted(path.name for path in (tmp_path / "cache").glob("*.safetensors"))
        assert len(result.written) + len(result.kept) == len(names) == 2
        assert [name.split("_")[:2] for name in names] == [["a", "00000-009"], ["b", "00000-009"]]
    assert not result.written


def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(tmp_path: Path):
    """Most cuts raise an error where decoding comes to them; those between two frames would pass for an end."""
    path = write(tmp_path / "a.mp4", codec="libx265", options=X265, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    for length in range(len(data) // 2, len(data), len(data) // 40):
        path.write_bytes(data[:length])
        for read in (plan_items, read_clips):
            with pytest.raises(MediaError, match="is cut off|cannot be read|holds no"):
                list(read(Source(path, "x", is_video=True), config()))


def test_a_gif_beside_a_video_of_its_name_is_its_preview(tmp_path: Path):
    for name in ("a.mp4", "a.gif", "b.GIF", "b.txt", "a.txt"):
        (tmp_path / name).write_text("x")
    videos = VideoConfig(where="t", cache_directory=tmp_path, video_directory=tmp_path, caption_extension=".txt")
    assert [source.path.name for source in find_sources(videos)] == ["a.mp4", "b.GIF"]
    (tmp_path / "b.mp4").write_text("x")
    assert [source.path.name for source in find_sources(videos)] == ["a.mp4", "b.mp4"]
    (tmp_path / "a.webm").write_text("x")
    with pytest.raises(UserError, match="would share the cache files a_"):
        find_sources(videos)
