"""What the files of a training run say of how they were made."""

import json
from pathlib import Path

from modules.cache_checks import is_one_frame
from modules.checkpoints import OWN_KEY, model_metadata, new_session, training_metadata
from modules.generation_plan import software
from modules.preflight import Plan
from utils.identity import weights_identity


def run_metadata(plan: Plan, optimizer_name: str, batches: int) -> dict[str, str]:
    """Return the metadata of a run's files, but for what changes from file to file.

    batches: of an epoch, on one process.
    """
    options, trained, summary = plan.options, plan.trained, plan.data.summary()
    timesteps, loss, optimizer = options.timesteps, options.loss, options.optimizer
    values = {
        **new_session(),
        "output_name": options.saving.output_name,
        "learning_rate": optimizer.learning_rate,
        "num_train_items": summary.items,
        "num_batches_per_epoch": batches,
        "num_epochs": plan.epochs,
        "gradient_checkpointing": options.precision.gradient_checkpointing,
        "gradient_checkpointing_cpu_offload": options.precision.gradient_checkpointing
        and options.precision.gradient_checkpointing_cpu_offload,
        "gradient_accumulation_steps": options.training.gradient_accumulation_steps,
        "max_train_steps": plan.total_steps,
        "lr_warmup_steps": optimizer.lr_warmup_steps,
        "lr_scheduler": optimizer.lr_scheduler,
        "base_model_version": "wan",
        **trained.training_metadata(),
        "mixed_precision": plan.mixed_precision,
        "seed": plan.seed,
        "training_comment": options.metadata.training_comment,
        "optimizer": optimizer_name,
        "max_grad_norm": optimizer.max_grad_norm,
        "fp8_base": options.precision.fp8_base,
        "full_fp16": False,
        "weighting_scheme": timesteps.weighting_scheme,
        "logit_mean": timesteps.logit_mean,
        "logit_std": timesteps.logit_std,
        "mode_scale": timesteps.mode_scale,
        **({"loss": loss.loss, "huber_delta": loss.huber_delta} if loss.loss != "mse" else {}),
        **({"min_snr_gamma": loss.min_snr_gamma} if timesteps.weighting_scheme == "min_snr" else {}),
        "guidance_scale": options.unused.guidance_scale,
        "timestep_sampling": timesteps.timestep_sampling,
        "sigmoid_scale": timesteps.sigmoid_scale,
        "discrete_flow_shift": timesteps.discrete_flow_shift,
        **({"validation_split": split} if (split := options.validation.validation_split) else {}),
        "datasets": summary.metadata,
        "task": plan.config.name,
        "sd_model_name": Path(options.dit.dit).name,
        **pair_metadata(plan),
        **({"vae_name": Path(options.vae.vae).name} if options.vae.vae else {}),
    }
    family = "wan2.2" if plan.config.boundary else "wan2.1"
    bounds = (timesteps.min_timestep, timesteps.max_timestep)
    model = model_metadata(options.metadata, options.saving.output_name, family, trained.architecture, bounds)
    high = options.pair.dit_high_noise
    own = {
        "task": plan.config.name,
        "dit": weights_identity(options.dit.dit, "--dit"),
        "dit_high_noise": high and weights_identity(high, "--dit_high_noise"),
        "fp8_scaled": options.precision.fp8_scaled,
        "quantize": options.precision.quantize,
        "one_frame": is_one_frame(plan.data),
        "compat_musubi": options.dit.compat_musubi,
        "software": software(),
    }
    own = {name: value for name, value in own.items() if value}
    return {**trained.file_metadata(), **training_metadata(values), **model, OWN_KEY: json.dumps(own)}


def pair_metadata(plan: Plan) -> dict[str, str | float]:
    """Return what a file says of the second model it was trained for, and from which noise level on that was used."""
    high = plan.options.pair.dit_high_noise
    if high is None:
        return {}
    return {"sd_model_name_high_noise": high.name, "timestep_boundary": plan.config.boundary}
