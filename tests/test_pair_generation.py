"""Both models of Wan2.2 in generation: against diffusers' pipeline, and as a user starts it."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_generate_video
from modules.conditions import Condition
from modules.generation import Texts, denoise, guidance_of
from modules.generation_options import SamplingOptions
from modules.prompts import Request
from modules.solvers import sigma_schedule
from tests import tiny
from tests.diffusers_dit import diffusers_dit, padded
from tests.test_script_wan_generate_video import arguments, comment_of, lora  # noqa: F401
from utils.errors import UserError
from wan.configs import TASKS
from wan.dit_file import dit_shape
from wan.loading import build_dit
from wan.pair import DitPair
from wan.streaming import CpuDevice

SHIFT, STEPS = 12.0, 6


def pipeline(solver, high, low, boundary):
    """Return diffusers' pipeline of two models with the schedule of one of our solvers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

    class Euler(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, steps, device=None):
            super().set_timesteps(sigmas=sigma_schedule("vanilla", steps, SHIFT)[1][:-1].tolist(), device=device)

    class UniPC(UniPCMultistepScheduler):
        def set_timesteps(self, steps, device=None):
            super().set_timesteps(steps, device=device)
            self.timesteps, self.sigmas = sigma_schedule("unipc", steps, SHIFT)

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=Euler() if solver == "vanilla" else UniPC(**flow),
        transformer=high,
        transformer_2=low,
        boundary_ratio=boundary,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("solver", ["unipc", "vanilla"])
def test_a_denoising_with_two_models_equals_that_of_diffusers(solver):
    weights = {high: tiny.state_dict("dit_t2v", seed=5 + high) for high in (False, True)}
    theirs = {high: diffusers_dit(w, dit_shape(w, 3)) for high, w in weights.items()}
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(16, 2, 4, 6, generator=generator)
    texts = Texts(*(torch.randn(rows, 64, generator=generator) for rows in (7, 4)))
    config = TASKS["t2v-A14B"]
    want = pipeline(solver, theirs[True], theirs[False], config.boundary)(
        prompt_embeds=padded([texts.prompt]),
        negative_prompt_embeds=padded([texts.negative]),
        latents=noise[None].clone(),
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        output_type="latent",
    ).frames[0]
    pair = DitPair(lambda high: build_dit(weights[high], heads=3), config.boundary, CpuDevice(), offload=True)
    request = Request("a", "b", 48, 32, 5, STEPS, SHIFT, 3.0, 4.0, 1)
    sampling, scale = SamplingOptions(sample_solver=solver), guidance_of(request, config)
    got = denoise(pair, noise, texts, Condition(), STEPS, SHIFT, scale, sampling)
    timesteps = sigma_schedule(solver, STEPS, SHIFT)[0]
    assert 0 < sum(timesteps < 875) < STEPS, "both have steps"
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.fixture
def generate(monkeypatch, models, tmp_path):
    """Run the script on a pair of tiny models; return the latent of a name."""
    high = tmp_path / "high.safetensors"
    save_file(tiny.state_dict("dit_t2v", seed=1), high, {"num_heads": "3"})

    def run(name, **options):
        given = {"task": "t2v-A14B", "dit_high_noise": high, "infer_steps": 4, "flow_shift": 5.0, **options}
        path = tmp_path / f"{name}.safetensors"
        words = arguments(
            {**models, "high": high}, **{"output_type": "latent", "vae": None, "save_path": path, **given}
        )
        monkeypatch.setattr(sys, "argv", ["wan_generate_video.py", *words])
        wan_generate_video.main()
        return load_file(path)["latent"]

    return run


def test_wherever_the_idle_model_waits_the_latents_are_the_same(generate, lora):  # noqa: F811
    plain = generate("plain", lora_weight_high_noise=[lora])
    ways = {
        "offload": {"offload_inactive_dit": True},
        "lazy": {"lazy_loading": True},
        "swap": {"blocks_to_swap": 1},
        "both": {"offload_inactive_dit": True, "blocks_to_swap": 2},
        "auto": {"blocks_to_swap": "auto"},
    }
    for name, options in ways.items():
        assert torch.equal(plain, generate(name, lora_weight_high_noise=[lora], **options)), name
    quantized = generate("fp8", fp8_scaled=True, lora_weight_high_noise=[lora])
    assert torch.equal(
        quantized, generate("fp8_lazy", fp8_scaled=True, lazy_loading=True, lora_weight_high_noise=[lora])
    )
    assert not torch.equal(plain, quantized)


def test_each_model_has_its_steps_guidance_and_loras(generate, lora, models, caplog):  # noqa: F811
    low_only = generate("low", dit_high_noise=None)
    assert torch.equal(generate("same", dit_high_noise=models["dit_t2v"]), low_only)
    both = generate("both")
    assert not torch.equal(both, low_only)
    for name, boundary, alone in (("all_high", 1e-4, {"dit": "high"}), ("all_low", 999.9, {})):
        one = generate(f"{name}_alone", **alone, dit_high_noise=None, timestep_boundary=boundary)
        assert torch.equal(generate(name, timestep_boundary=boundary), one)
    caplog.clear()
    high_lora = generate("high_lora", lora_weight_high_noise=[lora], lora_multiplier_high_noise=[0.5])
    assert "--lora_weight: not given, so one of the two models runs without a LoRA" in caplog.text
    low_lora = generate("low_lora", lora_weight=[lora])
    assert not torch.equal(high_lora, both) and not torch.equal(low_lora, both) and not torch.equal(high_lora, low_lora)
    assert torch.equal(generate("zero", lora_weight_high_noise=[lora], lora_multiplier_high_noise=[0]), both)


def test_the_file_names_both_models(generate, models, lora, tmp_path):  # noqa: F811
    path = tmp_path / "a.mp4"
    given = {"output_type": "both", "vae": models["vae"], "save_path": path, "lora_weight_high_noise": [lora]}
    with pytest.raises(FileNotFoundError):
        generate("none", **given, timestep_boundary=900, guidance_scale_high_noise=2.0)
    found = comment_of(path)
    wanted = {"task": "t2v-A14B", "dit": "dit_t2v.safetensors", "dit_high_noise": "high.safetensors"}
    wanted |= {"timestep_boundary": 0.9, "guidance_scale": 3.0, "guidance_scale_high_noise": 2.0}
    assert {name: found[name] for name in wanted} == wanted
    assert [entry["file"] for entry in found["lora_high_noise"]] == ["lora.safetensors"] and "lora" not in found


def test_what_does_not_go_together_is_refused(generate, lora):  # noqa: F811
    for options, line in (
        ({"lazy_loading": True, "offload_inactive_dit": True}, "--lazy_loading: keeps one model alone"),
        (
            {"dit_high_noise": None, "lora_weight_high_noise": [lora]},
            "--lora_weight_high_noise: is for --dit_high_noise",
        ),
        ({"task": "t2v-14B"}, "--dit_high_noise: t2v-14B has one model"),
        (
            {"lora_weight_high_noise": [lora], "lora_multiplier_high_noise": [1, 2]},
            "--lora_multiplier_high_noise: 2 numbers for 1",
        ),
    ):
        with pytest.raises(UserError, match=line):
            generate("none", **options)


def test_each_model_has_a_step_cache_of_its_own(generate, caplog):
    """Steps that are not computed take what the model in use computed last, with layers skipped too."""
    given = {"infer_steps": 12, "slg_mode": "original", "slg_layers": "0", "slg_end": 1.0, "cfg_zero_star": True}
    exact = generate("exact", **given)
    assert torch.equal(generate("none", step_cache="easycache", step_cache_threshold=0, **given), exact)
    caplog.set_level("INFO")
    few = generate("few", step_cache="easycache", step_cache_threshold=50, **given)
    (computed,) = [record.args[1] for record in caplog.records if "steps computed" in record.message]
    assert 4 <= computed < 12 and not torch.equal(few, exact) and torch.isfinite(few).all()
