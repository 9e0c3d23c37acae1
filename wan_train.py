"""Fine-tune all weights of a Wan2.1 DiT on cached latents and texts.

    accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 wan_train.py
        --task t2v-1.3B --dit wan2.1_t2v_1.3B_bf16.safetensors --dataset_config data.toml --sdpa
        --full_bf16 --fused_backward_pass --optimizer_type adamw8bit --learning_rate 1e-5 --gradient_checkpointing
        --timestep_sampling shift --discrete_flow_shift 3.0 --max_train_epochs 16 --save_every_n_epochs 1
        --seed 42 --output_dir models --output_name name-of-model

Run wan_cache_latents.py and wan_cache_text_encoder_outputs.py with the same dataset file first.
"""

from dataclasses import fields

from modules.full_training import FullOptions, TrainedDit
from modules.run_logs import LoggingOptions
from modules.timestep_chart import show_timesteps
from modules.train_options import TrainOptions
from modules.trainer import make_trainer
from utils.errors import run_script
from utils.options import parse_options


def main() -> None:
    groups = [field.type for field in fields(TrainOptions)]
    *options, full, logs = parse_options(__doc__, *groups, FullOptions, LoggingOptions)
    training = TrainOptions(*options)
    if training.show.show_timesteps:
        show_timesteps(training)
    else:
        make_trainer(training, TrainedDit(full), logs).run()


if __name__ == "__main__":
    run_script(main)
