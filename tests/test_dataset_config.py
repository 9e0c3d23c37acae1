import json
import re
from pathlib import Path

import pytest

from dataset.config import ImageConfig, VideoConfig, dataset_metadata, load_config
from dataset.config_keys import IMAGE, OLD_SPELLINGS, VIDEO
from tests.media import write_toml
from utils.errors import UserError


def config_text(folder: Path, text: str) -> Path:
    path = folder / "data.toml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_config(path)
    return str(error.value)


def test_a_dataset_wins_over_general_and_general_over_the_command_line(tmp_path: Path):
    general = {"resolution": 512, "enable_bucket": True, "num_repeats": 3}
    videos = {"video_directory": "v", "batch_size": 4, "resolution": [832, 480], "enable_bucket": False}
    path = write_toml(tmp_path / "d.toml", general, {"image_directory": "i"}, videos)
    image, video = load_config(path, batch_size=2)
    assert isinstance(image, ImageConfig) and isinstance(video, VideoConfig)
    assert (image.resolution, image.enable_bucket, image.batch_size, image.num_repeats) == ((512, 512), True, 2, 3)
    assert (video.resolution, video.enable_bucket, video.batch_size, video.num_repeats) == ((832, 480), False, 4, 3)


def test_what_is_not_given_has_the_documented_default(tmp_path: Path):
    (video,) = load_config(write_toml(tmp_path / "d.toml", {}, {"video_directory": "v"}))
    assert video == VideoConfig(where=video.where, cache_directory=Path("v"), video_directory=Path("v"))
    assert (video.resolution, video.batch_size, video.target_frames) == ((960, 544), 1, (1,))
    assert (video.frame_extraction, video.max_frames, video.source_fps) == ("head", 129, None)


def test_json_says_the_same_as_toml(tmp_path: Path):
    general, dataset = {"resolution": [640, 480]}, {"video_jsonl_file": "v.jsonl", "cache_directory": "c"}
    dataset |= {"target_frames": [1, 25], "source_fps": 30}
    as_toml = write_toml(tmp_path / "d.toml", general, dataset)
    as_json = tmp_path / "d.JSON"
    as_json.write_text(json.dumps({"general": general, "datasets": [dataset]}))
    one, other = load_config(as_toml)[0], load_config(as_json)[0]
    assert one.source_fps == 30.0
    assert {**vars(one), "where": ""} == {**vars(other), "where": ""}


def test_clip_lengths_are_rounded_down_to_4n_plus_1_with_a_warning(tmp_path: Path, caplog):
    path = write_toml(tmp_path / "d.toml", {}, {"video_directory": "v", "target_frames": [30, 26, 7, 1, 2]})
    assert load_config(path)[0].target_frames == (1, 5, 25, 29)
    assert "[1, 5, 25, 29]" in caplog.text


def test_an_old_spelling_is_read_as_the_new_one_with_a_warning(tmp_path: Path, caplog):
    dataset = {"image_directory": "i", "qwen_image_edit_no_resize_control": False}
    load_config(write_toml(tmp_path / "d.toml", {"resolution": 512}, dataset))
    assert "is now called no_resize_control" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('cache_directry = "c"', "line 4: cache_directry: unknown key. Did you mean 'cache_directory'?"),
        ('control_directory = "C:\\new"', "holds a line break or tab; in paths write / for \\, or put them into"),
        ("batch_size = 0", "line 4: batch_size = 0: must be a whole number of at least 1."),
        ("batch_size = true", "line 4: batch_size = true: must be a whole number of at least 1."),
        ("num_repeats = 1.5", "line 4: num_repeats = 1.5: must be a whole number of at least 1."),
        ("resolution = 512.0", "line 4: resolution = 512.0: must be one whole number or [width, height]"),
        ("resolution = [1, 2, 3]", "line 4: resolution = [1, 2, 3]: must be one whole number or [width, height]"),
        ("resolution = -5", "line 4: resolution = -5: must be one whole number or [width, height]"),
        ("resolution = [500, 500]", "Use [496, 496] or enable_bucket = true."),
        ("enable_bucket = 1", "line 4: enable_bucket = 1: must be true or false."),
        ("caption_extension = 5", "line 4: caption_extension = 5: must be a text in quotes."),
        ("prior_weight = 0", "line 4: prior_weight = 0: must be a number greater than 0."),
        ("target_frames = [1]", "line 4: target_frames: belongs in video datasets."),
        ('caption_extension = "a/b"', 'line 4: caption_extension = "a/b": must be the end of a file name'),
        ('cache_directory = "~nobody-here/c"', "begins with ~, but there is no such user"),
        ("resolution = [832, 480000]", "line 4: resolution = [832, 480000]: is too large"),
        ("num_repeats = 99999999", "line 4: num_repeats = 99999999: must be a whole number of at most 1000000."),
        ("ENABLE_BUCKET = true", "line 4: ENABLE_BUCKET: unknown key. Did you mean 'enable_bucket'?"),
        ("fp_1f_target_index = 1", "line 4: fp_1f_target_index stands alone: fp_1f_clean_indices and"),
        ("fp_1f_clean_indices = [0]\nfp_1f_target_index = 1", "there are no control pictures. Give their folder"),
        ("fp_1f_clean_indices = [0, 1]\nfp_1f_target_index = 1", "must all differ."),
        ("fp_1f_clean_indices = [0, 1, 2]\nfp_1f_target_index = 3", "one or two control pictures"),
    ],
)
def test_an_error_names_file_line_key_value_and_what_is_right(tmp_path: Path, line: str, message: str):
    path = config_text(tmp_path, f'[general]\n[[datasets]]\nimage_directory = "i"\n{line}\n')
    error = error_of(path)
    assert error.startswith(str(path)) and message in error and "\n" not in error


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('"enable_bukcet": true', "[[datasets]] 2, line 6: enable_bukcet: unknown key. Did you mean 'enable_bucket'?"),
        ('"enable_bucket":\n 1', "[[datasets]] 2, line 6: enable_bucket = 1: must be true or false."),
        ('"batch_size": 1, "batch_size": 2', "is not valid JSON (the key batch_size stands there twice)"),
        ('"batch_size": 1,', "is not valid JSON (Expecting property name"),
    ],
)
def test_an_error_in_a_json_file_names_the_line_too(tmp_path: Path, entry: str, message: str):
    path = tmp_path / "data.json"
    general = '{"general": {"resolution": 64, "batch_size": 3},\n"datasets": [\n'
    first = '{"image_directory": "enable_bukcet\\"}{",\n "enable_bucket": true},\n'
    path.write_text(f'{general}{first}{{"image_directory": "j",\n{entry}}}]}}')
    assert message in (error := error_of(path)) and "\n" not in error


@pytest.mark.parametrize(
    ("dataset", "idle"),
    [
        ({"image_directory": "i", "multiple_target": True}, "line 5: multiple_target (Wan makes one picture"),
        ({"image_directory": "i", "fp_1f_no_post": True}, "line 5: fp_1f_no_post (FramePack's, not Wan's)"),
        ({"image_directory": "i", "no_resize_control": True}, "no_resize_control (there is no control_directory)"),
        ({"image_directory": "i", "bucket_no_upscale": True}, "bucket_no_upscale (it needs enable_bucket = true)"),
        ({"video_directory": "v", "frame_stride": 4}, 'frame_stride (it belongs to frame_extraction = "slide")'),
        ({"video_directory": "v", "video_jsonl_file": "l"}, "video_jsonl_file (the directory beside it wins)"),
        (
            {"video_jsonl_file": "l", "cache_directory": "c", "control_directory": "d"},
            "control_directory (in a JSONL file each line names its control_path)",
        ),
        ({"video_directory": "v", "frame_extraction": "slide", "frame_stride": 4, "enable_bucket": True}, None),
    ],
)
def test_keys_that_change_nothing_are_named_in_one_warning(tmp_path: Path, dataset: dict, idle: str | None, caplog):
    assert load_config(write_toml(tmp_path / "d.toml", {"resolution": 64}, dataset))
    assert [idle in message for message in caplog.messages] == ([True] if idle else [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'frame_extraction = "unifrom"',
            'frame_extraction = "unifrom": must be one of head, chunk, slide, uniform, full',
        ),
        ("target_frames = 25", "target_frames = 25: must be a list of whole numbers"),
        ("target_frames = [0]", "target_frames = [0]: must be a whole number of at least 1."),
        ("frame_sample = 0", "frame_sample = 0: must be a whole number of at least 1."),
        ('source_fps = "30"', 'source_fps = "30": must be a number of frames per second'),
        ("source_fps = 0", "source_fps = 0: must be a number of frames per second"),
        ("fp_1f_target_index = 1", "fp_1f_target_index: belongs in image datasets."),
    ],
)
def test_an_error_in_a_video_dataset_names_key_and_value(tmp_path: Path, line: str, message: str):
    assert message in error_of(config_text(tmp_path, f'[[datasets]]\nvideo_directory = "v"\n{line}\n'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[general]", "has no [[datasets]] entry"),
        ("datasets = []", "has no [[datasets]] entry"),
        ("datasets = 3", "datasets: must be [[datasets]] tables."),
        ('[[datasets]]\ncaption_extension = ".txt"', "names no media. Give image_directory, image_jsonl_file,"),
        ('[[datasets]]\nimage_jsonl_file = "a.jsonl"', "cache_directory is missing; a JSONL dataset needs one."),
        (
            '[general]\ncache_directory = "c"\n[[datasets]]',
            "cache_directory: belongs in a [[datasets]] entry, not in [general].",
        ),
        ("[genral]\n[[datasets]]\n", "genral: unknown key. Did you mean 'general'?"),
        ("[[datasets]]\nimage_directory = oops", "Texts and paths stand in quotes"),
        ('[[datasets]]\nimage_directory = "C:\\Users"', "In paths write / for \\, or put them into 'single quotes'"),
        ('[[datasets]]\nvideo_directroy = "v"', "video_directroy: unknown key. Did you mean 'video_directory'?"),
        ('[[datasets]]\nvideo_directroy = "v"\nmax_frames = 9', "video_directroy: unknown key. Did you mean"),
        ('[[datasets]]\nimage_directory = "a"\nresolution = 16\nenable_bucket = true', "the area must be at least"),
    ],
)
def test_a_file_that_makes_no_sense_as_a_whole_is_refused_in_a_line(tmp_path: Path, text: str, message: str):
    error = error_of(config_text(tmp_path, text))
    assert message in error and "\n" not in error


def test_validation_datasets_take_the_same_keys_and_say_where_they_are_wrong(tmp_path: Path, caplog):
    text = '[general]\nnum_repeats = 3\n[[datasets]]\nimage_directory = "i"\n[[ validation ]]\nvideo_directory = "v"\n'
    trained, measured = load_config(config_text(tmp_path, text))
    assert (trained.validation, trained.num_repeats, measured.validation, measured.num_repeats) == (False, 3, True, 1)
    assert isinstance(measured, VideoConfig) and measured.where.endswith("data.toml: validation 1")
    assert not caplog.messages
    load_config(config_text(tmp_path, f"{text}num_repeats = 2\nprior_weight = 2\n"))
    assert "line 7: num_repeats (each example is measured once); line 8: prior_weight" in caplog.text
    error = error_of(config_text(tmp_path, f"{text}target_frame = [5]\n"))
    assert "[[validation]] 1, line 7: target_frame: unknown key. Did you mean 'target_frames'?" in error
    assert "is also that of" in error_of(config_text(tmp_path, text.replace('"v"', '"v"\ncache_directory = "i"')))
    assert "must be [[validation]] tables" in error_of(config_text(tmp_path, "validation = 3\n" + text.split("[[ ")[0]))
    as_json = tmp_path / "data.json"
    as_json.write_text(
        '{"datasets": [{"image_directory": "i"}],\n"validation": [\n{"image_directory": "j", "bach": 1}]}'
    )
    assert "[[validation]] 1, line 3: bach: unknown key" in error_of(as_json)


def test_two_datasets_may_not_share_a_cache_folder_however_it_is_written(tmp_path: Path):
    videos = {"video_directory": "v", "cache_directory": f"{tmp_path}/x/../c/"}
    images = {"image_directory": "i", "cache_directory": f"{tmp_path}/c"}
    error = error_of(write_toml(tmp_path / "d.toml", {"resolution": 512}, images, videos))
    assert "is also that of" in error and "dataset 1" in error and "dataset 2" in error


def test_the_dataset_file_must_be_there_and_be_toml_or_json(tmp_path: Path):
    assert error_of(tmp_path / "nowhere.toml").startswith("--dataset_config")
    (tmp_path / "d.yaml").write_text("datasets:")
    assert "must be a .toml or .json file" in error_of(tmp_path / "d.yaml")
    with pytest.raises(UserError, match="--dataset_config is missing"):
        load_config(None)


def test_metadata_tells_names_of_folders_but_not_where_they_are(tmp_path: Path):
    dataset = {"video_directory": tmp_path / "private" / "walks", "target_frames": [1, 81], "source_fps": 24}
    entry = dataset_metadata(load_config(write_toml(tmp_path / "d.toml", {}, dataset))[0])
    assert entry["video_directory"] == "walks" and entry["target_frames"] == [1, 81] and entry["source_fps"] == 24.0
    assert str(tmp_path) not in json.dumps(entry)


def test_every_example_in_the_docs_is_a_valid_dataset_file(tmp_path: Path):
    page = (Path(__file__).parent.parent / "docs" / "dataset_config.md").read_text(encoding="utf-8")
    examples = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(examples) >= 6 and all(load_config(config_text(tmp_path, text)) for text in examples)


def test_the_docs_have_an_example_and_a_line_for_every_key():
    page = (Path(__file__).parent.parent / "docs" / "dataset_config.md").read_text(encoding="utf-8")
    examples = "\n".join(re.findall(r"```toml\n(.*?)```", page, re.DOTALL))
    table = page[page.index("## Every key") :]
    keys = IMAGE.keys() | VIDEO.keys()
    assert {key for key in keys if not re.search(rf"^{key} = ", examples, re.MULTILINE)} == set()
    assert {key for key in keys | OLD_SPELLINGS.keys() if f"`{key}`" not in table} == set()
