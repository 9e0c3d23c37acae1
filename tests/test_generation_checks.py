"""Every missing or wrong option of every task is one line before a model loads, and no prompt line is a traceback."""

import contextlib
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import wan_generate_video
from utils.errors import UserError
from utils.processes import Processes
from wan.configs import TASKS

DITS = {
    "t2v-1.3B": "dit_t2v",
    "t2v-14B": "dit_t2v",
    "t2i-14B": "dit_t2v",
    "i2v-14B": "dit_i2v",
    "flf2v-14B": "dit_flf2v",
    "t2v-1.3B-FC": "dit_fun",
    "t2v-14B-FC": "dit_fun",
    "i2v-14B-FC": "dit_fun",
    "t2v-A14B": "dit_t2v",
    "i2v-A14B": "dit_i2v_a14b",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A start image, an end image, and a folder with the frames of a control video."""
    folder = tmp_path_factory.mktemp("pictures")
    ramp = np.linspace(0, 255, 96 * 64 * 3).astype(np.uint8).reshape(64, 96, 3)
    for name in ("start.png", "end.png", "control/0.png", "control/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(ramp).save(folder / name)
    Image.new("L", (5000, 2)).save(folder / "strip.png")
    return folder


@pytest.fixture
def plan(models, pictures, nothing_loads, monkeypatch, tmp_path):
    """Check a command line of a task: what it needs, with the given options in their place; None leaves one out."""

    def run(of, **options):
        config = TASKS[of]
        given = {"task": of, "prompt": "a red circle", "save_path": tmp_path / "out", "device": "cpu"}
        given |= {
            "dit": models[DITS[of]],
            "vae": models["vae"],
            "t5": models["t5"],
            "t5_tokenizer": models["tokenizer"],
        }
        given |= {"clip": models["clip"]} if config.clip and config.images else {}
        given |= {"image_path": pictures / "start.png"} if "first" in config.images else {}
        given |= {"end_image_path": pictures / "end.png"} if "last" in config.images else {}
        given |= {"control_path": pictures / "control"} if config.control else {}
        given |= {"video_length": 1, "video_size": "32 48", **options}
        words = []
        for name, value in given.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None:
                words += [
                    f"--{name}",
                    *(str(value).split() if name in ("video_size", "lora_multiplier") else [str(value)]),
                ]
        monkeypatch.setattr(sys, "argv", ["wan_generate_video.py", *words])
        return wan_generate_video.plan_run(Processes())

    return run


# What is wrong for every task, and how the line begins; names in braces are those of tiny models and pictures.
EVERYWHERE = [
    ({"prompt": None}, "--prompt is missing"),
    ({"prompt": "  "}, "--prompt is missing"),
    ({"save_path": None}, "--save_path is missing"),
    ({"dit": None}, "--dit is missing"),
    ({"t5": None}, "--t5 is missing"),
    ({"vae": None}, "--vae is missing"),
    ({"dit": "nowhere.safetensors"}, "--dit nowhere.safetensors: no such file"),
    ({"dit": "{vae}"}, "--dit {vae}: "),
    ({"t5": "{vae}"}, "--t5 {vae}: "),
    ({"vae": "{t5}"}, "--vae {t5}: "),
    ({"t5_tokenizer": "nowhere"}, "--t5_tokenizer nowhere: no such"),
    ({"t5_tokenizer": "{vae}"}, "--t5_tokenizer {vae}: "),
    ({"task": "t2v-13B"}, "--task: invalid choice: 't2v-13B'"),
    ({"video_size": "40 48"}, "--video_size 40 48: 40 pixels high is not a multiple of 16. Use 32 or 48."),
    ({"video_size": "32 0"}, "--video_size 32 0: 0 pixels wide"),
    ({"video_size": "-32 48"}, "--video_size"),
    ({"video_size": "32"}, "--video_size: expected 2 arguments"),
    ({"video_size": "32 99999984"}, "--video_size 32 99999984: more than 16384 pixels"),
    ({"video_length": 0}, "--video_length 0: at least one frame"),
    ({"video_length": 99999}, "--video_length 99999: more than 4093 frames"),
    ({"infer_steps": 0}, "--infer_steps 0: at least one step"),
    ({"infer_steps": "2.5"}, "--infer_steps: '2.5' is not a whole number"),
    ({"flow_shift": 0}, "--flow_shift 0.0: must be above 0"),
    ({"flow_shift": "1e9", "infer_steps": 1000}, "--flow_shift 1000000000.0 with --infer_steps 1000"),
    ({"guidance_scale": "nan"}, "--guidance_scale nan: not a usable number"),
    ({"guidance_scale": "five"}, "--guidance_scale: 'five' is not a number"),
    ({"seed": -1}, "--seed -1: must be 0 or more"),
    ({"from_file": "nowhere.txt"}, "--from_file nowhere.txt: no such file"),
    ({"sample_solver": "euler"}, "--sample_solver: invalid choice: 'euler'"),
    ({"timesteps": "1000,500"}, "--timesteps: not with --sample_solver unipc"),
    ({"cfg_skip_mode": "erly"}, "--cfg_skip_mode: invalid choice: 'erly' (choose"),
    ({"cfg_apply_ratio": -0.5}, "--cfg_apply_ratio -0.5: must be from 0 to 1"),
    ({"cfg_zero_star": True, "cfg_zero_init_steps": -1}, "--cfg_zero_init_steps -1: must be from 0 to "),
    ({"slg_mode": "both"}, "--slg_mode: invalid choice: 'both'"),
    ({"slg_mode": "uncond", "slg_layers": "9;10"}, "--slg_layers 9;10: not numbers"),
    ({"slg_mode": "uncond", "slg_layers": "99"}, "--slg_layers 99: there is no block 99"),
    ({"slg_end": 2}, "--slg_end 2.0: must be from 0 to 1"),
    ({"step_cache": "teacache"}, "--step_cache teacache: its polynomial is not known for a model of other sizes than"),
    ({"step_cache": "easycash"}, "--step_cache: invalid choice: 'easycash'"),
    ({"riflex_freq_index": 99}, "--riflex_freq_index 99: this DiT's frequencies along time are"),
    ({"lora_weight": "nowhere.safetensors"}, "--lora_weight nowhere.safetensors: no such file"),
    ({"lora_weight": "{vae}"}, "--lora_weight {vae}: "),
    ({"lora_multiplier": "1 1"}, "--lora_multiplier: 2 numbers for 0 LoRA files"),
    ({"device": "cuda:x"}, "--device cuda:x: "),
    ({"attn_mode": "flash4"}, "--attn_mode: invalid choice: 'flash4'"),
    ({"blocks_to_swap": 99}, "--blocks_to_swap 99: the DiT has"),
    ({"output_type": "film"}, "--output_type: invalid choice: 'film'"),
    ({"fps": 0}, "--fps 0: must be from 1"),
    ({"trim_tail_frames": -1}, "--trim_tail_frames -1: must be 0 or more"),
    ({"prompts": "a cat"}, "--prompts: unknown option"),
    ({"output_type": "latent", "preview": 1, "vae": None}, "--vae is missing"),
    ({"clip": "nowhere.safetensors"}, "--clip nowhere.safetensors: no such file"),
]
# What is wrong for tasks that have, or that lack, something:
NO_IMAGE, IMAGE = ("t2v-14B", "t2i-14B", "t2v-14B-FC", "t2v-A14B"), ("i2v-14B", "flf2v-14B", "i2v-14B-FC", "i2v-A14B")
CLIP, CONTROL = ("i2v-14B", "flf2v-14B", "i2v-14B-FC"), ("t2v-1.3B-FC", "t2v-14B-FC", "i2v-14B-FC")
BY_TASK = [
    (NO_IMAGE, {"image_path": "{start}"}, "--image_path: {task} takes no start image. Use --task i2v-14B or"),
    (NO_IMAGE, {"end_image_path": "{end}"}, "--end_image_path: {task} takes no end image"),
    (IMAGE, {"image_path": None}, "--image_path is missing: {task} needs a start image"),
    (IMAGE, {"image_path": "nowhere.png"}, "--image_path nowhere.png: no such file"),
    (
        IMAGE,
        {"image_path": "{strip}", "video_size": "480 832"},
        "--image_path {strip}: a video in its shape would be 31584 wide and 16 high",
    ),
    (IMAGE, {"image_path": "{vae}"}, "--image_path {vae}: not a readable picture"),
    (("flf2v-14B",), {"end_image_path": None}, "--end_image_path is missing: flf2v-14B needs an end image"),
    (("i2v-14B", "flf2v-14B"), {"end_image_path": "nowhere.png"}, "--end_image_path nowhere.png: no such file"),
    (("i2v-14B-FC",), {"end_image_path": "{end}"}, "--end_image_path: is not available with i2v-14B-FC"),
    (CLIP, {"clip": None}, "--clip is missing"),
    (CLIP, {"clip": "nowhere.safetensors"}, "--clip nowhere.safetensors: no such file"),
    (CLIP, {"clip": "{t5}"}, "--clip {t5}: "),
    (CONTROL, {"control_path": None}, "--control_path is missing: {task} needs a control video"),
    (CONTROL, {"control_path": "nowhere.mp4"}, "--control_path nowhere.mp4: no such file"),
    (CONTROL, {"control_path": "{vae}"}, "--control_path {vae}: cannot be read"),
    (CONTROL, {"video_length": 5}, "--control_path {control}: 2 frames, the video is to have 5"),
    (
        ("t2v-14B", "i2v-14B", "i2v-A14B"),
        {"control_path": "{control}"},
        "--control_path: {task} takes no control video",
    ),
    (("t2v-14B",), {"output_type": "latent", "vae": "nowhere.safetensors"}, "--vae nowhere.safetensors: no such file"),
    (("t2i-14B",), {"video_length": 5}, "--video_length 5: t2i-14B makes one picture"),
    (("t2v-14B", "i2v-14B"), {"guidance_scale_high_noise": 3}, "--guidance_scale_high_noise: {task} has one model"),
    (("t2v-A14B",), {"guidance_scale_high_noise": "inf"}, "--guidance_scale_high_noise inf: not a usable number"),
    # Weights of another task.
    (("t2v-14B", "t2i-14B", "t2v-1.3B-FC", "i2v-14B-FC", "flf2v-14B"), {"dit": "{dit_i2v}"}, "--dit {dit_i2v}: "),
    (("i2v-14B", "flf2v-14B", "t2v-14B-FC", "i2v-A14B"), {"dit": "{dit_t2v}"}, "--dit {dit_t2v}: "),
    (("t2v-14B", "i2v-14B"), {"dit": "{dit_fun}"}, "--dit {dit_fun}: "),
    (("i2v-A14B",), {"dit": "{dit_i2v}"}, "--dit {dit_i2v}: "),
]
ROWS = [(task, *row) for task in TASKS for row in EVERYWHERE]
ROWS += [(task, options, line) for tasks, options, line in BY_TASK for task in tasks]


@pytest.mark.parametrize("task", TASKS)
def test_a_command_with_all_that_its_task_needs_is_planned(plan, task):
    requests, *_, results, outputs = plan(task)
    assert (len(requests), len(results), outputs.fps) == (1, 1, 16)


@pytest.mark.parametrize("task", TASKS)
def test_each_missing_or_wrong_option_is_one_line_before_any_model_loads(plan, models, pictures, task):
    names = {**models, "control": pictures / "control", "task": task}
    names |= {name: pictures / f"{name}.png" for name in ("start", "end", "strip")}
    wrong = []
    for of, options, line in ROWS:
        if of == task:
            filled = {key: value.format(**names) if isinstance(value, str) else value for key, value in options.items()}
            try:
                plan(task, **filled)
                said = "nothing"
            except UserError as error:
                said = str(error)
            if not said.startswith(line.format(**names)) or "\n" in said:
                wrong.append((options, said))
    assert not wrong


LETTERS = [*"whfdsgln", "fs", "i", "ei", "ci", "cim", "cn", "of", "W", "zz", ""]
VALUES = [
    "16",
    "32",
    "0",
    "-5",
    "1e3",
    "5.0",
    "nan",
    "inf",
    "1_0",
    "９",
    "x",
    "",
    "a b",
    "None",
    "nowhere.png",
    "\0",
    "9" * 40,
]
PIECE = st.tuples(st.sampled_from(LETTERS), st.one_of(st.sampled_from(VALUES), st.text(max_size=8))).map(
    lambda piece: f" --{piece[0]} {piece[1]}"
)
LINE = st.tuples(st.sampled_from(["a cat", "# no", "", "--w 5", "n is a letter"]), st.lists(PIECE, max_size=5)).map(
    lambda parts: parts[0] + "".join(parts[1])
)


def test_no_prompt_line_is_a_traceback(plan, monkeypatch):
    # What is looked at only once for all lines takes most of the time.
    monkeypatch.setattr("modules.generation_plan.check_vae", lambda path: None)
    seen = {"planned": 0, "refused": 0}

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(["t2v-1.3B", "i2v-14B", "t2i-14B", "t2v-1.3B-FC"]), st.lists(LINE, min_size=1, max_size=2))
    def check(task, lines):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prompts.txt"
            with contextlib.suppress(UnicodeEncodeError):
                path.write_text("\n".join(lines), encoding="utf-8")
                try:
                    plan(task, prompt=None, video_length=None if "\n" in task else 1, from_file=path)
                    seen["planned"] += 1
                except UserError as error:
                    assert str(error)
                    seen["refused"] += 1

    check()
    assert min(seen.values()) > 20, seen
