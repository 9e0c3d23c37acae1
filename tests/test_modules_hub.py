"""Files and states to Hugging Face and back, on a stand-in for its server."""

import shlex
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from modules.hub import HubOptions, Uploads, check_hub, resumed_from
from modules.run_log import read_log
from modules.stopping import command_to_resume
from tests.hub_repositories import TOKEN, Hub
from tests.test_modules_trainer import trainer  # noqa: F401
from utils.errors import UserError

HOW = f"--learning_rate 1e-3 --huggingface_repo_id me/it --huggingface_token {TOKEN}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return a stand-in that huggingface_hub talks to."""
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()
    server.server_close()


def test_every_file_and_state_is_there_at_the_end_and_the_token_nowhere(trainer, hub, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(HOW)])
    options = "--max_train_steps 4 --save_every_n_steps 2 --save_state --save_state_to_huggingface"
    run = trainer(f"{HOW} {options} --huggingface_path_in_repo loras/mine/ --huggingface_repo_visibility public")
    run.run()
    folder = run.plan.options.saving.output_dir
    assert hub.repositories["models/me/it"]["private"] is False
    local = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(("name_log", "name_report"))
    }
    assert {f"loras/mine/{name}": content for name, content in local.items()} == hub.files()
    assert any("step00000002-state/manifest.json" in name for name in local)
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert TOKEN.encode() not in everything and TOKEN not in command_to_resume(folder)


def test_without_a_path_files_go_to_the_top_of_a_private_repository(trainer, hub):  # noqa: F811
    trainer(f"{HOW} --max_train_steps 1").run()
    assert list(hub.files()) == ["name.safetensors"] and hub.repositories["models/me/it"]["private"] is True


def test_a_run_goes_on_from_a_state_there(trainer, hub, monkeypatch):  # noqa: F811
    options = "--learning_rate 1e-3 --network_dropout 0.2 --max_train_steps 4 --save_every_n_steps 2 --save_state"
    straight = trainer(f"{HOW} {options} --save_state_to_huggingface --huggingface_path_in_repo runs/a")
    straight.run()
    state = "me/it/runs/a/name-step00000002-state"
    for where in (state, f"{state}:main", f"{state}:main:model"):
        resumed = trainer(f"{options} --resume_from_huggingface --resume {where} --huggingface_token {TOKEN}")
        assert resumed.step == 2
    resumed.run()
    folders = [run.plan.options.saving.output_dir for run in (straight, resumed)]
    want, got = (load_file(folder / "name.safetensors") for folder in folders)
    assert all(torch.equal(want[key], got[key]) for key in want)
    monkeypatch.setattr(sys, "argv", ["t.py", "--resume_from_huggingface", "--resume", state])
    assert command_to_resume(folders[1] / "s").split() == ["python", "t.py", "--resume", str(folders[1] / "s")]


def test_a_failed_upload_is_tried_again_at_the_end_and_told_and_ends_nothing(trainer, hub, caplog):  # noqa: F811
    run = trainer(f"{HOW} --max_train_steps 2 --save_every_n_steps 1")
    hub.refused = {"name-step00000001.safetensors": 1, "name-step00000002.safetensors": 9}
    run.run()
    assert sorted(hub.files()) == ["name-step00000001.safetensors", "name.safetensors"]
    warnings = [line["text"] for line in read_log(run.record.log.path) if line["kind"] == "warning"]
    assert len(warnings) == 3
    assert "name-step00000001.safetensors could not be uploaded" in warnings[0] and "at the end" in warnings[0]
    assert "name-step00000002.safetensors is not at Hugging Face" in warnings[-1]
    assert warnings[-1] in caplog.text and TOKEN not in caplog.text


def test_uploads_beside_the_training_are_waited_for_at_the_end_and_before_a_file_goes(hub, tmp_path):
    options = HubOptions("me/it", huggingface_token=TOKEN, async_upload=True)
    check_hub(options, saves_states=False)
    hub.gate.clear()
    uploads, path = Uploads(options), tmp_path / "a.safetensors"
    path.write_bytes(b"x" * 100)
    start = time.monotonic()
    uploads.add(path)
    assert time.monotonic() - start < 1 and not hub.files()
    for wait in (lambda: uploads.wait_for(path), uploads.finish):
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        hub.gate.set()
        waiting.join(20)
        assert not waiting.is_alive() and hub.files() == {"a.safetensors": b"x" * 100}
        hub.gate.clear()
        uploads.add(path)
    hub.gate.set()
    uploads.finish()


def test_training_with_uploads_beside_it_leaves_the_same_files_there(trainer, hub):  # noqa: F811
    run = trainer(f"{HOW} --max_train_steps 3 --save_every_n_steps 1 --save_last_n_steps 1 --async_upload")
    run.run()
    names = [f"name-step0000000{step}.safetensors" for step in (1, 2, 3)]
    assert sorted(hub.files()) == [*names, "name.safetensors"]
    assert not (run.plan.options.saving.output_dir / names[0]).exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--huggingface_repo_id mine", "--huggingface_repo_id mine: is not of the form owner/name."),
        ("--huggingface_repo_id me/it --huggingface_token wrong", "--huggingface_repo_id me/it: cannot be reached ("),
        (f"{HOW} --huggingface_repo_type modell", "--huggingface_repo_type: invalid choice"),
        (
            "--resume_from_huggingface",
            "--resume is missing: --resume_from_huggingface needs a state there. Write owner/name/",
        ),
        ("--resume_from_huggingface --resume me/it", "--resume me/it: --resume_from_huggingface needs a state there"),
        ("--resume_from_huggingface --resume me/it/a:b:modul", "modul is no type of repository. Did you mean 'model'?"),
    ],
)
def test_what_is_wrong_is_refused_before_the_model_loads(trainer, hub, nothing_loads, options, line):  # noqa: F811
    with pytest.raises(UserError) as error:
        trainer(options)
    assert line in str(error.value) and "wrong" not in str(error.value).partition("cannot be reached")[2]


def test_states_that_are_there_are_named_where_one_is_not(hub):
    hub.repositories["models/me/it"] = {"private": True, "files": {"a/name-state/model.safetensors": b"", "b.txt": b""}}
    options = HubOptions(resume_from_huggingface=True, huggingface_token=TOKEN)
    with pytest.raises(UserError, match="there is no a/nam-state in me/it. Did you mean 'a/name-state'?"):
        resumed_from(options, "me/it/a/nam-state")
    assert resumed_from(HubOptions(), "latest") == "latest"


def test_options_without_a_repository_are_told_to_be_ignored(caplog):
    check_hub(HubOptions(async_upload=True), saves_states=True)
    assert "--async_upload: ignored without --huggingface_repo_id" in caplog.text
