"""quickstart.py: sets up once, prints what it runs, and ends as its commands end."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """The script as a module whose environment would be made in a temporary folder."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "PYTHON", tmp_path / ".venv" / "python")
    return module


def test_the_environment_is_made_once_and_again_when_the_requirements_change(quickstart, monkeypatch, tmp_path):
    commands = []

    def pretend(command):
        commands.append([str(word) for word in command])
        if "venv" in command:
            quickstart.VENV.mkdir()
            quickstart.PYTHON.touch()

    monkeypatch.setattr(quickstart, "run", pretend)
    quickstart.set_up(".")
    assert [command[2] for command in commands] == ["venv", "pip"] and "constraints.txt" in commands[1]
    quickstart.set_up(".")
    assert len(commands) == 2
    quickstart.set_up(".[dev]")
    assert len(commands) == 3 and commands[2][-1] == ".[dev]"
    quickstart.set_up(".")
    assert len(commands) == 3
    (tmp_path / "pyproject.toml").write_text("changed")
    (tmp_path / "constraints.txt").write_text("")
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    quickstart.set_up(".")
    assert len(commands) == 4 and commands[3][2] == "pip"


def test_each_command_is_printed_as_one_would_type_it_and_its_failure_ends_the_run(quickstart, capsys):
    quickstart.run([sys.executable, "-c", "print('a b')"])
    assert "-c 'print('\"'\"'a b'\"'\"')'" in capsys.readouterr().out or sys.platform == "win32"
    with pytest.raises(SystemExit) as end:
        quickstart.run([sys.executable, "-c", "import sys; sys.exit(7)"])
    assert end.value.code == 7


def test_a_word_it_does_not_know_is_refused():
    done = subprocess.run([sys.executable, ROOT / "quickstart.py", "tests"], capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'tests'" in done.stderr


def test_a_damaged_or_missing_weight_file_is_named_with_the_fix(quickstart, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    quickstart.check_weights()
    weights = tmp_path / "weights"
    shutil.copytree(ROOT / quickstart.WEIGHTS, weights)
    monkeypatch.setattr(quickstart, "WEIGHTS", weights)
    (weights / "spiece.model").write_bytes(b"else")
    with pytest.raises(SystemExit, match="spiece.model is not the file that was shipped.*git checkout.*recipe"):
        quickstart.check_weights()
    (weights / "vae.safetensors").unlink()
    with pytest.raises(SystemExit, match="vae.safetensors is missing"):
        quickstart.check_weights()
