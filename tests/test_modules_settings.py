"""What a run tells of its options: neither secrets nor where things are."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from modules.settings import hide_secrets, told, tracked
from modules.stopping import command_to_resume
from utils.options import option


@dataclass(frozen=True)
class Options:
    """some"""

    rate: float = option(1.0, "a number")
    words: tuple[str, ...] = option((), "some words")
    dit: Path | None = option(None, "a file")
    vae: Path | None = option(None, "another file")
    files: tuple[Path, ...] = option((), "files")
    resume: str | None = option(None, "a state")
    token: str | None = option(None, "a key", secret=True)


GIVEN = Options(rate=2.0, words=("a", "b"), dit=Path("/home/me/dit.bin"), files=(Path("x/y"),), resume="z", token="T0P")


def test_the_log_has_every_option_but_secrets_and_of_paths_their_names():
    assert told([GIVEN]) == {
        "rate": {"value": 2.0, "changed": True},
        "words": {"value": ["a", "b"], "changed": True},
        "dit": {"value": "dit.bin", "changed": True},
        "vae": {"value": None, "changed": False},
        "files": {"value": ["y"], "changed": True},
    }


def test_trackers_get_no_paths_at_all():
    assert tracked([GIVEN]) == {"rate": 2.0, "words": "('a', 'b')"}


def test_secrets_leave_the_words_of_the_process_and_the_command_to_resume(monkeypatch, caplog):
    words = ["train.py", "--token", "T0P", "--rate", "2", "--token=T0P", "--dit", "--token"]
    monkeypatch.setattr(sys, "argv", [*words])
    hide_secrets([GIVEN])
    assert sys.argv == ["train.py", "--rate", "2", "--dit"]
    assert "T0P" not in command_to_resume(Path("s")) + json.dumps(told([GIVEN])) + caplog.text
    monkeypatch.setattr("modules.stopping._typed", lambda: ["torchrun", "t.py", "--huggingface_token", "T0P"])
    assert command_to_resume(Path("s")).split() == ["torchrun", "t.py", "--resume", "s"]  # of the launcher's words
    assert "--token: all users of this machine can read command lines" in caplog.text
