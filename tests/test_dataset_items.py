import json
import logging
from pathlib import Path

import pytest

from dataset.config import load_config
from dataset.items import Source, find_sources
from tests.media import write_jsonl, write_pictures, write_toml, write_video
from utils.errors import UserError

GENERAL = {"resolution": 64, "enable_bucket": True, "caption_extension": ".txt"}


def sources_of(folder: Path, **dataset: object) -> list[Source]:
    return find_sources(load_config(write_toml(folder / "data.toml", GENERAL, dataset))[0])


def error_of(folder: Path, **dataset: object) -> str:
    with pytest.raises(UserError) as error:
        sources_of(folder, **dataset)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_gives_its_pictures_sorted_with_stripped_captions(tmp_path: Path):
    folder = write_pictures(tmp_path / "ä [1]", {"b.x": (64, 64), "a": (64, 64)}, caption="\ufeff two\nlines \n")
    write_pictures(folder / "deeper", {"c": (64, 64)})
    found = sources_of(tmp_path, image_directory=folder)
    assert [(source.name, source.caption) for source in found] == [("a", "two\nlines"), ("b.x", "two\nlines")]


def test_hidden_files_are_no_media(tmp_path: Path):
    """macOS makes `._a.png` and `._a.txt`, neither a picture nor text, on disks that are not its own."""
    folder = write_pictures(tmp_path / "i", {"a": (64, 64), "._a": (64, 64)})
    (folder / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    assert [source.name for source in sources_of(tmp_path, image_directory=folder)] == ["a"]


def test_pictures_without_caption_are_left_out_with_one_warning(tmp_path: Path, caplog):
    folder = write_pictures(tmp_path / "i", {"a": (64, 64)})
    write_pictures(folder, {"b": (64, 64), "c": (64, 64)}, caption=None)
    with caplog.at_level(logging.WARNING):
        assert [source.name for source in sources_of(tmp_path, image_directory=folder)] == ["a"]
    assert len(caplog.records) == 1 and f"left out because they have no caption: 2, the first {folder}" in caplog.text


def test_a_folder_that_gives_nothing_is_an_error_that_says_why(tmp_path: Path):
    folder = write_pictures(tmp_path / "pictures", {"a": (64, 64)}, caption=None)
    assert "none of the 1 images" in (error := error_of(tmp_path, image_directory=folder)) and "a.txt" in error
    assert "there are no videos in this folder. They end in .mp4, .webm," in error_of(tmp_path, video_directory=folder)
    assert "no such folder. Did you mean 'pictures'?" in error_of(tmp_path, image_directory=tmp_path / "picture")
    assert "is a file, not a folder" in error_of(tmp_path, image_directory=folder / "a.png")
    path = write_toml(tmp_path / "d.toml", {"resolution": 64}, {"image_directory": folder})
    with pytest.raises(UserError, match="caption_extension is missing"):
        find_sources(load_config(path)[0])


def test_a_caption_that_is_not_utf8_is_named(tmp_path: Path):
    folder = write_pictures(tmp_path / "i", {"a": (64, 64)})
    (folder / "a.txt").write_bytes("grün".encode("latin-1"))
    assert str(folder / "a.txt") in error_of(tmp_path, image_directory=folder)


def test_two_files_with_the_same_cache_name_are_an_error_naming_both(tmp_path: Path):
    folder = write_pictures(tmp_path / "i", {"a": (64, 64)})
    (folder / "a.jpg").write_bytes((folder / "a.png").read_bytes())
    error = error_of(tmp_path, image_directory=folder)
    assert "a.png" in error and "a.jpg" in error


def test_two_lines_of_a_list_with_the_same_cache_name_are_an_error_naming_both(tmp_path: Path):
    lines = [{"video_path": f"{name}.mp4", "caption": "x"} for name in ("1/a", "1/a_00000-013", "2/a")]
    given = {"cache_directory": "c", "target_frames": [13]}
    error = error_of(tmp_path, video_jsonl_file=write_jsonl(tmp_path / "v.jsonl", lines), **given)
    assert str(Path("1/a.mp4")) in error and f"{Path('2/a.mp4')} would share the cache files a_*" in error
    # The clips of `a` and of `a_00000-013` have names of their own.
    assert len(sources_of(tmp_path, video_jsonl_file=write_jsonl(tmp_path / "v.jsonl", lines[:2]), **given)) == 2


@pytest.mark.parametrize("ignores_case", [True, False])
def test_names_that_differ_in_case_share_files_where_the_system_ignores_it(tmp_path: Path, monkeypatch, ignores_case):
    swapped = tmp_path.with_name(tmp_path.name.swapcase())
    is_dir, samefile = Path.is_dir, Path.samefile
    if ignores_case:
        monkeypatch.setattr(Path, "is_dir", lambda path: is_dir(tmp_path if path == swapped else path))
        monkeypatch.setattr(
            Path, "samefile", lambda path, other: samefile(tmp_path if path == swapped else path, other)
        )
    lines = [{"image_path": name, "caption": "x"} for name in ("1/Cat.png", "2/cat.png")]
    given = {"image_jsonl_file": write_jsonl(tmp_path / "i.jsonl", lines), "cache_directory": tmp_path}
    if ignores_case:
        assert "Cat.png and" in error_of(tmp_path, **given)
    else:
        assert len(sources_of(tmp_path, **given)) == 2


def test_jsonl_lines_give_paths_from_the_working_directory_or_beside_the_file(tmp_path: Path):
    folder = write_pictures(tmp_path / "i", {"a": (64, 64), "b": (64, 64)})
    lines = ['{"image_path": "i/b.png", "caption": " one "}', "", "  ", '{"image_path_0": "%s", "caption": ""}']
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(lines) % (folder / "a.png").as_posix(), encoding="utf-8")
    found = sources_of(tmp_path, image_jsonl_file=path, cache_directory="c")
    assert [(source.path, source.caption) for source in found] == [(folder / "b.png", "one"), (folder / "a.png", "")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops}", "line 3: is not valid JSON"),
        ("[1]", "line 3: must be an object"),
        (
            '{"image_path": "a.png", "captoin": "x"}',
            "line 3: caption is missing or not a text. Is captoin a typo?",
        ),
        ('{"image_path": 5, "caption": "x"}', "line 3: image_path is missing or not a text"),
        (
            '{"image_path_0": "a.png", "image_path_1": "b.png", "caption": "x"}',
            "line 3: image_path_1: Wan makes one picture",
        ),
        ('{"image_path": "", "caption": "x"}', "line 3: image_path must be a text in quotes"),
        ('{"image_path": "a\\u0000b", "caption": "x"}', "line 3: image_path holds a line break or tab"),
        (
            '{"image_path": "~nobody-here", "caption": "x"}',
            "line 3: image_path begins with ~, but there is no such user",
        ),
        ('{"image_path": "a", "control_path": null, "caption": "x"}', "line 3: control_path must be a text in quotes"),
        ("[" * 5000, "line 3: is not valid JSON"),
        ("9" * 5000, "line 3: "),
    ],
)
def test_a_bad_jsonl_line_is_named_by_its_number(tmp_path: Path, line: str, message: str):
    path = tmp_path / "list.jsonl"
    path.write_text('{"image_path": "z.png", "caption": "x"}\n\n' + line + "\n", encoding="utf-8")
    assert message in error_of(tmp_path, image_jsonl_file=path, cache_directory="c")


def test_control_pictures_go_to_the_longest_name_that_fits(tmp_path: Path):
    folder = write_pictures(tmp_path / "i", {"a": (64, 64), "a_b": (64, 64)})
    controls = write_pictures(
        tmp_path / "c", dict.fromkeys(["a", "a_1", "a_0", "a_b_0001", "a_b_0000"], (64, 64)), caption=None
    )
    found = sources_of(
        tmp_path,
        image_directory=folder,
        control_directory=controls,
        fp_1f_clean_indices=[0, 2],
        fp_1f_target_index=1,
    )
    assert {source.name: [path.stem for path in source.controls] for source in found} == {
        "a": ["a", "a_0"],
        "a_b": ["a_b_0000", "a_b_0001"],
    }


def test_a_control_picture_that_is_missing_or_misnamed_is_an_error(tmp_path: Path):
    folder = write_pictures(tmp_path / "i", {"a": (64, 64), "z": (64, 64)})
    controls = write_pictures(tmp_path / "c", {"a": (64, 64)}, caption=None)
    assert "z.png has 0 control pictures" in error_of(tmp_path, image_directory=folder, control_directory=controls)
    write_pictures(controls, {"z_mask": (64, 64)}, caption=None)
    assert "must end in a number" in error_of(tmp_path, image_directory=folder, control_directory=controls)


def test_control_videos_are_found_by_name_whatever_their_suffix(tmp_path: Path):
    for name in ("v/a.mp4", "v/b.mp4", "c/a.mp4", "c/b.mkv"):
        write_video(tmp_path / name, 1)
    for name in "ab":
        (tmp_path / "v" / f"{name}.txt").write_text("x")
    found = sources_of(tmp_path, video_directory=tmp_path / "v", control_directory=tmp_path / "c")
    assert [source.controls[0].name for source in found] == ["a.mp4", "b.mkv"]


def test_jsonl_controls_are_ordered_by_number_and_needed_on_every_line(tmp_path: Path):
    both = {"image_path": "a.png", "caption": "x", "control_path_01": "q.png", "control_path_0": "p.png"}
    keys = {"fp_1f_clean_indices": [0, 2], "fp_1f_target_index": 1}
    path = write_jsonl(tmp_path / "l.jsonl", [both])
    (source,) = sources_of(tmp_path, image_jsonl_file=path, cache_directory="c", **keys)
    assert [control.name for control in source.controls] == ["p.png", "q.png"]
    lonely = {key: both[key] for key in ("caption", "control_path_0")} | {"image_path": "b.png"}
    path.write_text(json.dumps(both) + "\n" + json.dumps(lonely))
    assert "line 2: 1 control paths, but 2" in error_of(tmp_path, image_jsonl_file=path, cache_directory="c", **keys)
    path.write_text(json.dumps({"image_path": "b.png", "caption": "x"}))
    assert "(one for each of fp_1f_clean_indices)" in error_of(
        tmp_path, image_jsonl_file=path, cache_directory="c", **keys
    )


def test_more_control_pictures_than_are_used_are_worth_one_warning(tmp_path: Path, caplog):
    keys = {"fp_1f_clean_indices": [0], "fp_1f_target_index": 1}
    folder = write_pictures(tmp_path / "i", {"a": (64, 64), "b": (64, 64)})
    controls = write_pictures(tmp_path / "c", dict.fromkeys(["a", "b_0", "b_1"], (64, 64)), caption=None)
    found = sources_of(tmp_path, image_directory=folder, control_directory=controls, **keys)
    assert [source.controls for source in found] == [(controls / "a.png",), (controls / "b_0.png",)]
    assert "more control pictures than are used: 1, the first" in caplog.text and "b.png" in caplog.text
    line = {"image_path": "a.png", "caption": "x", "control_path_0": "p.png", "control_path_1": "q.png"}
    path = write_jsonl(tmp_path / "l.jsonl", [line])
    (source,) = sources_of(tmp_path, image_jsonl_file=path, cache_directory="c", **keys)
    assert source.controls == (Path("p.png"),) and f"are used: 1, the first {path} line 1" in caplog.text


def test_a_jsonl_key_that_is_nearly_one_is_named_once_and_others_are_not(tmp_path: Path, caplog):
    line = {"video_path": "a.mp4", "caption": "x", "contol_path": "c.mp4", "seed": 5, "title": "y"}
    path = write_jsonl(tmp_path / "l.jsonl", [line, line | {"video_path": "b.mp4"}])
    assert len(sources_of(tmp_path, video_jsonl_file=path, cache_directory="c")) == 2
    assert [record.message for record in caplog.records] == [
        f"{path} line 1: contol_path is not read. Did you mean 'control_path'?"
    ]


def test_a_caption_extension_without_its_dot_is_named(tmp_path: Path):
    folder = write_pictures(tmp_path / "i", {"a": (64, 64)})
    error = error_of(tmp_path, image_directory=folder, caption_extension="txt")
    assert 'Use caption_extension = ".txt", with a dot.' in error
