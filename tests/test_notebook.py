"""The notebook runs from its first cell to its last on the embedded base, and is kept without its outputs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "personalize.ipynb"

nbformat = pytest.importorskip("nbformat", reason="notebooks are read by nbformat, which comes with nbclient")


def test_it_is_kept_without_outputs():
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run by nbclient")
    pytest.importorskip("ipykernel", reason="a notebook needs a kernel")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    book = nbformat.read(NOTEBOOK, as_version=4)
    there = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=there).execute()
    shown = [output.data["image/png"] for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
             if "image/png" in output.get("data", {})]  # fmt: skip
    widths = [Image.open(io.BytesIO(base64.b64decode(one))).width // 192 for one in shown]
    assert widths == [1, 3, 4, 6, 2]
    said = "".join(o.text for cell in book.cells if cell.cell_type == "code" for o in cell.outputs if "text" in o)
    assert "40 iterations, loss" in said
    assert (tmp_path / "person" / "export" / "person.safetensors").is_file()
    compared = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[2])))).astype(int)
    photo, base, _, finished = np.hsplit(compared, 4)
    assert np.abs(finished - photo).mean() < np.abs(base - photo).mean()  # nearer to the photo than the base is
