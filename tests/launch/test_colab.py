"""The Colab notebook is a valid notebook without outputs, and its cells run from top to bottom."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest

from ..recipes import shrunk
from .tools import LAUNCH

NOTEBOOK = LAUNCH / "colab.ipynb"


@pytest.fixture
def no_window() -> Iterator[None]:
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    plt.close("all")
    matplotlib.use(backend)


def _code() -> dict[str, str]:
    """Return the notebook's code by the cells' names."""
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    return {cell["id"]: cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"}


def test_notebook_is_valid_and_plain() -> None:
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            compile(cell["source"], cell["id"], "exec")
    assert list(_code()) == ["settings", "install", "doctor", "train", "curves", "compare", "improve"]


def test_install_takes_the_accelerators_own_jax(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    ran: list[list[str]] = []
    there: set[str] = set()
    monkeypatch.setattr("subprocess.run", lambda words, check: ran.append(words))
    monkeypatch.setattr("os.path.exists", lambda path: path in there)
    monkeypatch.setattr("shutil.which", lambda name: name if name in there else None)
    for found in (set[str](), {"/dev/accel0"}, {"/dev/vfio/0"}, {"nvidia-smi"}):
        there |= found
        exec(_code()["install"], {"SOURCE": "/content/pit_jax"})
    assert [words[-1].removeprefix("/content/pit_jax") for words in ran] == ["", "[tpu]", "[tpu]", "[cuda]"]


@pytest.mark.slow
def test_cells_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], no_window: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(LAUNCH.parent))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    names: dict[str, Any] = {}
    code = _code()
    exec(code.pop("settings"), names)
    names["MODEL_DIR"] = str(tmp_path / "run")
    names["FLAGS"] += [f"--gin.{binding}" for binding in (*shrunk.STEPS, *shrunk.SYNTHETIC)]
    names |= {"sys": sys, "subprocess": __import__("subprocess")}
    code.pop("install")
    for name, source in code.items():
        exec(compile(source, name, "exec"), names)
    said = capsys.readouterr().out
    assert "no problems" in said and "against original" in said
    assert (tmp_path / "run" / "report" / "report.html").exists()
    assert len((tmp_path / "better.jsonl").read_text().splitlines()) == 4
    assert [len(axis.lines[0].get_xdata()) for axis in plt.gcf().axes] == [2, 2, 2, 2, 2]
