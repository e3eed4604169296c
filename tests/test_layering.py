"""The house: imports only go to a lower floor, and some imports go nowhere."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "llmlab"
FLOORS = {
    "core": 0,
    "kernels": 1,
    "data": 1,
    "model": 2,
    "objective": 3,
    "workdir": 3,
    "train": 4,
    "infer": 4,
    "eval": 5,
    "report": 6,
    "scaling": 6,
    "serve": 6,
    "verbs": 7,
    "cli": 8,
}
FORBIDDEN = ("flax.nnx", "torch", "pickle", "jax._src", "jaxlib")
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """The full names a file imports, at any depth of its code."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path):
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "llmlab" or len(parts) < 2 or parts[1] in (here, "__version__"):
            continue
        assert FLOORS[parts[1]] < FLOORS[here], f"{here} (floor {FLOORS[here]}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_some_imports_go_nowhere(path: Path):
    for name in imports(path):
        assert not any(name == bad or name.startswith(bad + ".") for bad in FORBIDDEN), name
        assert (not name.startswith("flax.linen") and name != "flax.linen") or room(path) == "model", name


def test_every_room_has_a_floor_and_a_purpose():
    for folder in ROOT.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert folder.name in FLOORS
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_help_loads_no_jax():
    code = "import sys, llmlab.cli; llmlab.cli.run(['llmlab', '--help']); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
