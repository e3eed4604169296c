"""Both notebooks: kept clean, and run from top to bottom."""

import ast
import json
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ["1_tokens", "2_inside_a_model"]
KERNEL = "under-test"
MINUTES = 3


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())


def sources(name: str, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == kind]


def test_the_notebooks_are_all_here():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_no_outputs_and_no_paths_of_a_machine(name: str):
    for cell in read(name)["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert set(read(name)["metadata"]) == {"kernelspec", "language_info"}
    text = "\n".join(sources(name, "code") + sources(name, "markdown"))
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|opt|usr|mnt|Users)\b|[A-Z]:\\\\", text)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_s_code_parses_and_imports_what_is_there(name: str):
    tree = ast.parse("\n".join(sources(name, "code")))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imported if (node.module or "").startswith("llmlab")]
    assert ours
    for node in ours:
        module = __import__(node.module, fromlist=["_"])  # type: ignore[arg-type]
        for alias in node.names:
            assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_begins_with_its_title_and_explains_what_it_runs(name: str):
    cells = read(name)["cells"]
    assert "".join(cells[0]["source"]).startswith(f"# {name.partition('_')[0]}. ")
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds.count("markdown") >= kinds.count("code") / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    kernel = tmp_path / "jupyter" / "kernels" / KERNEL
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": KERNEL, "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    # A user's kernel has one device and all of the compiler's optimisations, and a first run finds nothing prepared.
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    env |= {
        "LLMLAB_CACHE": str(tmp_path / "cache"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "default",
        "TMPDIR": str(tmp_path),
    }
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=570, kernel_name=KERNEL, resources={"metadata": {"path": str(tmp_path)}}
    )
    before = children_seconds()
    client.execute(env=env)
    # Processor time, since others may be at work on this machine: no less than what an idle one would need.
    seconds = children_seconds() - before
    assert seconds < MINUTES * 60

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    warnings = [output.text for output in outputs if output.output_type == "stream" and "Warning: " in output.text]
    assert not warnings
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == sum(source.count("plt.show()") for source in sources(name, "code"))


def children_seconds() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
