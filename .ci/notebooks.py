"""Execute notebooks and store their outputs: `python .ci/notebooks.py 02 04` (default: all).

Text of a cell is stored as one output. Progress bars, ids of executions and times of cells are not stored, so that the
files are small and a new execution changes only what a reader sees. An execution that writes to stderr is not stored.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"


def execute(path: Path) -> None:
    """Execute a notebook in its folder and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    written = [
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if is_text(output, "stderr")
    ]
    if written:
        raise SystemExit(f"{path.name} wrote to stderr: {written}")
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


if __name__ == "__main__":
    for file in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or file.name.startswith(tuple(sys.argv[1:])):
            execute(file)
