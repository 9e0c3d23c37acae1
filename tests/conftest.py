"""Fixtures of all tests: recorded behaviour of the original code, tiny models, and scripts run as a user runs them."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
_frozen = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    # Oversubscribed cores are slower than one thread, and every child process inherits this.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not needs_gpu(config):
        # What is exact on a CPU is rounded otherwise on a GPU, and scripts take the GPU where they see one.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_finish(session: pytest.Session) -> None:
    # What has been imported stays; scripts, which release memory between stages, need not look through it each time.
    gc.freeze()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    # The same for the one large package that is imported when it is needed, once it has been.
    if "transformers.models.umt5" in sys.modules and not item.session.stash.get(_frozen, False):
        item.session.stash[_frozen] = True
        gc.collect()
        gc.freeze()


def needs_gpu(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "gpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not (needs_gpu(config) and torch.cuda.is_available()):
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and pytest -m gpu"))


@pytest.fixture
def nothing_loads(monkeypatch) -> None:
    """Fail the test where a model is loaded: what is wrong is told before."""
    for name in (
        "trainer.load_dit",
        "generation.load_text_encoder",
        "conditions.load_clip",
        "generation_options.load_dit",
        "generation_options.load_vae",
    ):
        monkeypatch.setattr(f"modules.{name}", lambda *given, name=name, **more: pytest.fail(f"{name} was called"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with recorded inputs and outputs of the original implementations."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def recipe(golden: Path) -> ModuleType:
    """The module that makes the weights and inputs belonging to the recorded outputs."""
    spec = importlib.util.spec_from_file_location("golden_recipe", golden / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of every kind, by name (tests/tiny.py); not to be changed by a test."""
    return tiny.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def dataset(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file over the recorded caches: pictures of three sizes, clips of three lengths, a movie."""
    text = json.loads((golden / "cache_index.json").read_text())["plans"]["t2v"]["toml"]
    path = tmp_path_factory.mktemp("dataset") / "data.toml"
    path.write_text(text.replace("<GOLDEN>", golden.as_posix()))
    return path


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of the root, "-m" and a module, or "-c" and a program, with arguments; return the result as text."""

    def run(script: str, *arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, script if script in ("-m", "-c") else str(ROOT / script), *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", env={**os.environ, **environment}
        )

    return run
