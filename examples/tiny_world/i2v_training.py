"""Train the tiny image-to-video DiT: the text-to-video one is given eyes, and wan_train.py trains it on drawn clips.

    python -m examples.tiny_world.i2v_training --folder output/tiny_world/i2v --weights output/tiny_world

Goes through the scripts as any fine-tuning does: clips, caches of latents with CLIP features and of texts, training. It
is cut into rounds, each of which starts from the file of the one before; stopped at any time, the same command goes on
with the round that was not finished. The result is `dit_i2v.safetensors` in the folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.tiny_world.training import run
from utils.errors import UserError, run_script
from utils.files import require_file
from utils.options import option, parse_options
from utils.safetensors_io import open_tensors, save_file_atomically

LEFT_OUT = 3  # the block of the text-to-video DiT that is left out, so that all weights stay below 12 MB
CONDITION_CHANNELS = 20


@dataclass(frozen=True)
class I2vTrainingOptions:
    """training the tiny image-to-video DiT"""

    folder: Path | None = option(None, "where clips, caches, rounds and the result go", required=True)
    weights: Path | None = option(
        None, "folder with vae, t5, clip, dit_t2v (.safetensors) and spiece.model", required=True
    )
    rounds: int = option(4, "calls of wan_train.py; in the last one the learning rate falls to 0")
    steps: int = option(500, "optimizer steps a round")
    clips: int = option(1500, "clips to learn from")
    batch_size: int = option(48, "clips a step, of all processes")
    learning_rate: float = option(1e-3, "of AdamW")
    seed: int = option(0, "of clips and noise")
    processes: int = option(2, "processes of one thread each")


def with_eyes(
    t2v: Mapping[str, Tensor], clip_dim: int, left_out: int | None, seed: int, channels: int = CONDITION_CHANNELS
) -> dict[str, Tensor]:
    """Return an image-to-video DiT that makes of a prompt what the text-to-video DiT makes, until it is trained.

    What it gets to see beside the noise has weights of 0, and so has what it does with CLIP features [257 clip_dim].
    left_out: a block to leave out, which does change what it makes. channels: of what it sees beside the noise.
    """
    weights = {}
    for name, weight in t2v.items():
        part, _, rest = name.partition(".")
        if part == "blocks":
            number, _, rest = rest.partition(".")
            if int(number) == left_out:
                continue
            name = f"blocks.{int(number) - (left_out is not None and int(number) > left_out)}.{rest}"
        weights[name] = weight.float()
    patches = weights["patch_embedding.weight"]
    unseen = patches.new_zeros(len(patches), channels, *patches.shape[2:])
    weights["patch_embedding.weight"] = torch.cat([patches, unseen], dim=1)
    generator = torch.Generator().manual_seed(seed)
    dim = len(patches)

    def linear(name: str, inputs: int, outputs: int, gain: float = 1.0) -> None:
        weights[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * gain * inputs**-0.5
        weights[f"{name}.bias"] = torch.zeros(outputs)

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones(width), torch.zeros(width)

    norm("img_emb.proj.0", clip_dim)
    linear("img_emb.proj.1", clip_dim, clip_dim)
    linear("img_emb.proj.3", clip_dim, dim)
    norm("img_emb.proj.4", dim)
    for block in {name.split(".")[1] for name in weights if name.startswith("blocks.")}:
        attention = f"blocks.{block}.cross_attn"
        linear(f"{attention}.k_img", dim, dim)
        linear(f"{attention}.v_img", dim, dim, gain=0)
        weights[f"{attention}.norm_k_img.weight"] = torch.ones(dim)
    return weights


def main() -> None:
    (options,) = parse_options(__doc__, I2vTrainingOptions)
    folder, weights = options.folder, options.weights
    names = ("vae", "t5", "clip", "dit_t2v")
    vae, t5, clip, t2v = (require_file(weights / f"{name}.safetensors", "--weights", "its folder") for name in names)
    if options.batch_size % options.processes:
        raise UserError(f"--batch_size {options.batch_size}: {options.processes} processes cannot share it evenly")
    config = folder / "data" / "dataset.toml"
    if not config.is_file():
        draw = ["-m", "examples.tiny_world.draw", "--folder", config.parent, "--clips", options.clips]
        run(*draw, "--for_training", "--seed", options.seed, "--batch_size", options.batch_size // options.processes)
    data = ["--dataset_config", config, "--skip_existing"]
    run("wan_cache_latents.py", *data, "--vae", vae, "--clip", clip)
    run("wan_cache_text_encoder_outputs.py", *data, "--t5", t5, "--t5_tokenizer", weights / "spiece.model")

    dit = folder / "round_0.safetensors"
    if not dit.is_file():
        with open_tensors(t2v, "--weights") as file, open_tensors(clip, "--weights") as tower:
            metadata = {"num_heads": file.metadata["num_heads"]}
            clip_dim = tower.shape("visual.pos_embedding")[-1]
        save_file_atomically(with_eyes(load_file(t2v), clip_dim, LEFT_OUT, options.seed), dit, metadata)
    for number in range(1, options.rounds + 1):
        before, dit = dit, folder / f"round_{number}.safetensors"
        if not dit.is_file():
            last = number == options.rounds
            train = ["wan_train.py", "--task", "i2v-14B", "--dit", before, "--dataset_config", config]
            train += ["--optimizer_type", "adamw", "--optimizer_args", "betas=(0.9,0.98)", "weight_decay=0.01"]
            train += ["--learning_rate", options.learning_rate, "--lr_warmup_steps", min(50, options.steps - 1)]
            train += ["--lr_scheduler", "cosine" if last else "constant_with_warmup"]
            train += ["--timestep_sampling", "shift", "--discrete_flow_shift", "3.0", "--mixed_precision", "no"]
            train += ["--max_train_steps", options.steps, "--seed", options.seed + number, "--sdpa"]
            train += ["--max_data_loader_n_workers", 0, "--output_dir", folder, "--output_name", dit.stem]
            run(*train, processes=options.processes)
    with open_tensors(dit, "--weights") as file:
        metadata = {"num_heads": file.metadata["num_heads"]}
    halves = {name: weight.to(torch.bfloat16) for name, weight in load_file(dit).items()}
    save_file_atomically(halves, folder / "dit_i2v.safetensors", metadata)
    print(folder / "dit_i2v.safetensors")


if __name__ == "__main__":
    run_script(main)
