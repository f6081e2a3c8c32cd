"""Execute notebooks and store their outputs: `python .ci/notebooks.py 02 04` (default: all).

The files are small, and a new execution changes little else than what a reader sees: text of a cell is one output,
paths are relative, pictures have a palette, and times of cells and widgets are not stored. An execution that writes to
stderr is not stored at all.
"""

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
COLOURS = 128  # of a picture
PREFIXES = re.compile(rf"{re.escape(str(ROOT))}/|/tmp/tmp\w+/")  # of paths in text


def execute(path: Path) -> None:
    """Execute a notebook in its folder and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if written := [output.text for output in outputs if is_text(output, "stderr")]:
        raise SystemExit(f"{path.name} wrote to stderr: {written}")
    for output in outputs:
        if "text" in output:
            output.text = PREFIXES.sub("", output.text)
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = with_palette(output.data["image/png"])
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def is_text(output: nbformat.NotebookNode, name: str) -> bool:
    """Return whether an output is text of a stream."""
    return output.output_type == "stream" and output.name == name


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join the pieces in which the text of a stream arrived."""
    result: list[nbformat.NotebookNode] = []
    for output in outputs:
        if result and output.output_type == "stream" and is_text(result[-1], output.name):
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def with_palette(picture: str) -> str:
    """Return a picture (PNG in base64) with few colours."""
    file = io.BytesIO()
    opened = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    opened.quantize(COLOURS, kmeans=4, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for file in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or file.name.startswith(tuple(sys.argv[1:])):
            execute(file)
