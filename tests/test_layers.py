"""The house: imports point right, scripts import no script, packages re-export nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYER = {"utils": 0, "wan": 1, "networks": 1, "dataset": 1, "modules": 2}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def imported_packages(path: Path) -> set[str]:
    """Return the first part of every module that a file imports, wherever in the file it does so."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", LAYER)
def test_a_package_imports_only_from_layers_below_it(package):
    paths = list((ROOT / package).glob("**/*.py"))
    assert paths
    for path in paths:
        found = imported_packages(path)
        for other in found & LAYER.keys() - {package}:
            assert LAYER[other] < LAYER[package], f"{path} imports {other}"
        assert not found & (SCRIPTS | {"tests", "bench", "examples"}), f"{path} imports a script"


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_imports_no_other_script(script):
    assert not imported_packages(ROOT / f"{script}.py") & SCRIPTS


def test_quickstart_needs_the_standard_library_alone():
    import sys

    assert imported_packages(ROOT / "quickstart.py") <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", LAYER)
def test_the_init_of_a_package_is_one_docstring(package):
    body = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0].value.value, str)


@pytest.mark.parametrize("package", LAYER)
def test_importing_a_package_sets_nothing_up(package):
    """No call at module level sets up logging, touches the environment or asks for a device."""
    forbidden = {
        "basicConfig",
        "manual_seed",
        "set_num_threads",
        "is_available",
        "run_script",
        "putenv",
        "filterwarnings",
    }
    for path in (ROOT / package).glob("**/*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                continue
            for node in ast.walk(statement):
                if isinstance(node, ast.Call):
                    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                    assert name not in forbidden, f"{path}:{node.lineno} calls {name} on import"
