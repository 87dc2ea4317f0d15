"""``examples/quickstart.ipynb`` runs from its first cell to its last, and holds no output of a machine."""

import os
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
nbformat = pytest.importorskip("nbformat", reason="reads the notebook")


@pytest.fixture
def notebook():
    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    return found


def test_it_is_stripped(notebook):
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert not re.search(r"[\"'(=](/|[A-Z]:\\|~)", NOTEBOOK.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_it_runs(notebook, tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient", reason="runs the notebook")
    pytest.importorskip("ipykernel", reason="the notebook's kernel")
    pytest.importorskip("espeakng_loader", reason="the notebook synthesises its corpus")
    root = NOTEBOOK.parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'python'}", "HF_HUB_OFFLINE": "1"}
    environment |= {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    runner = client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    runner.execute(env=environment)
    said = "\n".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output
    )
    accuracy = re.search(r"^accuracy +([\d.]+)% +\(40 examples\)", said, re.MULTILINE)
    assert accuracy and float(accuracy[1]) > 40, said  # of four classes
    assert "README.md" in said and re.search(r"^LST \[.*\]\nUniPT \[.*\]$", said, re.MULTILINE), said
    assert not list(tmp_path.glob("*.wav"))
