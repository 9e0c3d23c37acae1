"""LoRA: what `--network_module networks.lora_wan` finds."""

from functools import partial

from networks import create
from networks.lora import LoRABranch

create_network = partial(create.create_network, LoRABranch)
create_network_from_weights = partial(create.create_network_from_weights, LoRABranch)
load_weights = create.load_weights
