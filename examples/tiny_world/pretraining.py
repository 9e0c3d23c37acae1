"""Train the tiny text encoder and DiT together on drawn clips, encoded by the tiny VAE.

    python -m examples.tiny_world.pretraining --folder output/tiny_world --vae output/tiny_world/vae/vae.safetensors

Stopped at any time, the same command goes on from the last checkpoint. The results are `dit_t2v.safetensors`,
`t5.safetensors` and `spiece.model` in that folder, in the official layouts. `--start_from` another folder's results is
a second round: the learning rate rises once more and falls. Two processes of one thread, `torchrun --nproc_per_node 2
-m examples.tiny_world.pretraining ...`, are faster than one of two threads.
"""

import io
import itertools
import math
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from examples.tiny_world.training import Training
from examples.tiny_world.world import Scene, draw, is_held_out, random_scene, varied_caption
from modules.flow_matching import noised
from utils.errors import UserError, run_script
from utils.files import atomic_path, require_file
from utils.options import option, parse_options
from utils.safetensors_io import save_file_atomically
from wan.configs import DEFAULT_NEGATIVE_PROMPT
from wan.model import WanModel, WanShape
from wan.t5 import t5_config, transformers_names
from wan.tokenizer import Tokenizer, load_tokenizer, tokenize
from wan.vae import WanVAE, load_vae
from wan.weights import InMemory

FRAMES, SIDE = 17, 64
VOCABULARY = 768
HEADS = {"dit": 4, "t5": 4}


@dataclass(frozen=True)
class PretrainingOptions:
    """training the tiny text encoder and DiT"""

    folder: Path | None = option(None, "where checkpoints and the results go", required=True)
    vae: Path | None = option(None, "the trained tiny VAE", required=True)
    start_from: Path | None = option(None, "folder of an earlier run, whose models go on learning")
    steps: int = option(6000, "optimizer steps")
    clips: int = option(3000, "clips to learn from")
    batch_size: int = option(48, "clips a step, of all processes")
    learning_rate: float = option(
        4e-3, "of Muon, which takes the blocks' matrices; AdamW takes the rest with half of it"
    )
    shift: float = option(3.0, "shift of the noise levels")
    seed: int = option(0, "of weights, clips and noise")
    threads: int = option(2, "CPU threads of each process")
    save_every: int = option(200, "steps between checkpoints")


# ---------------------------------------------------------------------------------------------------------- data
def scenes_of(options: PretrainingOptions) -> list[Scene]:
    """Return the scenes to learn from, none of which is held out."""
    rng = random.Random(f"{options.seed}/dit")
    endless = (random_scene(rng) for _ in itertools.count())
    return list(itertools.islice((scene for scene in endless if not is_held_out(scene)), options.clips))


@torch.no_grad()
def encoded_clips(scenes: list[Scene], vae: WanVAE, path: Path) -> Tensor:
    """Return the latents of the scenes [N 16 5 8 8], from a file of an earlier run where there is one."""
    if path.is_file():
        return torch.load(path, weights_only=True)
    state, latents = PartialState(), []
    with state.split_between_processes(scenes) as share:
        for start in tqdm(range(0, len(share), 4), "encoding clips", unit="x4", disable=not state.is_main_process):
            clips = np.stack([draw(scene, FRAMES, SIDE) for scene in share[start : start + 4]])
            latents.append(vae.encode(rearrange(torch.from_numpy(clips), "b f h w c -> b c f h w").float() / 127.5 - 1))
    latents = torch.cat(gather_object(latents))
    if state.is_main_process:
        with atomic_path(path) as temporary:
            torch.save(latents, temporary)
    return latents


def train_tokenizer(path: Path, start_from: Path | None = None) -> Tokenizer:
    """Return a unigram tokenizer of the world's captions, made-up words and the default negative prompt.

    It is that in the folder start_from, where one is given.
    """
    if not path.is_file() and start_from:
        with atomic_path(path) as temporary:
            shutil.copyfile(start_from / path.name, temporary)
    elif not path.is_file():
        import sentencepiece

        rng = random.Random(0)
        sentences = [varied_caption(random_scene(rng), rng, rate=0.3) for _ in range(4000)]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*sentences, *[DEFAULT_NEGATIVE_PROMPT] * 20]),
            model_writer=model,
            model_type="unigram",
            vocab_size=VOCABULARY - 8,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
            normalization_rule_name="identity",
            minloglevel=2,
            num_threads=1,
        )
        with atomic_path(path) as temporary:
            temporary.write_bytes(model.getvalue())
    return load_tokenizer(path)


# --------------------------------------------------------------------------------------------------------- models
def new_t5(generator: torch.Generator) -> nn.Module:
    """Return an umT5 encoder of width 96 with two layers, untrained, that can be trained."""
    from transformers import UMT5EncoderModel

    from tests.tiny import t5_shapes

    shapes = t5_shapes(VOCABULARY, dim=96, heads=HEADS["t5"], ffn=192, layers=2)
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    model = UMT5EncoderModel(t5_config(InMemory(empty)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                deviation = 1.0 if "shared" in name else 0.1 if "relative" in name else weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
                weight.mul_(0.3 if name.endswith((".o.weight", ".wo.weight")) else 1)
                if name.endswith("SelfAttention.q.weight"):
                    weight.mul_(16**-0.5)  # the encoder does not scale its attention logits
            else:
                weight.fill_(1)
    return model


def t5_names() -> dict[str, str]:
    """Return the official names of the encoder's weights, and transformers' name for each."""
    from tests.tiny import t5_shapes

    return transformers_names(t5_shapes(VOCABULARY, dim=96, heads=HEADS["t5"], ffn=192, layers=2))


def official_t5(model: nn.Module) -> dict[str, Tensor]:
    """Return the encoder's weights under their official names."""
    weights = model.state_dict()
    return {official: weights[name] for official, name in t5_names().items()}


def new_dit(generator: torch.Generator) -> WanModel:
    """Return a t2v DiT of width 128 with six blocks, initialised as the official code does."""
    dit = WanModel(
        WanShape(dim=128, ffn_dim=512, heads=HEADS["dit"], blocks=6, in_channels=16, text_dim=96, freq_dim=64)
    )
    with torch.no_grad():
        for name, weight in dit.named_parameters():
            if name == "head.head.weight" or name.endswith("bias"):
                weight.zero_()
            elif name.endswith("modulation"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
            elif weight.ndim > 1:
                inputs, outputs = weight[0].numel(), weight.shape[0]
                bound = (6 / (inputs + outputs)) ** 0.5
                weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * bound)
    return dit


# ------------------------------------------------------------------------------------------------------- training
class TextBatch:
    """Captions to embeddings, with gradients."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, captions: Iterable[str]) -> list[Tensor]:
        """Return the embeddings [n 96] of each caption; equal captions are encoded once."""
        captions = list(captions)
        unique = list(dict.fromkeys(captions))
        ids, mask = tokenize(self.tokenizer, unique, 512)
        lengths = mask.sum(1).tolist()
        rows = self.model(input_ids=ids[:, : max(lengths)], attention_mask=mask[:, : max(lengths)]).last_hidden_state
        by_caption = {caption: row[:n] for caption, row, n in zip(unique, rows, lengths, strict=True)}
        return [by_caption[caption] for caption in captions]


def noise_levels(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Return t [count], one from each of `count` equal parts of the distribution, shifted towards noise."""
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return shift * u / (1 + (shift - 1) * u)


def caption_of(scene: Scene, step: int, rng: random.Random) -> str:
    """Return a caption; every twelfth step trains what is said when nothing is asked for."""
    if step % 12 == 11:
        return "" if step % 24 == 11 else DEFAULT_NEGATIVE_PROMPT
    return varied_caption(scene, rng)


def loss_of(
    training: Training, texts: TextBatch, scenes: list[Scene], latents: Tensor, options: PretrainingOptions
) -> Tensor:
    """Return the loss of this process's share of the next batch.

    All of the batch follows from the step alone, so that a run that goes on is the run that was not stopped, with any
    number of processes.
    """
    rng = random.Random(f"{options.seed}/{training.step}")
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + training.step)
    chosen = [rng.randrange(len(scenes)) for _ in range(options.batch_size)]
    t = noise_levels(options.batch_size, options.shift, generator)
    clean = latents[chosen]
    x_t, velocity = noised(clean, torch.randn(clean.shape, generator=generator), t)
    captions = [caption_of(scenes[i], training.step, rng) for i in chosen]
    state = PartialState()
    share = slice(state.process_index, None, state.num_processes)
    predicted = training.model["dit"](x_t[share], 1000 * t[share], texts(captions[share]))
    return (predicted - velocity[share]).square().mean()


def start(options: PretrainingOptions) -> Training:
    """Return the training of both models, from its checkpoint in the folder or from initial weights."""
    generator = torch.Generator().manual_seed(options.seed)
    models = nn.ModuleDict({"t5": new_t5(generator), "dit": new_dit(generator)})
    if options.start_from:
        files = (options.start_from / f"{name}.safetensors" for name in ("dit_t2v", "t5"))
        dit, t5 = (load_file(require_file(file, "--start_from", "a file of an earlier run")) for file in files)
        models["dit"].load_state_dict(dit)
        models["t5"].load_state_dict({name: t5[official] for official, name in t5_names().items()}, strict=False)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 100, max((options.steps - step) / (0.45 * options.steps), 0.01))

    def is_matrix(name: str, weight: Tensor) -> bool:
        return name.startswith("dit.blocks") and weight.ndim == 2

    return Training(models, options.folder / "pretraining_state.pt", options.learning_rate, is_matrix, schedule)


def save_results(training: Training, folder: Path) -> None:
    """Write the averaged weights in the official layouts, in half precision."""
    with training.averaged():
        dit, t5 = training.model["dit"].state_dict(), official_t5(training.model["t5"])
        for name, weights, heads in (("t5", t5, HEADS["t5"]), ("dit_t2v", dit, HEADS["dit"])):
            halves = {key: weight.to(torch.bfloat16) for key, weight in weights.items()}
            save_file_atomically(halves, folder / f"{name}.safetensors", {"num_heads": str(heads)})


def main() -> None:
    (options,) = parse_options(__doc__, PretrainingOptions)
    state = PartialState(cpu=True)
    if options.batch_size % state.num_processes:
        raise UserError(f"--batch_size {options.batch_size}: {state.num_processes} processes cannot share it evenly")
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    scenes = scenes_of(options)
    latents = encoded_clips(scenes, load_vae(options.vae, torch.float32), options.folder / "latents.pt")
    training = start(options)
    with state.main_process_first():
        tokenizer = train_tokenizer(options.folder / "spiece.model", options.start_from)
    texts = TextBatch(training.model["t5"], tokenizer)
    progress = tqdm(
        total=options.steps, initial=training.step, desc="DiT", unit="step", disable=not state.is_main_process
    )
    smooth = None
    while training.step < options.steps:
        loss = loss_of(training, texts, scenes, latents, options)
        training.learn_from(loss)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        progress.set_postfix(loss=f"{smooth:.4f}")
        progress.update()
        if training.step % options.save_every == 0 or training.step == options.steps:
            assert math.isfinite(smooth), "the loss is not a number"
            if state.is_main_process:
                training.save()
                save_results(training, options.folder)
    if state.is_main_process:
        print(options.folder / "dit_t2v.safetensors")


if __name__ == "__main__":
    run_script(main)
