"""Samples during training: prompt files, when they are due, and that they are what generation gives."""

import gc
import json
import random
import shlex
import sys
from dataclasses import fields, replace

import av
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import wan_generate_video
from modules.generation import generate
from modules.generation_options import LoraOptions, Models, RunOptions, SamplingOptions
from modules.lora_training import NetworkOptions, TrainedLora
from modules.one_frame import Control, OneFrame
from modules.outputs import Files, OutputOptions, Result
from modules.run_log import read_log
from modules.run_logs import LoggingOptions
from modules.samples import LiveModels, SampleOptions, SamplePlan, Sampler, plan_samples, read_samples
from modules.train_options import TrainOptions
from modules.trainer import make_trainer
from networks import lora_wan
from utils.errors import UserError
from utils.options import parse_options
from wan.clip import ClipOptions
from wan.configs import TASKS
from wan.dit_file import DitOptions
from wan.t5 import T5Options
from wan.vae import VaeOptions

LINE = "a red circle --w 40 --h 32 --f 1 --d 7 --s 3 --l 4 --fs 3 --n blue"


@pytest.fixture
def trainer(models, golden, tmp_path):
    """Return the Trainer of a run that may make samples; extra options and the lines of its prompt file given."""
    text = json.loads((golden / "cache_index.json").read_text())["plans"]["t2v"]["toml"]
    (tmp_path / "data.toml").write_text(text.replace("<GOLDEN>", golden.as_posix()))

    def make(options="", lines=(LINE,), folder="out"):
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / "prompts.txt").write_text("\n".join(lines))
        paths = {
            "dit": models["dit_t2v"],
            "vae": models["vae"],
            "t5": models["t5"],
            "t5_tokenizer": models["tokenizer"],
        }
        paths |= {"dataset_config": tmp_path / "data.toml", "output_dir": tmp_path / folder}
        base = "--task t2v-1.3B --max_data_loader_n_workers 0 --output_name n --seed 3 --network_dropout 0.1"
        words = shlex.split(f"{base} --learning_rate 1e-3 {options.replace('PROMPTS', str(tmp_path / 'prompts.txt'))}")
        words += [str(word) for name, path in paths.items() for word in (f"--{name}", path)]
        groups = [field.type for field in fields(TrainOptions)]
        *options, network, logs = parse_options("doc", *groups, NetworkOptions, LoggingOptions, argv=words)
        return make_trainer(TrainOptions(*options), TrainedLora(network), logs)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def _files(folder):
    return sorted(path.name for path in (folder / "sample").iterdir())


def test_a_sample_of_an_untrained_lora_is_what_generation_gives(trainer, tmp_path):
    run = trainer("--sample_prompts PROMPTS --sample_at_first --max_train_steps 1")
    (path,) = run.sampler.make(run.dit, run.module, 0, 0)
    plan = run.plan.samples
    result = Result(Files(images=tmp_path / "generated.png"), 1)
    generate([plan.samples[0].request], plan.models, SamplingOptions(), [result], OutputOptions())
    assert np.array_equal(np.array(Image.open(path)), np.array(Image.open(tmp_path / "generated.png")))
    assert Image.open(path).size == (32, 32), "sizes are rounded down to multiples of 16"


def test_samples_come_when_they_are_due_and_leave_training_as_it_is(trainer, tmp_path):
    options = "--max_train_epochs 2"
    trainer(options, folder="plain").run()
    due = "--sample_at_first --sample_every_n_steps 5 --sample_every_n_epochs 1"
    trainer(
        f"{options} --sample_prompts PROMPTS {due}", [LINE, "no seed --w 32 --h 32 --f 5 --s 2 --l 1"], "sampled"
    ).run()
    first, second = (load_file(tmp_path / folder / "n.safetensors") for folder in ("plain", "sampled"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    names = _files(tmp_path / "sampled")
    assert {name.split("_")[1] for name in names} == {"000005", "000010", "e000000", "e000001", "e000002"}
    assert sum(name.endswith("_7_000.png") for name in names) == sum(name.endswith(".mp4") for name in names) == 5


def test_the_end_of_an_epoch_on_a_sampled_step_is_not_sampled_twice():
    sampler = Sampler.__new__(Sampler)
    options = SampleOptions(sample_every_n_steps=5, sample_every_n_epochs=2)
    sampler.plan, sampler._last_step = SamplePlan(options, (), None, None, "n"), -1
    assert [step for step in range(1, 12) if sampler.due(step)] == [5, 10]
    assert sampler.due(14, 2) and not sampler.due(14, 3) and not sampler.due(0, 0)
    sampler._last_step = 14
    assert not sampler.due(14, 2)
    sampler.plan = replace(sampler.plan, options=SampleOptions(sample_at_first=True))
    assert sampler.due(0, 0) and not sampler.due(7) and not sampler.due(7, 1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", f"# a comment\n\n{LINE}\nI am a robot\n"),
        ("p.json", json.dumps([LINE, {"prompt": "I am a robot"}])),
        (
            "p.toml",
            "[prompt]\nwidth = 40\nheight = 32\nframe_count = 1\nseed = 7\nsample_steps = 3\ncfg_scale = 4\n"
            'discrete_flow_shift = 3\nnegative_prompt = "blue"\n[[prompt.subset]]\nprompt = "a red circle"\n',
        ),
    ],
)
def test_prompt_files_of_every_kind_say_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    samples = read_samples(tmp_path / name, TASKS["t2v-1.3B"])
    request = samples[0].request
    assert (request.prompt, request.negative_prompt) == ("a red circle", "blue")
    assert (request.width, request.height, request.frames, request.steps) == (32, 32, 1, 3)
    assert (request.flow_shift, request.guidance_scale, request.seed, samples[0].seeded) == (3, 4, 7, True)
    if len(samples) > 1:
        plain = samples[1].request
        assert (plain.prompt, plain.width, plain.frames, plain.steps) == ("I am a robot", 256, 1, 20)
        assert (plain.flow_shift, plain.guidance_scale, samples[1].seeded) == (14.5, 5, False)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("p.txt", "a --f 0", ", prompt 1: --video_length 0: at least one frame is needed."),
        ("p.txt", "# nothing", ": there is no prompt in it. Write one on each line."),
        ("p.md", "a", ": unknown kind of file. Use .txt, .toml, .json."),
        ("p.json", '{"prompt": "a"}', ": cannot be read (it must be a list of texts and objects)."),
        ("p.json", '[{"promt": "a"}]', ", prompt 1: 'promt': unknown key. Did you mean 'prompt'?"),
        ("p.json", '[{"prompt": "a", "seed": "x"}]', ", prompt 1: a value is of the wrong type (invalid literal"),
        ("p.txt", "a --of target_index=1", ", prompt 1: --one_frame_inference: t2v-1.3B is no model for it."),
        ("p.txt", "a --ci x.png", ", prompt 1: --control_image_path: is for one-frame inference."),
        ("p.txt", "a --i x.png", ", prompt 1: --image_path: t2v-1.3B takes no start image."),
    ],
)
def test_what_is_wrong_in_a_prompt_file_is_named(tmp_path, name, text, line):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_samples(tmp_path / name, TASKS["t2v-1.3B"])
    assert str(error.value).startswith(f"--sample_prompts {tmp_path / name}{line}")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--sample_every_n_steps 5", "--sample_prompts is missing. Give a file of prompts"),
        ("--sample_prompts PROMPTS --sample_every_n_steps 0", "--sample_every_n_steps 0: must be at least 1."),
        ("--sample_prompts PROMPTS --sample_at_first --sample_fps 0", "--sample_fps 0: must be from 1 to 1000."),
        ("--one_frame", "--one_frame: the caches are not of one-frame training. Run wan_cache_latents.py --one_frame."),
        ("--sample_prompts nowhere.txt --sample_at_first", "--sample_prompts nowhere.txt: no such file."),
    ],
)
def test_samples_that_are_impossible_are_refused_before_the_model_loads(trainer, nothing_loads, options, line):
    with pytest.raises(UserError) as error:
        trainer(options)
    assert str(error.value).startswith(line)


def test_samples_and_training_are_the_same_with_swapped_blocks(trainer, tmp_path):
    due = "--max_train_epochs 1 --sample_prompts PROMPTS --sample_at_first --sample_every_n_steps 3"
    for folder, swap in (("plain", ""), ("swapped", "--blocks_to_swap 2 --block_swap_ring_size 1")):
        trainer(f"{due} {swap}", folder=folder).run()
    loras = [load_file(tmp_path / folder / "n.safetensors") for folder in ("plain", "swapped")]
    assert all(torch.equal(loras[0][key], loras[1][key]) for key in loras[0])
    plain, swapped = (sorted((tmp_path / folder / "sample").iterdir()) for folder in ("plain", "swapped"))
    assert len(plain) == len(swapped) == 3
    for first, second in zip(plain, swapped, strict=True):
        assert np.array_equal(np.array(Image.open(first)), np.array(Image.open(second)))


def test_an_image_model_samples_from_its_picture(models, tmp_path):
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "start.png")
    (tmp_path / "p.txt").write_text(f"{LINE} --i {tmp_path / 'start.png'} --f 5")
    config = TASKS["i2v-14B"]
    dit, vae, t5 = DitOptions("i2v-14B", models["dit_i2v"]), VaeOptions(models["vae"]), T5Options(models["t5"])
    encoders = (vae, replace(t5, t5_tokenizer=models["tokenizer"]), ClipOptions(models["clip"]))
    where = Models(config, torch.device("cpu"), dit, *encoders, LoraOptions(), RunOptions())
    plan = SamplePlan(SampleOptions(), tuple(read_samples(tmp_path / "p.txt", config)), where, tmp_path, "n")
    sampler = Sampler(plan)
    assert sampler.conditions[0].y.shape[0] == 20 and sampler.conditions[0].image_features.shape == (1, 257, 1280)
    (path,) = sampler.make(where.load_dit(), torch.nn.Identity(), 3)
    assert path.name.startswith("n_000003_00_") and path.suffix == ".mp4" and path.stat().st_size > 500


# ---------------------------------------------------------------------------------------- the same as generation's
@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "start.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 48, 3), np.uint8)).save(path)
    return path


COMMON = "--w 48 --h 32 --d 7 --s 2 --l 4 --fs 3 --n dark"


@pytest.mark.parametrize(
    ("task", "dit", "line", "options"),
    [
        ("t2v-1.3B", "dit_t2v", f"a circle {COMMON} --f 5", {"video_length": 5}),
        ("t2v-1.3B", "dit_t2v", f"a circle {COMMON} --f 1", {"video_length": 1, "output_type": "images"}),
        ("i2v-14B", "dit_i2v", f"a circle {COMMON} --f 5 --i PIC", {"video_length": 5, "image_path": "PIC"}),
        (
            "i2v-14B",
            "dit_i2v",
            f"a circle {COMMON} --f 5 --i PIC --ei PIC",
            {"video_length": 5, "image_path": "PIC", "end_image_path": "PIC"},
        ),
        (
            "t2v-1.3B-FC",
            "dit_fun",
            f"a circle {COMMON} --f 1 --cn FOLDER",
            {"video_length": 1, "control_path": "FOLDER", "output_type": "images"},
        ),
        (
            "flf2v-14B",
            "dit_flf2v",
            f"a circle {COMMON} --f 1 --i PIC --ei PIC --ci PIC --ci PIC --of target_index=1,control_index=0;2",
            {
                "image_path": "PIC",
                "end_image_path": "PIC",
                "control_image_path": ["PIC", "PIC"],
                "one_frame_inference": "control_index=0;2,target_index=1",
                "output_type": "images",
            },
        ),
    ],
)
def test_a_sample_is_byte_by_byte_the_file_that_generation_writes(
    models, picture, tmp_path, monkeypatch, task, dit, line, options
):
    """An untrained model, the same prompt as a line of a prompt file and as options of wan_generate_video.py."""
    places = {"PIC": str(picture), "FOLDER": str(picture.parent)}
    for name, place in places.items():
        line = line.replace(name, place)
    (tmp_path / "p.txt").write_text(line)
    where = SampleOptions(tmp_path / "p.txt", sample_at_first=True)
    clip = ClipOptions(models["clip"] if task.startswith(("i2v", "flf2v")) else None)
    encoders = (VaeOptions(models["vae"]), T5Options(models["t5"], models["tokenizer"]), clip)
    device = torch.device("cpu")
    plan = plan_samples(where, DitOptions(task, models[dit]), encoders, RunOptions(), device, (tmp_path, "n"))
    sampler = Sampler(plan)
    (sampled,) = sampler.make(plan.models.load_dit(), torch.nn.Identity(), 0, 0)

    given = {"task": task, "dit": models[dit], "vae": models["vae"], "t5": models["t5"], "clip": clip.clip}
    given |= {"t5_tokenizer": models["tokenizer"], "prompt": "a circle", "negative_prompt": "dark"}
    given |= {"video_size": [32, 48], "seed": 7, "infer_steps": 2, "guidance_scale": 4, "flow_shift": 3}
    words = []
    for name, value in {**given, **options, "save_path": tmp_path / f"generated{sampled.suffix}"}.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(places.get(each, str(each)) for each in values)] if value is not None else []
    monkeypatch.setattr(sys, "argv", ["wan_generate_video.py", *words])
    wan_generate_video.main()
    assert sampled.read_bytes() == (tmp_path / f"generated{sampled.suffix}").read_bytes()


@pytest.mark.parametrize("series", ["step", "epoch"])
def test_a_run_that_goes_on_at_the_end_of_an_epoch_has_its_samples_and_losses_once(trainer, tmp_path, series):
    def seen():
        lines = read_log(tmp_path / "out" / "n_log.jsonl")
        return [(line["kind"], line["step"], line.get("epoch")) for line in lines]

    data = tmp_path / "data.toml"
    data.write_text("[[validation]]".join(data.read_text().rsplit("[[datasets]]", 1)))
    end = len(trainer("--max_train_epochs 1", folder="probe").loader)
    options = "--max_train_epochs 2 --sample_prompts PROMPTS --sample_every_n_epochs 1 --validate_every_n_epochs 1"
    options += " --validation_timesteps 1 --save_every_n_epochs 1 --save_state"
    if series == "step":
        options += f" --sample_every_n_steps {end} --validate_every_n_steps {end} --save_every_n_steps {end}"
    trainer(options).run()
    straight = seen()
    state = tmp_path / "out" / (f"n-step{end:08d}-state" if series == "step" else "n-000001-state")
    trainer(f"{options} --resume {state.as_posix()}").run()
    assert seen() == straight
    assert [line[1] for line in straight if line[0] == "sample"] == [end, 2 * end]
    assert [line[1] for line in straight if line[0] == "validation"] == [0, end, 2 * end]


def test_a_sample_at_a_step_is_what_the_file_of_that_step_gives(trainer, models, tmp_path):
    """The saved LoRA put beside the DiT again; merged into it, its weights would be rounded otherwise."""
    options = "--save_every_n_steps 3 --sample_every_n_steps 3 --max_train_steps 3 --sample_prompts PROMPTS"
    run = trainer(f"{options} --network_dim 4")
    run.run()
    dit = run.plan.samples.models.load_dit()
    weights = load_file(tmp_path / "out" / "n-step00000003.safetensors")
    assert max(tensor.abs().max() for name, tensor in weights.items() if "lora_up" in name) > 1e-4
    lora_wan.create_network_from_weights(weights, dit).eval().attach(dit)
    models = LiveModels(**vars(run.plan.samples.models), live=dit)
    result = Result(Files(images=tmp_path / "again.png"), 1)
    generate([run.plan.samples.samples[0].request], models, SamplingOptions(), [result], OutputOptions())
    (sampled,) = (tmp_path / "out" / "sample").iterdir()
    assert np.array_equal(np.array(Image.open(sampled)), np.array(Image.open(tmp_path / "again.png")))
    assert json.loads(Image.open(sampled).text["comment"])["training_step"] == 3


def test_samples_leave_random_numbers_modes_and_memory_as_they_were(trainer):
    run = trainer("--sample_prompts PROMPTS --sample_at_first --max_train_steps 1")

    def numbers():
        return [random.getstate(), torch.get_rng_state().tolist(), run.generator.get_state().tolist()] + list(
            np.random.get_state()[1]
        )

    def held():
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        return sum(each.untyped_storage().nbytes() for each in tensors)

    run.sampler.make(run.dit, run.module, 0, 0)  # what is kept for all times, as rotary factors are
    before, bytes_before = numbers(), held()
    run.sampler.make(run.dit, run.module, 1)
    assert numbers() == before and held() == bytes_before
    assert run.module.training and run.sampler.vae.device.type == "cpu"


def test_a_failed_sample_does_not_end_the_run(trainer, monkeypatch, tmp_path, caplog):
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modules.samples.decode_all", full)
    run = trainer("--sample_prompts PROMPTS --sample_at_first --sample_every_n_steps 1 --max_train_steps 1")
    run.run()
    assert caplog.text.count("Training goes on") == 2 and "no samples after step 1: [Errno 28]" in caplog.text
    assert (tmp_path / "out" / "n.safetensors").exists() and run.module.training


def test_sample_videos_have_16_frames_a_second_or_what_is_asked_for(trainer):
    for options, rate in (("", 16), ("--sample_fps 24", 24)):
        lines = ["a --w 32 --h 32 --f 5 --s 1 --l 1"]
        run = trainer(f"--sample_prompts PROMPTS --sample_at_first --max_train_steps 1 {options}", lines)
        (path,) = run.sampler.make(run.dit, run.module, 0, 0)
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == rate


def test_one_frame_samples_must_say_where_in_time(picture, tmp_path):
    (tmp_path / "p.txt").write_text(f"a --i {picture} --ci {picture}")
    with pytest.raises(UserError) as error:
        read_samples(tmp_path / "p.txt", TASKS["i2v-14B"], one_frame=True)
    assert "prompt 1: there is no --of, which --one_frame asks for. Add --of target_index=1,control_index=0" in str(
        error.value
    )
    entry = {"prompt": "a", "image_path": str(picture), "control_image_path": [str(picture)]}
    entry |= {"one_frame": "target_index=2,control_index=0", "control_image_mask_path": str(picture)}
    (tmp_path / "p.json").write_text(json.dumps([entry]))
    (sample,) = read_samples(tmp_path / "p.json", TASKS["i2v-14B"], one_frame=True)
    assert sample.request.one_frame == OneFrame(2, (Control(0, picture, picture),))
