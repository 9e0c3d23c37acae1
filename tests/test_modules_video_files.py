import errno
import json

import av
import numpy as np
import pytest
from PIL import Image

from modules.video_files import VIDEO_FORMATS, VideoFormat, read_comment, video_writer
from utils.errors import UserError
from utils.files import atomic_path

METADATA = {"prompt": 'ein Bär 熊 "quoted"' * 40, "seeds": 5}


def clip(frames=5, height=64, width=96, bits=8):
    """Return a smooth video in motion."""
    t, y, x = np.mgrid[:frames, :height, :width]
    levels = np.stack([(x + 3 * t) / width, y / height, (x + y) / (height + width)], axis=-1).clip(0, 1)
    return (levels * (2**bits - 1)).round().astype(np.uint8 if bits == 8 else np.uint16)


def write(path, video, video_format, text=None, fps=16):
    with video_writer(path, fps, text, video_format) as writer:
        for frame in video:
            writer(frame)
    return path


def read(path, pixels="rgb24"):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        return np.stack([frame.to_ndarray(format=pixels) for frame in frames]), frames, stream.codec_context


@pytest.mark.parametrize("name", VIDEO_FORMATS)
def test_every_format_comes_back_with_frames_times_and_metadata(tmp_path, name):
    video = clip()
    text = json.dumps(METADATA, ensure_ascii=False)
    path = write(tmp_path / f"x.{name}", video, VideoFormat(name), text, fps=10)
    got, frames, _ = read(path)
    assert got.shape == video.shape and frames[-1].time == pytest.approx(0.4)
    error = np.abs(got.astype(int) - video)
    assert error.max() == 0 if name == "png" else error.mean() < {"gif": 5}.get(name, 2)
    assert read_comment(path) == METADATA
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    again = write(tmp_path / f"y.{name}", video, VideoFormat(name), text, fps=10)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["gif", "png"])
def test_what_picture_viewers_show_moves_for_ever(tmp_path, name):
    with Image.open(write(tmp_path / f"x.{name}", clip(), VideoFormat(name))) as image:
        assert (image.n_frames, image.info["loop"]) == (5, 0)


@pytest.mark.parametrize(("name", "codec"), [("mp4", "hevc"), ("webm", "libdav1d")])
def test_ten_bits_hold_levels_that_eight_do_not_have(tmp_path, name, codec):
    ramp = np.linspace(20000, 24000, 96).astype(np.uint16)[None, None, :, None]
    video = np.broadcast_to(ramp, (3, 64, 96, 3))
    got, _, context = read(write(tmp_path / f"x.{name}", video, VideoFormat(name, 4, True)), "rgb48le")
    assert (context.name, context.pix_fmt) == (codec, "yuv420p10le")
    assert np.abs(got.astype(int) - video).mean() < 50  # eight bits have steps of 257, 64 off on average
    assert len(np.unique(got[1, 32, :, 1])) > 20  # there are 16 levels of eight bits


def test_quality_and_size_follow_crf(tmp_path):
    rng = np.random.default_rng(0)
    video = clip() // 2 + rng.integers(0, 100, (5, 64, 96, 3), np.uint8)
    for name in ("mp4", "webm"):
        sizes = [
            write(tmp_path / f"{crf}.{name}", video, VideoFormat(name, crf)).stat().st_size for crf in (5, None, 45)
        ]
        assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("video_format", "line"),
    [
        (VideoFormat("gif", ten_bit=True), "--ten_bit: gif files have 8 bits a colour. Use --video_format mp4 or webm"),
        (VideoFormat("png", crf=3), "--crf 3: png files have no quality to choose"),
        (VideoFormat("mp4", crf=52), "--crf 52: must be from 0, the best, to 51. Try 16"),
        (VideoFormat("webm", crf=-1), "--crf -1: must be from 0, the best, to 63"),
    ],
)
def test_what_a_format_cannot_have_is_refused(video_format, line):
    with pytest.raises(UserError) as caught:
        video_format.check()
    assert line in str(caught.value)


def test_what_has_no_comment_of_ours_reads_as_none(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.mp4").write_text("no video")
    write(tmp_path / "foreign.mp4", clip(2), VideoFormat(), "made with care")
    for path in tmp_path.iterdir():
        assert read_comment(path) is None


def test_a_full_disk_that_the_encoder_finds_is_told_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as error, atomic_path(tmp_path / "a.gif") as temporary:
        temporary.write_bytes(b"begun")
        raise av.error.OSError(errno.ENOSPC, "No space left on device", str(temporary))
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "a.gif"))
    assert not list(tmp_path.iterdir())
