"""The loss of a predicted velocity, against formulas written otherwise."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dataset.config import load_config
from modules.losses import LossOptions, check_loss, flow_loss, loss_weights, sample_errors
from tests.test_modules_trainer import trainer  # noqa: F401
from utils.errors import UserError
from utils.safetensors_io import read_metadata

HUBER = LossOptions(loss="huber", huber_delta=0.7)


def test_loss_weights_are_the_recorded_ones(golden):
    recorded = json.loads((golden / "timesteps.json").read_text())["loss_weight"]
    # The last timestep lies between two of musubi-tuner's table, which takes the nearest.
    t = torch.tensor(recorded["timesteps"][:-1]) / 1000
    for scheme in ("sigma_sqrt", "cosmap"):
        torch.testing.assert_close(loss_weights(scheme, t), torch.tensor(recorded[scheme][:-1]), rtol=1e-5, atol=0)
    assert loss_weights("none", t) is None and loss_weights("logit_normal", t) is None


def test_min_snr_weighs_the_error_of_the_clean_video_by_the_clamped_ratio():
    """The weight of the velocity's error is that of the x_0 that follows from it, min(SNR, gamma)."""
    t, latents, noise = torch.linspace(0.01, 0.99, 25).double(), torch.randn(25).double(), torch.randn(25).double()
    x_t, velocity, wrong = (1 - t) * latents + t * noise, noise - latents, torch.randn(25).double()
    clean = x_t - t * (velocity + wrong)
    ratio = ((1 - t) / t) ** 2
    expected = ratio.clamp(max=5) * (clean - latents) ** 2
    torch.testing.assert_close(loss_weights("min_snr", t, 5.0) * wrong**2, expected)
    assert loss_weights("min_snr", torch.tensor([0.0, 1.0])).tolist() == [0, 0]


def test_the_loss_is_the_weighted_mean_of_squares():
    prediction, velocity = torch.randn(2, 3, 1, 2, 2).bfloat16(), torch.randn(2, 3, 1, 2, 2)
    squares = (prediction.float() - velocity) ** 2
    torch.testing.assert_close(flow_loss(prediction, velocity), squares.mean())
    weighted = (squares[0].mean() * 2 + squares[1].mean() * 5) / 2
    torch.testing.assert_close(flow_loss(prediction, velocity, torch.tensor([2.0, 5.0])), weighted)
    torch.testing.assert_close(sample_errors(prediction, velocity), squares.mean(dim=(1, 2, 3, 4)))


def test_huber_is_twice_torchs_and_the_squared_error_of_small_errors():
    prediction, velocity = torch.randn(2, 3, 1, 8, 8), torch.randn(2, 3, 1, 8, 8)
    expected = 2 * F.huber_loss(prediction, velocity, delta=0.7)
    torch.testing.assert_close(flow_loss(prediction, velocity, options=HUBER), expected)
    near = velocity + 0.1 * torch.randn_like(velocity)
    assert torch.equal(flow_loss(near, velocity, options=HUBER), flow_loss(near, velocity))


@pytest.mark.parametrize("options", [LossOptions(), HUBER])
def test_gradients_are_zero_where_the_mask_is_and_a_mask_of_ones_is_none(options):
    prediction = torch.randn(2, 3, 2, 4, 4, requires_grad=True)
    velocity, mask = torch.randn(2, 3, 2, 4, 4), (torch.rand(2, 1, 2, 4, 4) < 0.4).float()
    flow_loss(prediction, velocity, mask=mask, options=options).backward()
    learned = prediction.grad.abs().sum(dim=1, keepdim=True) > 0
    assert torch.equal(learned, mask > 0)
    gradients = []
    for mask in (None, torch.ones(2, 1, 2, 4, 4)):
        prediction.grad = None
        loss = flow_loss(prediction, velocity, torch.tensor([0.3, 2.0]), mask, options)
        loss.backward()
        gradients.append((loss.detach(), prediction.grad))
    assert all(torch.equal(without, ones) for without, ones in zip(*gradients, strict=True))


def test_the_loss_of_a_masked_sample_is_the_mean_of_what_counts():
    prediction, velocity = torch.randn(3, 4, 1, 4, 4), torch.randn(3, 4, 1, 4, 4)
    mask = torch.zeros(3, 1, 1, 4, 4)
    mask[0, ..., :2] = 1
    mask[1, ..., 0, 0], mask[1, ..., 0, 1] = 0.5, 0.25
    squares = (prediction - velocity) ** 2
    first = squares[0, ..., :2].mean()
    second = (2 * squares[1, ..., 0, 0] + squares[1, ..., 0, 1]).mean() / 3
    torch.testing.assert_close(flow_loss(prediction, velocity, mask=mask), (first + second) / 3)
    torch.testing.assert_close(sample_errors(prediction, velocity, mask), torch.stack([first, second, first * 0]))


def test_numbers_that_cannot_be_are_refused_and_those_that_nothing_uses_named(caplog):
    with pytest.raises(UserError, match="--huber_delta 0: must be greater than 0"):
        check_loss(LossOptions(loss="huber", huber_delta=0.0), "none")
    with pytest.raises(UserError, match="--min_snr_gamma nan: must be greater than 0"):
        check_loss(LossOptions(min_snr_gamma=float("nan")), "min_snr")
    check_loss(LossOptions(min_snr_gamma=1.0), "min_snr")
    assert not caplog.messages
    check_loss(LossOptions(huber_delta=0.1), "none")
    assert caplog.messages == ["--huber_delta: ignored without --loss huber"]


@pytest.mark.parametrize(("keys", "factor"), [("prior_weight = 0.25", 0.25), ("is_reg = true", 1.0)])
def test_the_loss_of_a_dataset_is_multiplied_by_its_prior_weight(trainer, dataset, tmp_path, keys, factor):  # noqa: F811
    weighted = tmp_path / "weighted.toml"
    weighted.write_text(dataset.read_text().replace("[[datasets]]", f"[[datasets]]\n{keys}"))
    plain, other = trainer("--max_train_steps 2"), trainer(f"--max_train_steps 2 --dataset_config {weighted}")
    for run in (plain, other):
        run.optimizer_step = lambda: {}  # nothing is learned
        run.run()
    assert list(other.losses) == pytest.approx([factor * loss for loss in plain.losses], rel=1e-6)
    (entry, *_) = json.loads(other.saver.checkpoints.metadata["ss_datasets"])
    assert entry.get("prior_weight", entry.get("is_reg")) == (0.25 if factor != 1 else True)


def test_a_lora_learns_by_the_loss_and_weights_asked_for_and_its_file_tells(trainer):  # noqa: F811
    losses = {}
    for more in ("", "--loss huber --huber_delta 0.3", "--weighting_scheme min_snr --min_snr_gamma 2"):
        run = trainer(f"--max_train_steps 2 {more}")
        run.run()
        losses[more] = run.losses[0]
        told = {
            key: run.saver.checkpoints.metadata.get(f"ss_{key}") for key in ("loss", "huber_delta", "min_snr_gamma")
        }
        expected = {"--loss": ("huber", "0.3", None), "--weig": (None, None, "2.0")}.get(more[:6], (None, None, None))
        assert tuple(told.values()) == expected
    assert len(set(losses.values())) == 3


def test_a_run_with_masks_of_ones_is_the_run_without_and_others_learn_something_else(trainer, dataset, tmp_path):  # noqa: F811
    (first, *_) = load_config(dataset)
    shutil.copytree(first.cache_directory, tmp_path / "cache")
    text = dataset.read_text().split("[[datasets]]")[:2]
    (tmp_path / "plain.toml").write_text("[[datasets]]".join(text))
    masked = text[1].replace(first.cache_directory.as_posix(), (tmp_path / "cache").as_posix())
    (tmp_path / "masked.toml").write_text(f"{text[0]}[[datasets]]\nalpha_mask = true{masked}")

    def losses(name: str) -> list[float]:
        run = trainer(f"--max_train_steps 2 --learning_rate 1e-3 --dataset_config {tmp_path / name}")
        run.run()
        return list(run.losses)

    def write_masks(value: float) -> None:
        for path in (tmp_path / "cache").glob("*_wan.safetensors"):
            tensors = {key: tensor for key, tensor in load_file(path).items() if "mask" not in key}
            key, latents = next((key, tensor) for key, tensor in tensors.items() if key.startswith("latents_"))
            mask = torch.ones(1, *latents.shape[1:])
            mask[..., 0] = value
            tensors[f"latents_mask_{key.split('_')[1]}_float32"] = mask
            save_file(tensors, path, read_metadata(path))

    write_masks(1.0)
    plain = losses("plain.toml")
    assert losses("masked.toml") == plain
    write_masks(0.0)
    assert losses("masked.toml") != plain
