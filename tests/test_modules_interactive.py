"""Prompts typed one after the other: what stays loaded, what a line costs the others, and a real terminal."""

import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import wan_generate_video
from modules import conditions, generation, generation_options, interactive
from modules.interactive import line_reader
from tests import tiny
from tests.conftest import ROOT
from tests.test_script_wan_generate_video import arguments
from utils.errors import UserError
from utils.safetensors_io import save_file_atomically
from wan.model import WanModel

LINES = ("a red circle --d 1 --s 2", "a blue star --d 2 --s 3 --w 64")


@pytest.fixture
def talk(monkeypatch, models, tmp_path):
    """Run the script in a session of these lines; return the latents that it wrote, by seed."""

    def run(*lines, **options):
        given = iter(lines)

        def read():
            line = next(given, EOFError)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr(interactive, "line_reader", lambda: read)
        how = {
            "prompt": None,
            "seed": None,
            "interactive": True,
            "output_type": "latent",
            "save_path": tmp_path / "out",
        }
        monkeypatch.setattr(sys, "argv", ["x", *arguments(models, **{**how, **options})])
        wan_generate_video.main()
        files = sorted((tmp_path / "out").glob("*_latent.safetensors"))
        return {path.stem.split("_")[1]: load_file(path)["latent"] for path in files}

    return run


@pytest.fixture
def loads(monkeypatch):
    """Which models are loaded, in order."""
    seen = []
    for module, name in (
        (generation, "load_text_encoder"),
        (conditions, "load_clip"),
        (generation_options, "load_vae"),
        (generation_options, "load_dit"),
    ):
        load = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, load=load, name=name, **more: seen.append(name) or load(*given, **more)
        )
    return seen


def single(monkeypatch, models, path, **options):
    monkeypatch.setattr(sys, "argv", ["x", *arguments(models, save_path=path, output_type="latent", **options)])
    wan_generate_video.main()
    return load_file(path)["latent"]


def test_lines_are_what_single_runs_give_and_models_are_loaded_once(talk, loads, models, monkeypatch, tmp_path):
    found = talk(LINES[0], "", "# a remark", LINES[1], output_type="both")
    assert loads == ["load_text_encoder", "load_dit", "load_vae"]
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2
    one = single(monkeypatch, models, tmp_path / "1.safetensors", prompt="a red circle", seed=1, infer_steps=2)
    two = single(
        monkeypatch,
        models,
        tmp_path / "2.safetensors",
        prompt="a blue star",
        seed=2,
        infer_steps=3,
        video_size=[32, 64],
    )
    assert torch.equal(found["1"], one) and torch.equal(found["2"], two)


def test_a_line_that_cannot_be_costs_no_other(talk, caplog):
    bad = ("a cat --w 33", "a cat --d x", "a cat --i nowhere.png", "a cat --s 0")
    assert talk(LINES[0], *bad, KeyboardInterrupt, LINES[1]).keys() == {"1", "2"}
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == len(bad) and "33 pixels wide is not a multiple of 16. Use 32 or 48." in errors[0]


def test_ctrl_c_cancels_one_video_between_two_steps(talk, loads, monkeypatch, caplog):
    forward, calls = WanModel.forward, []

    def interrupted(self, *inputs, **more):
        calls.append(1)
        if len(calls) == 5:  # two predictions a step: in the first step of the second video
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *inputs, **more)

    monkeypatch.setattr(WanModel, "forward", interrupted)
    before = signal.getsignal(signal.SIGINT)
    found = talk(LINES[0], LINES[1], "a red circle --d 3 --s 2")
    assert found.keys() == {"1", "3"} and "cancelled" in caplog.text
    assert len(calls) == 4 + 2 + 4, "the step is ended, and no other begun"
    assert loads == ["load_text_encoder", "load_dit"] and signal.getsignal(signal.SIGINT) is before


def test_where_memory_is_short_the_dit_waits_in_main_memory(talk, loads, models, monkeypatch, tmp_path):
    load, attempts = generation.load_text_encoder, []

    def crowded(*given):
        """Has room only while the DiT is away, and fails once."""
        attempts.append(1)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return load(*given)

    high = tmp_path / "high.safetensors"
    save_file_atomically(tiny.state_dict("dit_t2v", seed=1), high, {"num_heads": "3"})
    pair = {"task": "t2v-A14B", "dit_high_noise": high, "offload_inactive_dit": True, "blocks_to_swap": 1}
    plain = talk(*LINES, **pair)
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    models_seen = []
    encode = generation.encode_prompts

    def forgetful(requests, kept, sampling):
        if "dit" in kept.loaded:
            del kept.loaded["t5"]
            models_seen.append(kept)
            monkeypatch.setattr(generation, "load_text_encoder", crowded)
        return encode(requests, kept, sampling)

    monkeypatch.setattr(generation, "encode_prompts", forgetful)
    again = talk(*LINES, **pair)
    assert len(attempts) == 2 and models_seen[0].parked == {"t5"}, "the DiT has come back"
    assert all(torch.equal(plain[seed], again[seed]) for seed in ("1", "2"))


def test_a_session_that_cannot_be_is_refused_at_once(talk, tmp_path):
    (tmp_path / "lines.txt").write_text("a cat")
    for options, line in (
        ({"from_file": tmp_path / "lines.txt"}, "--interactive: has no use for --from_file"),
        ({"save_path": tmp_path / "a.mp4"}, "names one file, --interactive makes several"),
        ({"t5": tmp_path / "no.pth"}, "--t5"),
        ({"save_path": None}, "--save_path is missing"),
        ({"skip_existing": True}, "--skip_existing: is for --from_file"),
        ({"video_path": tmp_path / "no.mp4"}, "--video_path .*no.mp4: no such file"),
    ):
        with pytest.raises(UserError, match=line):
            talk("a cat", **options)


def test_lines_come_from_a_pipe(monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    read = line_reader()
    assert (read(), read()) == ("one", "two")
    with pytest.raises(EOFError):
        read()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo terminals")
def test_a_terminal_has_prompts_a_history_and_an_end(models, tmp_path):
    import pty

    controller, terminal = pty.openpty()
    how = {"prompt": None, "interactive": True, "output_type": "latent", "save_path": tmp_path / "out"}
    process = subprocess.Popen(
        [sys.executable, "wan_generate_video.py", *arguments(models, **how)],
        cwd=ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    said = ""

    def until(pattern):
        nonlocal said
        end = time.monotonic() + 120
        while not re.search(pattern, said):
            assert time.monotonic() < end, said
            if select.select([controller], [], [], 1)[0]:
                try:
                    said += os.read(controller, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    break
        assert re.search(pattern, said), said
        said = ""

    try:
        until("> $")
        os.write(controller, b"a red circle --d 5\n")
        until(r"wrote .*_5_latent\.safetensors[\s\S]*> $")
        os.write(controller, b"a cat --w 7\n")
        until(r"error: --video_size 32 7.*[\s\S]*> $")
        os.write(controller, b"\x1b[A\x1b[A\n")  # up, up: the first line once more
        until(r"wrote .*_5_latent\.safetensors[\s\S]*> $")
        os.write(controller, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    assert len(list((tmp_path / "out").iterdir())) == 2
