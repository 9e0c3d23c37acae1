import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modules.prompts import (
    PromptOptions,
    make_request,
    parse_inference_prompt,
    parse_training_prompt,
    read_requests,
)
from utils.errors import UserError
from wan.configs import DEFAULT_NEGATIVE_PROMPT, TASKS


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "start.png"
    Image.new("RGB", (64, 48)).save(path)
    return path


def ask(task="t2v-14B", **options):
    return make_request(PromptOptions(**{"prompt": "a cat", **options}), TASKS[task])


def recorded(golden):
    return json.loads((golden / "parsing.json").read_text(encoding="utf-8"))


def test_training_lines_are_read_as_recorded(golden):
    rows = [row for row in recorded(golden)["prompts"] if "training" in row and "note" not in row]
    assert len(rows) >= 12
    for row in rows:
        assert parse_training_prompt(row["line"]) == row["training"], row["line"]


def test_inference_lines_are_read_as_recorded(golden):
    rows = [row for row in recorded(golden)["prompts"] if "inference" in row]
    assert len(rows) == 17
    for row in rows:
        assert parse_inference_prompt(row["line"]) == row["inference"], row["line"]


@pytest.mark.parametrize("line", ["I am a girl", "n is a letter", "d 5", "S 12 is a train"])
@pytest.mark.parametrize("parse", [parse_training_prompt, parse_inference_prompt])
def test_a_prompt_that_begins_like_an_option_is_a_prompt(parse, line):
    assert parse(line) == {"prompt": line}


@pytest.mark.parametrize("parse", [parse_training_prompt, parse_inference_prompt])
def test_an_unknown_letter_is_a_warning_with_its_name(parse, caplog):
    assert parse("a cat --q 5 --w 64")["prompt"] == "a cat"
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "--q" in caplog.text


def test_a_bad_number_is_named():
    with pytest.raises(UserError, match=r"prompt 'a cat': --w wide: not a whole number"):
        parse_inference_prompt("a cat --w wide")
    with pytest.raises(UserError, match=r"'--l 1.2.3' is not a number"):
        parse_training_prompt("a cat --l 1.2.3")


@given(st.lists(st.sampled_from(["a cat", " --w", " 64", " --fs 3", " --", "--n ", " x", "\t", " --I", "[", "5."])))
def test_no_line_is_a_crash(pieces):
    for parse in (parse_training_prompt, parse_inference_prompt):
        try:
            assert "prompt" in parse("".join(pieces))
        except UserError as error:
            assert str(error)


def test_task_defaults_equal_the_recorded_ones(golden, picture):
    checked = 0
    for name, want in recorded(golden)["defaults"].items():
        task, _, size = name.partition(" ")
        if not size or TASKS[task].control:
            continue
        pictures = {f"{which}_path": picture for which in ("image", "end_image")[: len(TASKS[task].images)]}
        request = ask(task, video_size=tuple(map(int, size.split("x"))), **pictures)
        got = (request.steps, request.flow_shift, request.guidance_scale, request.frames)
        assert got == tuple(want[key] for key in ("infer_steps", "flow_shift", "guidance_scale", "video_length")), name
        checked += 1
    assert checked >= 20


def test_what_is_given_goes_before_the_defaults():
    request = ask(negative_prompt="blurry", infer_steps=3, flow_shift=7.5, guidance_scale=1.0, seed=11, video_length=9)
    assert (request.negative_prompt, request.steps, request.flow_shift) == ("blurry", 3, 7.5)
    assert (request.guidance_scale, request.seed, request.frames) == (1.0, 11, 9)


def test_listed_timesteps_are_the_steps_and_are_shifted_only_on_request():
    request = ask(timesteps="1000, 757,522")
    assert (request.timesteps, request.steps, request.flow_shift) == ((1000, 757, 522), 3, 1.0)
    assert ask(timesteps="1000,").timesteps == (1000,)
    assert ask(timesteps="1000,500", flow_shift=5.0, infer_steps=2).flow_shift == 5.0
    assert ask().timesteps == () and ask().flow_shift == 5.0


@pytest.mark.parametrize("text", [None, ""])
def test_no_negative_prompt_means_the_task_s_own(text, picture):
    assert ask(negative_prompt=text).negative_prompt == DEFAULT_NEGATIVE_PROMPT
    first_and_last = ask("flf2v-14B", negative_prompt=text, image_path=picture, end_image_path=picture)
    assert first_and_last.negative_prompt == "镜头切换，" + DEFAULT_NEGATIVE_PROMPT


def test_a_random_seed_differs_from_run_to_run():
    assert len({ask().seed for _ in range(5)}) == 5


def test_the_height_comes_first():
    assert (ask(video_size=(480, 832)).width, ask(video_size=(480, 832)).height) == (832, 480)


def test_guidance_of_the_noisy_steps_is_the_task_s_unless_given():
    assert (ask("t2v-A14B").guidance_scale, ask("t2v-A14B").guidance_scale_high_noise) == (3.0, 4.0)
    given = ask("t2v-A14B", guidance_scale=1.0, guidance_scale_high_noise=2.0)
    assert (given.guidance_scale, given.guidance_scale_high_noise) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("task", "options", "line"),
    [
        ("t2v-14B", {"prompt": None}, '--prompt is missing. Give a prompt: --prompt "a cat in the rain".'),
        ("t2v-14B", {"prompt": " \t"}, "--prompt is missing"),
        ("t2v-14B", {"video_size": (16, 16400)}, "--video_size 16 16400: more than 16384 pixels, where"),
        ("t2v-14B", {"video_length": 4097}, "--video_length 4097: more than 4093 frames, where"),
        ("t2v-14B", {"video_size": (488, 832)}, "--video_size 488 832: 488 pixels high is not a multiple of 16"),
        ("t2v-14B", {"video_size": (480, 840)}, "840 pixels wide is not a multiple of 16. Use 832 or 848."),
        ("t2v-14B", {"video_size": (480, 0)}, "0 pixels wide is not a multiple of 16. Use 16 or 32."),
        (
            "t2v-14B",
            {"infer_steps": 1001},
            "--infer_steps 1001: more than 1000, which is all that the model tells apart",
        ),
        ("t2v-14B", {"timesteps": "1000,x"}, "--timesteps 1000,x: not numbers with commas between them. Write them as"),
        ("t2v-14B", {"timesteps": ""}, "--timesteps : not numbers"),
        ("t2v-14B", {"timesteps": "500,750"}, "--timesteps 500,750: must fall from at most 1000 and stay above 0"),
        ("t2v-14B", {"timesteps": "1001,750"}, "--timesteps 1001,750: must fall from at most 1000"),
        ("t2v-14B", {"timesteps": "500,nan"}, "--timesteps 500,nan: must fall from at most 1000"),
        ("t2v-14B", {"timesteps": "500,0"}, "--timesteps 500,0: must fall from at most 1000"),
        (
            "t2v-14B",
            {"timesteps": "900,50", "infer_steps": 4},
            "--infer_steps 4: --timesteps lists 2. Leave --infer_st",
        ),
        ("t2v-14B", {"infer_steps": 0}, "--infer_steps 0: at least one step is needed. The default is 50."),
        ("t2v-14B", {"flow_shift": -1.0}, "--flow_shift -1.0: must be above 0. The default is 5.0."),
        ("t2v-14B", {"flow_shift": float("nan")}, "--flow_shift nan: must be above 0"),
        ("t2v-14B", {"guidance_scale": float("inf")}, "--guidance_scale inf: not a usable number"),
        ("t2v-14B", {"video_length": 0}, "--video_length 0: at least one frame is needed. Try 81."),
        ("t2i-14B", {"video_length": 5}, "--video_length 5: t2i-14B makes one picture. Use 1, or leave it out."),
        ("t2v-14B", {"seed": -1}, "--seed -1: must be 0 or more"),
        ("t2v-14B", {"guidance_scale_high_noise": 3.0}, "--guidance_scale_high_noise: t2v-14B has one model"),
        ("i2v-14B", {}, "--image_path is missing: i2v-14B needs a start image. Give --image_path PATH."),
        ("t2v-14B", {"image_path": Path("x.png")}, "--image_path: t2v-14B takes no start image. Use --task i2v-14B or"),
        ("t2v-14B-FC", {}, "--control_path is missing: t2v-14B-FC needs a control video"),
        ("i2v-14B", {"image_path": Path("no/where.png")}, "--image_path no/where.png: no such file"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(task, options, line):
    with pytest.raises(UserError) as error:
        ask(task, **options)
    assert line in str(error.value)


@given(st.integers(16, 16384))
def test_a_size_that_is_no_multiple_of_16_is_refused_with_the_two_nearest(pixels):
    if pixels % 16 == 0:
        assert ask(video_size=(pixels, 480)).height == pixels
        return
    with pytest.raises(UserError) as error:
        ask(video_size=(480, pixels))
    below, above = (int(word) for word in re.search(r"Use (\d+) or (\d+)\.", str(error.value)).groups())
    assert below < pixels < above == below + 16 and below % 16 == 0


def test_flf2v_needs_its_end_image(picture):
    with pytest.raises(UserError, match="--end_image_path is missing: flf2v-14B needs an end image"):
        ask("flf2v-14B", image_path=picture)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_that_is_none_or_half_a_one_is_refused(tmp_path, suffix):
    whole, half, none = (tmp_path / f"{name}.{suffix}" for name in ("whole", "half", "none"))
    Image.effect_noise((64, 64), 50).save(whole)
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    none.write_text("no picture")
    assert ask("i2v-14B", image_path=whole).image == whole
    for path in (half, none):
        with pytest.raises(UserError, match=rf"--image_path .*{path.name}: not a readable picture"):
            ask("i2v-14B", image_path=path)


def test_an_unusual_size_or_length_is_only_a_warning(caplog):
    assert ask("t2v-1.3B", video_size=(256, 256), video_length=80).frames == 77
    assert "was trained at 480 832, 832 480 (height width)" in caplog.text
    assert "--video_length 80: frames come in fours after the first, so 77 are made" in caplog.text


def read_lines(tmp_path, text, task="t2v-14B", **options):
    path = tmp_path / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return read_requests(PromptOptions(from_file=path, **options), TASKS[task])


def test_every_line_of_a_file_is_a_request_of_its_own(tmp_path, picture):
    text = f"# two\n\na cat --w 832 --h 480 --s 4 --n dark\na cat --n bright --d 9 --i {picture}\n"
    first, second = read_lines(
        tmp_path, text, "i2v-14B", video_size=(256, 256), seed=3, infer_steps=8, image_path=picture
    )
    assert (first.width, first.height, first.steps, first.seed) == (832, 480, 4, 3)
    assert (second.width, second.height, second.steps, second.seed) == (256, 256, 8, 9)
    assert (first.negative_prompt, second.negative_prompt) == ("dark", "bright")
    assert (first.flow_shift, second.flow_shift) == (3.0, 5.0), "the shift follows the size of the line"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb --w 100\n", "line 2: --video_size 256 100: 100 pixels wide is not a multiple of 16"),
        ("a --f x\n", "line 1: prompt 'a': --f x: not a whole number"),
        ("a --of target_index=1\n", "line 1: --one_frame_inference: t2v-14B is no model for it"),
        ("# nothing\n", "there is no prompt in it"),
        (" --w 64\n", "line 1: --prompt is missing"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_made(tmp_path, text, line):
    with pytest.raises(UserError) as error:
        read_lines(tmp_path, text)
    assert line in str(error.value)
