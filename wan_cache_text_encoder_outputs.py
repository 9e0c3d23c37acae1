"""Cache what the text encoder makes of every caption of a dataset.

python wan_cache_text_encoder_outputs.py --dataset_config data.toml --t5 models_t5_umt5-xxl-enc-bf16.pth --batch_size 16

What the dataset file may say is in docs/dataset_config.md.
On several GPUs: torchrun --nproc_per_node 2 wan_cache_text_encoder_outputs.py ...
"""

import functools

from dataset.config import DatasetOptions, load_config
from modules.caching import CachingOptions
from modules.text_caching import cache_texts, load_text_encoder
from utils.errors import run_script
from utils.files import require_file
from utils.identity import weights_identity
from utils.options import parse_options
from utils.processes import Processes, joined
from wan.t5 import T5Options


def main() -> None:
    with joined() as processes:
        cache(processes)


def cache(processes: Processes) -> None:
    """Cache the share of this process, or all where it is alone."""
    data, t5, caching = parse_options(__doc__, DatasetOptions, T5Options, CachingOptions)
    configs = load_config(data.dataset_config, caching.batch_size)
    require_file(t5.t5, "--t5", "the weights of the text encoder")
    load = functools.partial(load_text_encoder, t5, processes.device(caching.device))
    identity = weights_identity(t5.t5, "--t5") + " fp8" * t5.fp8_t5
    cache_texts(configs, load, caching, processes=processes, models={"t5": identity}).report(caching.strict)


if __name__ == "__main__":
    run_script(main)
