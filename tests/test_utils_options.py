"""Options: declared once, typed, checked from the command line and from TOML alike."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.options import make_parser, option, parse_options


def steps(word: str) -> float:
    """Return a fraction for "10%", else the number."""
    return float(word[:-1]) / 100 if word.endswith("%") else float(word)


@dataclass(frozen=True)
class Loop:
    """the training loop"""

    learning_rate: float = option(2e-6, "how far each step goes")
    max_train_steps: int = option(1600, "optimizer steps")
    gradient_checkpointing: bool = option(False, "recompute instead of store; saves 80% of the memory")
    lr_warmup: float = option(0.0, "steps or a fraction", parse=steps)


@dataclass(frozen=True)
class Files:
    """files"""

    dit: Path | None = option(None, "weights", required=True)
    video_size: tuple[int, int] = option((256, 256), "size", metavar=("HEIGHT", "WIDTH"))
    lora_weight: tuple[Path, ...] = option((), "LoRA files")
    solver: str = option("unipc", "solver", choices=("unipc", "dpm++"))
    pinned: bool = option(True, "page-lock")
    no_metadata: bool = option(False, "write none")


def parse(text: str) -> tuple[Loop, Files]:
    return parse_options("Train.", Loop, Files, argv=text.split())


def test_what_is_not_typed_keeps_its_default():
    loop, files = parse("--dit a")
    assert loop == Loop()
    assert files == Files(dit=Path("a"))


def test_values_come_typed_and_prefixes_and_equal_signs_work():
    loop, files = parse("--dit=w --learning 1e-4 --grad --video_size 480 832 --lora_weight x y --max_train_steps=3")
    assert loop == Loop(learning_rate=1e-4, gradient_checkpointing=True, max_train_steps=3)
    assert files == Files(Path("w"), (480, 832), (Path("x"), Path("y")))


def test_a_switch_that_is_on_can_be_turned_off():
    for words, pinned, no_metadata in (
        ("", True, False),
        ("--pinned", True, False),
        ("--no_pin", False, False),
        ("--no_pinned --no_m", False, True),
    ):
        files = parse(f"--dit a {words}")[1]
        assert (files.pinned, files.no_metadata) == (pinned, no_metadata)


def test_a_blank_after_the_dashes_is_forgiven():
    assert parse("--dit a -- gradient_checkpointing")[0].gradient_checkpointing


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--dit a --learning_rat3 1", "--learning_rat3: unknown option. Did you mean '--learning_rate'?"),
        ("--dit a --max_train_steps x", "--max_train_steps: 'x' is not a whole number"),
        ("--dit a --solver unipv", "Did you mean 'unipc'?"),
        ("--dit a --video_size 1", "--video_size: expected 2 arguments"),
        ("", "--dit: required, but not given"),
        ("--dit=", "--dit: the path is empty"),
        ("--dit a --config_file=", "--config_file: the path is empty"),
    ],
)
def test_a_wrong_option_is_named_with_the_fix(arguments, line):
    with pytest.raises(UserError) as error:
        parse(arguments)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_help_shows_each_group_under_its_docstring():
    text = make_parser("Train.\n\n    python train.py", Loop, Files).format_help()
    assert text.index("the training loop") < text.index("--learning_rate") < text.index("files:")
    assert "saves 80% of the memory" in text and "HEIGHT WIDTH" in text and "(default: 1600)" in text
    assert "(default: 0.0)" in text and "(default: False)" not in text
    assert "python train.py" in text


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_config_file_is_read_flat_and_the_command_line_wins(tmp_path):
    path = write(
        tmp_path, '[a]\nlearning_rate = 1\nmax_train_steps = 5\n[b]\nlora_weight = ["x"]\nlr_warmup = "10%"\ndit = "d"'
    )
    loop, files = parse(f"--config_file {path.with_suffix('')} --max_train_steps 7")
    assert loop == Loop(learning_rate=1.0, max_train_steps=7, lr_warmup=0.1)
    assert files == Files(Path("d"), lora_weight=(Path("x"),))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("learning_rate = '1e-4'", "learning_rate = '1e-4': must be a number, not a text in quotes"),
        ("max_train_steps = 1.5", "max_train_steps = 1.5: must be a whole number, not a number"),
        ("gradient_checkpointing = 1", "must be true or false"),
        ("max_train_steps = true", "must be a whole number, not true or false"),
        ("solver = 'bogus'", "choose from unipc, dpm++"),
        ("learning_rates = 1", "unknown option 'learning_rates'. Did you mean 'learning_rate'?"),
        ("video_size = [1]", "needs 2 values, got 1"),
        ("lr_warmup = 'soon'", "lr_warmup = 'soon'"),
        ("a = = 1", "not valid TOML"),
        ("dit = ''", "dit = '': the path is empty"),
        ("dit = 3", "dit = 3: must be a path in quotes, not a whole number"),
    ],
)
def test_a_config_file_is_checked_like_the_command_line(tmp_path, text, line):
    with pytest.raises(UserError) as error:
        parse(f"--dit d --config_file {write(tmp_path, text)}")
    assert line in str(error.value) and "run.toml" in str(error.value)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing.toml: no such file"):
        parse(f"--dit d --config_file {tmp_path / 'nothing'}")
