"""Make the pictures of docs/gallery.md: every mode of generation, by the commands that the page shows.

python -m examples.tiny_world.gallery --folder output/gallery

Each command is printed, then run; what it makes is not made again, so a run that was stopped goes on. What has no
weights in the repository is trained first: a first-and-last-frame DiT, a Fun-Control DiT and three LoRAs.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from examples.tiny_world.training import run
from utils.errors import UserError, run_script
from utils.options import option, parse_options, suggest

FOLDER = "output/gallery"
WEIGHTS = "examples/tiny_world/weights"


@dataclass(frozen=True)
class GalleryOptions:
    """the gallery"""

    folder: Path | None = option(None, "where everything goes", required=True)
    images: Path | None = option(None, "where the pictures gallery_*.png and .gif go; left out: images/ in --folder")
    only: tuple[str, ...] = option((), "names of sections, such as v2v; left out: all, and what they need of others")


@dataclass(frozen=True)
class Section:
    """A section of the page: commands by what each makes, and the rows of its picture with their labels.

    Files are in FOLDER; a pattern, such as prompts/*.mp4, stands for all that match it.
    """

    name: str
    commands: dict[str, str]  # command > what it makes, or is needed for: where that is there it is not run
    rows: dict[str, str]  # label, or "" for the name of the file > picture or video
    moving: bool = False  # side by side in a GIF, in place of a row of frames each

    @property
    def picture(self) -> str:
        return f"gallery_{self.name}.{'gif' if self.moving else 'png'}"


def generate(words: str, save_path: str, made: str = "") -> dict[str, str]:
    """Return the command that generates with the tiny models, and what it makes, which is save_path if not told."""
    command = f"python wan_generate_video.py --config_file examples/tiny_world/generate.toml {words}"
    return {f"{command} --save_path {FOLDER}/{save_path}": made or save_path}


def train(
    script: str, task: str, dit: str, config: str, latents: str, words: str, steps: int, result: str
) -> dict[str, str]:
    """Return the commands that cache a dataset and train the file `result`; latents: options of caching latents."""
    path = Path(result)
    folder, data = f"{FOLDER}/{path.parent.as_posix()}", f"--dataset_config {FOLDER}/{config}"
    text = f"--t5 {WEIGHTS}/t5.safetensors --t5_tokenizer {WEIGHTS}/spiece.model --batch_size 16"
    return {
        f"python wan_cache_latents.py {data} --vae {WEIGHTS}/vae.safetensors {latents}--skip_existing": result,
        f"python wan_cache_text_encoder_outputs.py {data} {text} --skip_existing": result,
        f"python {script} --task {task} --dit {dit} {data} {words} --optimizer_type adamw --lr_scheduler cosine "
        f"--lr_warmup_steps 20 --max_train_steps {steps} --timestep_sampling shift --discrete_flow_shift 3.0 --seed 42 "
        f"--max_data_loader_n_workers 0 --output_dir {folder} --output_name {path.stem}": result,
    }


def train_lora(task: str, dit: str, config: str, latents: str, steps: int, result: str) -> dict[str, str]:
    words = "--learning_rate 2e-3 --network_dim 16 --network_alpha 16"
    return train("wan_train_network.py", task, dit, config, latents, words, steps, result)


RING = '--prompt "a blue ring moves left on a white background"'
STAR = '--prompt "a red star moves left on a white background"'
ZORB = '--prompt "a red zorb spins on a black background"'
CROSS = '--prompt "a green cross moves right on a gray background"'
T2V, I2V = f"{WEIGHTS}/dit_t2v.safetensors", f"{WEIGHTS}/dit_i2v.safetensors"
FROM_IMAGE = f"--task i2v-14B --dit {I2V}"
FLF2V = f"{FOLDER}/between/dit_flf2v.safetensors"  # with room for two pictures, not trained on them
FIRST, LAST = f"{FOLDER}/between/test/002_0.png", f"{FOLDER}/between/test/002_1.png"
LORA = f"{FOLDER}/zorb/lora.safetensors"
CLIP = f"--clip {WEIGHTS}/clip.safetensors"

# What several sections need.
T2I_COMMAND = generate(f"--task t2i-14B {RING} --video_length 1 --output_type images", "t2i.png")
BETWEEN = {
    f"python -m examples.tiny_world.moments --folder {FOLDER}/between --between": "between/dit_flf2v.safetensors"
}
ZORB_LORA = {
    f"python -m examples.tiny_world.draw --folder {FOLDER}/zorb --clips 12 --others 24 --shape star --motion spins "
    "--striped --background black --name zorb": "zorb/dataset.toml",
    **train_lora("t2v-1.3B", T2V, "zorb/dataset.toml", "", 300, "zorb/lora.safetensors"),
}


def t2v_section() -> Section:
    commands, rows = {}, {}
    for solver in ("unipc", "dpm++", "vanilla"):
        commands |= generate(f"{RING} --sample_solver {solver}", f"{solver}.mp4")
        rows[f"--sample_solver {solver}"] = f"{solver}.mp4"
    return Section("t2v", commands, rows)


def prompts_section() -> Section:
    words = "--from_file examples/tiny_world/prompts.txt --skip_existing"
    return Section("prompts", generate(words, "prompts", made="prompts/*.mp4"), {"": "prompts/*.mp4"})


def preview_section() -> Section:
    rows = {"the preview after the last step": "preview_preview.gif", "decoded": "preview.mp4"}
    return Section("preview", generate(f"{STAR} --preview 5", "preview.mp4"), rows)


def i2v_section() -> Section:
    commands = T2I_COMMAND | generate(f"{FROM_IMAGE} {RING} --image_path {FOLDER}/t2i.png", "i2v.mp4")
    return Section("i2v", commands, {"start image": "t2i.png", "video": "i2v.mp4"}, moving=True)


def i2v_end_section() -> Section:
    words = f"{FROM_IMAGE} {CROSS} --image_path {FIRST} --end_image_path {LAST}"
    rows = {"start image": "between/test/002_0.png", "video": "i2v_end.mp4", "end image": "between/test/002_1.png"}
    return Section("i2v_end", BETWEEN | generate(words, "i2v_end.mp4"), rows, moving=True)


def flf2v_section() -> Section:
    draw = f"python -m examples.tiny_world.draw --folder {FOLDER}/clips --clips 96 --for_training --batch_size 16"
    task, result = "flf2v-14B", "between/flf2v.safetensors"
    latents, words = f"{CLIP} --flf2v ", "--learning_rate 5e-4"
    commands = {
        **BETWEEN,
        draw: "clips/dataset.toml",
        **train("wan_train.py", task, FLF2V, "clips/dataset.toml", latents, words, 400, result),
        **generate(
            f"--task {task} --dit {FOLDER}/{result} {CROSS} --image_path {FIRST} --end_image_path {LAST}", "flf2v.mp4"
        ),
    }
    rows = {"start image": "between/test/002_0.png", "video": "flf2v.mp4", "end image": "between/test/002_1.png"}
    return Section("flf2v", commands, rows, moving=True)


def one_frame_section() -> Section:
    lora, control = "moments/lora.safetensors", f"{FOLDER}/moments/test/002_0.png"
    words = f"{FROM_IMAGE} {CROSS} --lora_weight {FOLDER}/{lora} --image_path {control} --control_image_path {control} "
    words += '--one_frame_inference "control_index=0,target_index=1" --video_length 1 --output_type images'
    commands = {
        f"python -m examples.tiny_world.moments --folder {FOLDER}/moments": "moments/dataset.toml",
        **train_lora("i2v-14B", I2V, "moments/dataset.toml", f"{CLIP} --one_frame ", 800, lora),
        **generate(words, "later.png"),
    }
    rows = {"control": "moments/test/002_0.png", "made": "later.png", "as drawn": "moments/test/002.png"}
    return Section("one_frame", commands, rows, moving=True)


def one_frame_between_section() -> Section:
    lora = "between/lora.safetensors"
    words = f"--task flf2v-14B --dit {FLF2V} {CROSS} --lora_weight {FOLDER}/{lora} --image_path {FIRST} "
    words += f"--end_image_path {LAST} --control_image_path {FIRST} {LAST} "
    words += '--one_frame_inference "control_index=0;2,target_index=1" --video_length 1 --output_type images'
    commands = {
        **BETWEEN,
        **train_lora("flf2v-14B", FLF2V, "between/dataset.toml", f"{CLIP} --one_frame ", 800, lora),
        **generate(words, "between.png"),
    }
    rows = {
        "first control": "between/test/002_0.png",
        "made": "between.png",
        "second control": "between/test/002_1.png",
        "as drawn": "between/test/002.png",
    }
    return Section("one_frame_between", commands, rows, moving=True)


def v2v_section() -> Section:
    commands, rows = generate(f"{RING} --sample_solver unipc", "unipc.mp4"), {"the video": "unipc.mp4"}
    for strength in (0.3, 0.8, 0.95):
        words = f"{STAR} --video_path {FOLDER}/unipc.mp4 --strength {strength} --infer_steps 30"
        commands |= generate(words, f"v2v_{strength}.mp4")
        rows[f"--strength {strength}"] = f"v2v_{strength}.mp4"
    return Section("v2v", commands, rows)


def control_section() -> Section:
    dit, result, config = f"{FOLDER}/paths/dit_control.safetensors", "paths/control.safetensors", "paths/dataset.toml"
    task, rows = "t2v-1.3B-FC", {}
    commands = {
        f"python -m examples.tiny_world.paths --folder {FOLDER}/paths": config,
        **train("wan_train.py", task, dit, config, "", "--learning_rate 1e-3", 450, result),
    }
    for i, what in enumerate(("a red star on a white background", "a blue square on a gray background")):
        control = f"paths/test/{i:03d}_control.mp4"
        words = f'--task {task} --dit {FOLDER}/{result} --prompt "{what}" --control_path {FOLDER}/{control}'
        commands |= generate(words, f"control_{i}.mp4")
        rows |= {f"--control_path {i:03d}_control.mp4": control, what: f"control_{i}.mp4"}
    return Section("control", commands, rows)


def lora_section() -> Section:
    commands, rows = dict(ZORB_LORA), {}
    for x in (0, 0.5, 1, 1.5):
        commands |= generate(f"{ZORB} --lora_weight {LORA} --lora_multiplier {x}", f"lora_{x}.mp4")
        rows[f"--lora_multiplier {x}"] = f"lora_{x}.mp4"
    return Section("lora", commands, rows)


def pair_section() -> Section:
    high, low = f"--lora_weight_high_noise {LORA}", f"--lora_weight {LORA}"
    commands = dict(ZORB_LORA)
    for name, loras in {"high": high, "low": low, "both": f"{low} {high}"}.items():
        words = f"--task t2v-A14B --dit_high_noise {T2V} {loras} {ZORB}"
        commands |= generate(words, f"pair_{name}.mp4")
    rows = {"LoRA for high noise": "pair_high.mp4", "for low noise": "pair_low.mp4", "for both": "pair_both.mp4"}
    return Section("pair", commands, rows)


def step_caches_section() -> Section:
    curve, rows = f"{FOLDER}/curve.json", {"every step computed": "exact.mp4"}
    commands = generate(f"{RING} --infer_steps 50 --calibrate_magcache {curve}", "exact.mp4")
    for words in ("easycache", f"magcache --magcache_curve {curve}", "teacache --teacache_coefficients=0,1,0"):
        name = words.split()[0]
        commands |= generate(f"{RING} --infer_steps 50 --step_cache {words} --compare_exact", f"{name}.mp4")
        rows[f"--step_cache {name}"] = f"{name}.mp4"
    return Section("step_caches", commands, rows)


def guidance_section() -> Section:
    commands, rows = {}, {}
    for label, name, words in (
        ("guidance alone", "plain", ""),
        ("--slg_mode original", "slg_original", " --slg_mode original --slg_layers 4"),
        ("--slg_mode uncond", "slg_uncond", " --slg_mode uncond --slg_layers 4"),
        ("CFG-Zero*", "zero_star", " --cfg_zero_star"),
    ):
        commands |= generate(STAR + words, f"{name}.mp4")
        rows[label] = f"{name}.mp4"
    return Section("guidance", commands, rows)


SECTIONS = [
    t2v_section(),
    Section("t2i", T2I_COMMAND, {"--task t2i-14B": "t2i.png"}, moving=True),
    preview_section(),
    prompts_section(),
    i2v_section(),
    i2v_end_section(),
    flf2v_section(),
    one_frame_section(),
    one_frame_between_section(),
    v2v_section(),
    control_section(),
    lora_section(),
    pair_section(),
    step_caches_section(),
    guidance_section(),
]


def main() -> None:
    (options,) = parse_options(__doc__, GalleryOptions)
    images = options.images or options.folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    names = [section.name for section in SECTIONS]
    for name in options.only:
        if name not in names:
            raise UserError(f"--only {name}: no such section", suggest(name, names) or f"use {', '.join(names)}")
    for section in SECTIONS:
        if options.only and section.name not in options.only:
            continue
        for command, made in section.commands.items():
            if not found(options.folder, made):
                call(command.replace(FOLDER, shlex.quote(options.folder.as_posix())))
        rows = [
            (label or path.stem, path) for label, made in section.rows.items() for path in found(options.folder, made)
        ]
        sheet = ["python", "-m", "examples.tiny_world.contact_sheet", "--videos", *(str(path) for _, path in rows)]
        sheet += ["--labels", *(label for label, _ in rows), "--height", "64"]
        call(shlex.join([*sheet, "--output", (images / section.picture).as_posix()]))


def found(folder: Path, pattern: str) -> list[Path]:
    """Return the files in a folder that a name or pattern stands for, in the order of their names."""
    return sorted(folder.glob(pattern))


def call(command: str) -> None:
    """Print a command as a user would type it, and run it with this Python."""
    print(f"\n$ {command}", flush=True)
    run(*shlex.split(command)[1:])


if __name__ == "__main__":
    run_script(main)
