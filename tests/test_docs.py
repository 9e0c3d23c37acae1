"""Every command in README and docs parses with the parser of the script it calls, and every link leads somewhere."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from utils.errors import UserError
from utils.options import parse_options

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("**/README.md"))]
SCRIPTS = {path.name for path in ROOT.glob("*.py")} - {"quickstart.py"}

# The commands of the documentation that users of such scripts know, to the letter (there to be typed as single lines).
KNOWN_COMMANDS = [
    "python wan_cache_latents.py --dataset_config path/to/toml --vae path/to/wan_2.1_vae.safetensors",
    "python wan_cache_latents.py --dataset_config path/to/toml --vae path/to/wan_2.1_vae.safetensors --vae_cache_cpu "
    "--clip path/to/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "python wan_cache_text_encoder_outputs.py --dataset_config path/to/toml  "
    "--t5 path/to/models_t5_umt5-xxl-enc-bf16.pth --batch_size 16",
    """accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 wan_train_network.py
    --task t2v-1.3B
    --dit path/to/wan2.1_xxx_bf16.safetensors
    --dataset_config path/to/toml --sdpa --mixed_precision bf16 --fp8_base
    --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing
    --max_data_loader_n_workers 2 --persistent_data_loader_workers
    --network_module networks.lora_wan --network_dim 32
    --timestep_sampling shift --discrete_flow_shift 3.0
    --max_train_epochs 16 --save_every_n_epochs 1 --seed 42
    --output_dir path/to/output_dir --output_name name-of-lora""",
    """python wan_train_network.py --vae path/to/wan_2.1_vae.safetensors
    --t5 path/to/models_t5_umt5-xxl-enc-bf16.pth
    --sample_prompts /path/to/prompt_file.txt
    --sample_every_n_epochs 1 --sample_every_n_steps 1000 -- sample_at_first""",
    """python wan_generate_video.py --fp8 --task t2v-1.3B --video_size  832 480 --video_length 81 --infer_steps 20
    --prompt "prompt for the video" --save_path path/to/save.mp4 --output_type both
    --dit path/to/wan2.1_t2v_1.3B_bf16_etc.safetensors --vae path/to/wan_2.1_vae.safetensors
    --t5 path/to/models_t5_umt5-xxl-enc-bf16.pth
    --attn_mode torch""",
    """python wan_generate_video.py --fp8 --task i2v-14B --video_size 832 480 --video_length 81 --infer_steps 20
    --prompt "prompt for the video" --save_path path/to/save.mp4 --output_type both
    --dit path/to/wan2.1_i2v_480p_14B_bf16_etc.safetensors --vae path/to/wan_2.1_vae.safetensors
    --t5 path/to/models_t5_umt5-xxl-enc-bf16.pth --clip path/to/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth
    --attn_mode torch --image_path path/to/image.jpg""",
    """python wan_generate_video.py --output_type latent_images --image_path start_image.png
    --control_image_path start_image.png --one_frame_inference control_index=0,target_index=1""",
    """python wan_generate_video.py --output_type latent_images
    --image_path start_image.png --end_image_path end_image.png
    --control_image_path start_image.png end_image.png --one_frame_inference control_index=0;2,target_index=1""",
    "python wan_cache_latents.py --dataset_config path/to/toml --vae path/to/vae --clip path/to/clip --one_frame",
    "python wan_train_network.py --task flf2v-14B --one_frame",
    "python convert_lora.py --input lora.safetensors --output converted.safetensors --target other",
]


def commands(page: Path) -> list[str]:
    """Return the command lines in a page's bash blocks, continued lines joined."""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def parsed(command: str) -> str | None:
    """Parse a command that calls one of our scripts with that script's own parser; return the script's name."""
    words = shlex.split(command, comments=True)
    if words[:2] == ["accelerate", "launch"]:
        given = launch_command_parser().parse_args(words[2:])
        script, arguments = given.training_script, given.training_script_args
    elif words[0] == "torchrun":
        given = torchrun_parser().parse_args(words[1:])
        script, arguments = given.training_script, given.training_script_args
    else:
        script = next((word for word in words[:3] if word in SCRIPTS), None)
        if script is None:
            return None
        arguments = words[words.index(script) + 1 :]
    assert script in SCRIPTS, command
    spec = importlib.util.spec_from_file_location(script[:-3], ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Parsed(Exception):
        pass

    def stop_after_parsing(doc, *groups, **_):
        parse_options(doc, *groups, argv=arguments)
        raise Parsed

    module.parse_options = stop_after_parsing
    with pytest.raises(Parsed):
        module.main()
    return script


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    monkeypatch.setattr("utils.hub_files.download", lambda repo, name, *_: ROOT / name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_of_the_page_parses(page):
    for command in commands(page):
        try:
            parsed(command)
        except UserError as error:
            raise AssertionError(f"{page.name}: {command}: {error}") from None


@pytest.mark.parametrize("command", KNOWN_COMMANDS)
def test_the_commands_people_know_parse_as_they_stand(command):
    assert parsed(command) in SCRIPTS


def test_a_wrong_option_in_a_page_would_be_found():
    with pytest.raises(UserError, match="--video_sice: unknown option"):
        parsed("python wan_generate_video.py --video_sice 480 832")


def test_every_script_has_a_command_in_the_docs():
    shown = {parsed(command) for page in PAGES for command in commands(page)}
    assert shown >= SCRIPTS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_rough_edge_of_musubi_tuner_has_a_row():
    page = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    assert sorted(map(int, re.findall(r"^\| R(\d+) \| [^|]+ \| [^|]+ \|$", page, re.M))) == list(range(1, 71))
