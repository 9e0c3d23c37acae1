"""Train the tiny CLIP: an image tower that learns which caption belongs to which picture.

    python -m examples.tiny_world.clip_training --folder output/tiny_world/clip

Stopped at any time, the same command goes on from the last checkpoint. The result is `clip.safetensors` in that folder:
the image tower in the official layout. Of it the DiT sees what comes out of the last layer but one, as with Wan's CLIP.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from examples.tiny_world.training import Training
from examples.tiny_world.world import BACKGROUNDS, COLORS, SHAPES, Scene, draw, random_scene
from utils.errors import run_script
from utils.options import option, parse_options
from utils.safetensors_io import save_file_atomically
from wan.clip import LAYER_NAMES, NAMES, clip_input

WIDTH, MLP, HEADS, LAYERS, SHARED = 64, 128, 4, 3, 32  # the last: what pictures and captions are compared in
SIDE, PATCH = 112, 14  # pixels: 64 patches, less than the 256 of Wan's CLIP, because the pictures are small too
PLACES = ("left", "middle", "right")
SHAPE = 1  # where the shape stands among the words of a picture
FRAMES = 5  # of a drawn clip, which are pictures to learn from


@dataclass(frozen=True)
class ClipTrainingOptions:
    """training the tiny CLIP"""

    folder: Path | None = option(None, "where checkpoints and the result go", required=True)
    steps: int = option(2400, "optimizer steps")
    clips: int = option(2000, "clips of five pictures to learn from")
    batch_size: int = option(48, "pictures a step")
    learning_rate: float = option(4e-3, "of Muon, which takes the layers' matrices; AdamW takes the rest with half")
    seed: int = option(0, "of weights and pictures")
    threads: int = option(2, "CPU threads")
    save_every: int = option(200, "steps between checkpoints")


class TinyClip(nn.Module):
    """An image tower and a bag of words: both end in the same space."""

    def __init__(self):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.visual = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=MLP,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                image_size=SIDE,
                patch_size=PATCH,
                hidden_act="gelu",
                layer_norm_eps=1e-5,
            )
        )
        embeddings = getattr(self.visual, "vision_model", self.visual).embeddings
        with torch.no_grad():
            # As strong as what a patch shows from the start: attention finds neighbours only by their places.
            embeddings.position_embedding.weight[1:] = places(SIDE // PATCH, WIDTH)
        self.head = nn.Parameter(torch.randn(WIDTH, SHARED) * WIDTH**-0.5)
        self.words = nn.Linear(len(WORDS), SHARED, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.0))  # log of what cosines are multiplied by

    def forward(self, pixels: Tensor, captions: Tensor) -> Tensor:
        """Return how well each picture [B 3 H W], in [-1, 1], fits each caption [B WORDS], 1 for its words: [B B]."""
        pictures = self.visual(pixel_values=clip_input(pixels, SIDE)).pooler_output @ self.head
        return self.scale.exp() * F.normalize(pictures, dim=1) @ F.normalize(self.words(captions.float()), dim=1).T


def places(side: int, width: int) -> Tensor:
    """Return waves of row and column [side^2 width] by which the patches of a picture can be told apart."""
    frequencies = 0.5 * torch.pi / 2 ** (torch.arange(width // 4) / 2)
    waves = torch.outer(torch.arange(side), frequencies)
    axis = 0.5 * torch.cat([waves.sin(), waves.cos()], dim=1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


WORDS = (*COLORS, *SHAPES, *BACKGROUNDS, *(f"{place} {axis}" for axis in ("x", "y") for place in PLACES))


def words_of(scene: Scene, center: tuple[float, float]) -> list[int]:
    """Return the numbers of the words for a scene with its shape at (x, y), from 0 to 1 across the picture."""
    places = [f"{PLACES[min(int(3 * at), 2)]} {axis}" for axis, at in zip("xy", center, strict=True)]
    return [WORDS.index(word) for word in (scene.color, scene.shape, scene.background, *places)]


def pictures_of(options: ClipTrainingOptions) -> tuple[np.ndarray, Tensor]:
    """Return pictures, uint8 [N 64 64 3], and the numbers of the five words that are true of each [N 5]."""
    rng, pictures, words = random.Random(f"{options.seed}/clip"), [], []
    for _ in tqdm(range(options.clips), desc="drawing", unit="clip"):
        scene = replace(random_scene(rng), striped=rng.random() < 0.1)
        for frame in draw(scene, FRAMES):
            away = np.abs(frame.astype(int) - BACKGROUNDS[scene.background]).sum(-1) > 60
            y, x = np.nonzero(away)
            pictures.append(frame)
            words.append(words_of(scene, ((x.mean() + 0.5) / 64, (y.mean() + 0.5) / 64)))
    return np.stack(pictures), torch.tensor(words)


def captions_of(words: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return captions that say some of the words of each picture, and which of the pictures each of them fits.

    words [B 5]; captions [B WORDS], 1 for the words said; fits [B pictures, B captions]. A caption that leaves out the
    colour fits pictures of all colours: so each word counts for itself. The shape, which is the hardest to see, is
    the noun and always said.
    """
    true = F.one_hot(words, len(WORDS)).sum(1)
    said = torch.rand(words.shape, generator=generator) < 0.3
    said[:, SHAPE] = True
    captions = (F.one_hot(words, len(WORDS)) * said[..., None]).sum(1)
    return captions, true @ captions.T == captions.sum(1)


def loss_of(logits: Tensor, fits: Tensor) -> Tensor:
    """Return the symmetric contrastive loss (Radford et al. 2021, arXiv:2103.00020) with several right answers."""
    fits = fits.float()
    rows, columns = fits / fits.sum(1, keepdim=True), fits.T / fits.T.sum(1, keepdim=True)
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


def start(options: ClipTrainingOptions) -> Training:
    """Return the training, from its checkpoint in the folder or from initial weights."""
    torch.manual_seed(options.seed)
    model = TinyClip().train()

    def schedule(step: int) -> float:
        return max(min((step + 1) / 50, 1.0, 2 * (options.steps - step) / options.steps), 0.01)

    def is_matrix(name: str, weight: Tensor) -> bool:
        return ".layers." in name and weight.ndim == 2

    return Training(model, options.folder / "clip_state.pt", options.learning_rate, is_matrix, schedule)


def official(model: TinyClip) -> dict[str, Tensor]:
    """Return the image tower's weights under their official names."""
    ours = {name.removeprefix("vision_model."): weight for name, weight in model.visual.state_dict().items()}
    weights = {f"visual.{name}": ours[theirs] for name, theirs in NAMES.items()}
    weights["visual.cls_embedding"] = weights["visual.cls_embedding"].view(1, 1, -1)
    weights["visual.pos_embedding"] = weights["visual.pos_embedding"][None]
    weights["visual.head"] = model.head.detach()
    for kind in ("weight", "bias"):
        weights[f"visual.post_norm.{kind}"] = ours[f"post_layernorm.{kind}"]
        for i in range(LAYERS):
            layer, theirs = f"visual.transformer.{i}", f"encoder.layers.{i}"
            parts = [ours[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            weights[f"{layer}.attn.to_qkv.{kind}"] = torch.cat(parts)
            for name, other in LAYER_NAMES.items():
                weights[f"{layer}.{name}.{kind}"] = ours[f"{theirs}.{other}.{kind}"]
    return weights


def main() -> None:
    (options,) = parse_options(__doc__, ClipTrainingOptions)
    torch.set_num_threads(options.threads)
    pictures, words = pictures_of(options)
    training, smooth = start(options), None
    progress = tqdm(total=options.steps, initial=training.step, desc="CLIP", unit="step")
    while training.step < options.steps:
        rng = random.Random(f"{options.seed}/{training.step}")
        chosen = [rng.randrange(len(pictures)) for _ in range(options.batch_size)]
        pixels = rearrange(torch.from_numpy(pictures[chosen]), "b h w c -> b c h w").float() / 127.5 - 1
        captions, fits = captions_of(words[chosen], torch.Generator().manual_seed(options.seed + training.step))
        loss = loss_of(training.model(pixels, captions), fits)
        training.learn_from(loss)
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        progress.set_postfix(loss=f"{smooth:.3f}")
        progress.update()
        if training.step % options.save_every == 0 or training.step == options.steps:
            training.save()
    with training.averaged():
        halves = {name: weight.half().contiguous() for name, weight in official(training.model).items()}
    save_file_atomically(halves, options.folder / "clip.safetensors", {"num_heads": str(HEADS)})
    print(options.folder / "clip.safetensors")


if __name__ == "__main__":
    run_script(main)
