import json
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from modules.outputs import (
    Files,
    OutputOptions,
    check_outputs,
    frame_writer,
    load_latent,
    plan_files,
    save_latent,
    save_picture,
)
from utils.errors import UserError

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 60]], np.uint8)
METADATA = {"prompt": 'ein Bär 熊 "quoted"', "seeds": 5, "flow_shift": 3.0}


def bars(frames=5, height=32, width=64):
    """Return a video of four upright bars that change places with every frame."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    for i in range(frames):
        for k in range(4):
            video[i, :, k * width // 4 : (k + 1) * width // 4] = COLOURS[(k + i) % 4]
    return video


def write(video, files, metadata=METADATA, fps=16, keep=None):
    with frame_writer(files, len(video) if keep is None else keep, fps, metadata) as writer:
        for frame in video:
            writer(frame)


def read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.average_rate, stream.codec_context, dict(container.metadata)


def test_an_mp4_comes_back_with_its_frames_colours_rate_and_metadata(tmp_path):
    video = bars()
    write(video, Files(video=tmp_path / "x.mp4"), fps=12)
    frames, rate, codec, metadata = read(tmp_path / "x.mp4")
    assert frames.shape == video.shape and rate == 12
    assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    middle = [slice(None), 16, [8, 24, 40, 56]]
    assert np.abs(frames[tuple(middle)].astype(int) - video[tuple(middle)]).max() <= 4
    assert json.loads(metadata["comment"]) == METADATA
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_a_path_that_is_no_utf8_does_not_cost_the_finished_video(tmp_path):
    metadata = {"image_path": "bad \udcff byte.png", "prompt": "b\udcffd"}
    write(bars(), Files(video=tmp_path / "x.mp4", images=tmp_path / "x.png"), metadata)
    save_latent(tmp_path / "x.safetensors", torch.zeros(16, 1, 2, 2), metadata)
    want = {"image_path": "bad ? byte.png", "prompt": "b?d"}
    assert json.loads(read(tmp_path / "x.mp4")[3]["comment"]) == load_latent(tmp_path / "x.safetensors")[1] == want


def test_without_metadata_the_files_tell_nothing(tmp_path):
    write(bars(1), Files(video=tmp_path / "x.mp4", images=tmp_path / "x.png"), metadata=None)
    save_latent(tmp_path / "x.safetensors", torch.zeros(16, 1, 2, 2), None)
    assert "comment" not in read(tmp_path / "x.mp4")[3]
    assert Image.open(tmp_path / "x.png").text == {}
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert not file.metadata()


def test_pictures_are_lossless_numbered_and_carry_the_metadata(tmp_path):
    video = bars(3)
    write(video, Files(images=tmp_path / "run" / "run.png"))
    paths = sorted((tmp_path / "run").iterdir())
    assert [path.name for path in paths] == ["run_000.png", "run_001.png", "run_002.png"]
    assert np.array_equal(np.stack([np.array(Image.open(path)) for path in paths]), video)
    assert json.loads(Image.open(paths[1]).text["comment"]) == METADATA


def test_a_single_picture_has_no_number(tmp_path):
    write(bars(1), Files(images=tmp_path / "one.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_tail_frames_are_dropped_from_video_and_pictures(tmp_path):
    write(bars(5), Files(video=tmp_path / "x.mp4", images=tmp_path / "x.png"), keep=2)
    assert len(read(tmp_path / "x.mp4")[0]) == 2 and len(list(tmp_path.glob("*.png"))) == 2


def test_a_failed_video_leaves_the_old_file_and_no_other(tmp_path):
    write(bars(2), Files(video=tmp_path / "x.mp4"))
    before = (tmp_path / "x.mp4").read_bytes()
    with pytest.raises(ZeroDivisionError), frame_writer(Files(video=tmp_path / "x.mp4"), 2, 16, None) as writer:
        writer(bars(1)[0])
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]
    assert (tmp_path / "x.mp4").read_bytes() == before


def test_replacing_a_named_file_is_logged(tmp_path, caplog):
    for _ in range(2):
        write(bars(1), Files(video=tmp_path / "x.mp4"))
        save_latent(tmp_path / "x.safetensors", torch.zeros(16, 1, 2, 2), None)
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        f"{tmp_path / 'x.mp4'} exists and is replaced",
        f"{tmp_path / 'x.safetensors'} exists and is replaced",
    ]


def test_a_latent_and_its_metadata_come_back(tmp_path):
    latent = torch.randn(16, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    metadata = {**METADATA, "prompt": "1", "lora": [{"file": "a.safetensors", "multiplier": 0.5}]}
    save_latent(tmp_path / "x.safetensors", latent.double(), metadata)
    got, found = load_latent(tmp_path / "x.safetensors")
    assert torch.equal(got, latent) and found == metadata
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert list(file.keys()) == ["latent"] and file.metadata()["seeds"] == "5"


def test_a_pickled_latent_is_read_without_running_what_is_in_it(tmp_path):
    latent = torch.randn(16, 1, 2, 2)
    torch.save({"latent": latent}, tmp_path / "good.pt")
    assert torch.equal(load_latent(tmp_path / "good.pt")[0], latent)
    torch.save({"latent": latent, "code": os.system}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="could run code"):
        load_latent(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({"latents": torch.zeros(16, 1, 2, 2)}, "there is no tensor 'latent' in it"),
        ({"latent": torch.zeros(4, 1, 2, 2)}, r"a tensor \[4, 1, 2, 2\] is no latent"),
        ({"latent": torch.zeros(16, 0, 2, 2)}, r"a tensor \[16, 0, 2, 2\] is no latent"),
        ({"latent": torch.full((16, 1, 2, 2), torch.nan)}, "values that are not finite"),
    ],
)
def test_what_is_no_latent_is_refused(tmp_path, tensors, line):
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=line):
        load_latent(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("output_type", "frames", "names"),
    [
        ("video", 5, ["T_7.mp4"]),
        ("images", 5, ["T_7/T_7.png"]),
        ("images", 1, ["T_7.png"]),
        ("latent", 5, ["T_7_latent.safetensors"]),
        ("both", 5, ["T_7.mp4", "T_7_latent.safetensors"]),
        ("latent_images", 1, ["T_7.png", "T_7_latent.safetensors"]),
    ],
)
def test_files_in_a_folder_are_named_by_time_and_seed(tmp_path, output_type, frames, names):
    (files,) = plan_files(OutputOptions(save_path=tmp_path, output_type=output_type), [(7, frames)])
    paths = [path.relative_to(tmp_path).as_posix() for path in (files.video, files.images, files.latent) if path]
    assert [re.sub(r"\d{8}-\d{6}-\d{3}", "T", path) for path in paths] == names


def test_results_of_one_run_never_share_a_name(tmp_path):
    planned = plan_files(OutputOptions(save_path=tmp_path), [(7, 5), (7, 5), (7, 5)])
    assert len({files.video for files in planned}) == 3


def test_a_decoded_latent_adds_its_own_name(tmp_path):
    (files,) = plan_files(OutputOptions(save_path=tmp_path), [(7, 5)], [tmp_path / "cat.safetensors"])
    assert files.video.name.endswith("_7_cat.mp4")


@pytest.mark.parametrize(
    ("name", "output_type", "files"),
    [
        ("a.mp4", "video", Files(video="a.mp4")),
        ("a.MP4", "both", Files(video="a.MP4", latent="a_latent.safetensors")),
        ("a.safetensors", "latent", Files(latent="a.safetensors")),
        ("a.png", "images", Files(images="a.png")),
        ("a.png", "latent_images", Files(images="a.png", latent="a_latent.safetensors")),
    ],
)
def test_a_media_suffix_names_the_file(tmp_path, name, output_type, files):
    options = OutputOptions(save_path=tmp_path / name, output_type=output_type)
    check_outputs(options, 1)
    expected = {part: tmp_path / path for part, path in vars(files).items() if path}
    assert plan_files(options, [(7, 5)]) == [Files(**expected)]


def test_a_folder_may_be_called_like_a_file(tmp_path):
    (tmp_path / "save.mp4").mkdir()
    options = OutputOptions(save_path=tmp_path / "save.mp4")
    check_outputs(options, 2)
    assert plan_files(options, [(7, 5)])[0].video.parent == tmp_path / "save.mp4"


@pytest.mark.parametrize(
    ("options", "results", "line"),
    [
        ({"save_path": None}, 1, "--save_path is missing. Give a folder, or the name of the file to write."),
        ({"save_path": "x.png"}, 1, "--output_type video writes .mp4 files. Use x.mp4, a folder, or another"),
        ({"save_path": "x.avi"}, 1, "--output_type video writes .mp4 files"),
        ({"save_path": "x.mp4", "video_format": "gif"}, 1, "--output_type video writes .gif files"),
        ({"save_path": "x.gif", "crf": 20}, 1, "--crf 20: gif files have no quality to choose"),
        ({"save_path": "out", "preview": 0}, 1, "--preview 0: must be at least 1"),
        ({"save_path": "x.mp4"}, 2, "names one file, but there are 2 results. Name a folder."),
        ({"save_path": "blocked/deep/folder"}, 1, "blocked is a file, not a folder"),
        ({"save_path": "out", "fps": 0}, 1, "--fps 0: must be from 1 to 1000"),
        ({"save_path": "out", "fps": 10**12}, 1, "--fps 1000000000000: must be from 1 to 1000"),
        ({"save_path": "out", "trim_tail_frames": -1}, 1, "--trim_tail_frames -1: must be 0 or more"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(tmp_path, options, results, line):
    (tmp_path / "blocked").write_text("a file")
    if options["save_path"]:
        options = {**options, "save_path": tmp_path / options["save_path"]}
    with pytest.raises(UserError) as error:
        check_outputs(OutputOptions(**options), results)
    assert line in str(error.value)


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        save_picture(tmp_path / "x.png", np.zeros((2, 2, 7), np.uint8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "mp4"),
        ({"save_path": Path("x.webm")}, "webm"),
        ({"save_path": Path("x.GIF")}, "gif"),
        ({"save_path": Path("folder"), "video_format": "webm"}, "webm"),
        ({"save_path": Path("x.png"), "video_format": "png"}, "png"),
        ({"save_path": Path("x.png")}, "mp4"),
    ],
)
def test_the_kind_of_video_is_asked_for_or_told_by_its_name(options, name):
    assert OutputOptions(**options).encoding().name == name


def test_files_in_a_folder_end_as_their_kind_does(tmp_path):
    options = OutputOptions(save_path=tmp_path, video_format="gif", output_type="both")
    (files,) = plan_files(options, [(7, 5)])
    assert files.video.name.endswith("_7.gif") and files.latent.name.endswith("_7_latent.safetensors")
