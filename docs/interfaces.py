"""Write docs/interfaces.md, what gprune passes to functions and classes of users: `python docs/interfaces.py`.

Texts come from docstrings, and for fields of dataclasses from the comments beside them.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import gprune
from gprune.calibration.statistics import ChannelStatistics, CorpusStatistics, Moments
from gprune.importance.metrics import UnitWeights
from gprune.importance.scores import Scores
from gprune.models.masks import Masks
from gprune.partition.modules import ModuleRanks
from gprune.partition.objective import RefinementInputs
from gprune.recoveries.contract import Material
from gprune.sparsity.budget import Budget, budget_of
from gprune.sparsity.cut import keep_masks
from gprune.sparsity.thresholds import masks_from_thresholds, start_thresholds
from gprune.stages.base import FrozenLMStage
from gprune.units.structure import Slice, Units

HEAD = """# What your functions and classes get

[Recipes](extend.md) show how to write a metric, an allocation, a recovery, a stage and so on. This page has the objects
that gprune passes to them, and the functions that they may call. It is made from docstrings by `python
docs/interfaces.py`.

Symbols: H hidden dimensions, N neurons of a block, E experts, G KV groups of a block, C channels that enter an output
projection (the N neurons, E x N neurons of experts, or the attention channels of all query heads), K modules of a
block, D drift corpora, B windows of T tokens. *Block* means one FFN and one attention of a decoder layer, or one of
them. Units have keys such as `neurons.3`, the neurons of block 3.
"""
SECTIONS: dict[str, list[Callable]] = {
    "Decorators": [gprune.metric, gprune.allocation, gprune.recovery],
    "Functions for stages": [budget_of, start_thresholds, masks_from_thresholds, keep_masks],
}
# Class -> its fields, properties and methods that users need.
OBJECTS: dict[type, str] = {
    UnitWeights: "inputs output",
    Moments: "count sum sum_sq mean mean_sq variance gram saliency",
    ChannelStatistics: "total halves half gram saliency",
    CorpusStatistics: "channels influence errors",
    Scores: "channels experts",
    Slice: "path dim unit parts is_norm",
    Units: "key kind layer count parameters slices inputs reads attributes settings rows inside least step stays size",
    Budget: "units price target total sparsity scope share equal width_multiple removed lost of_kind at removed_by",
    ModuleRanks: "p labels modules sizes logits with_offsets",
    Masks: "ffn attention blocks kept",
    RefinementInputs: "embedding drift shifts valid",
    Material: "dense masks ridge statistics batches fit",
    FrozenLMStage: "lm measured_model tokens batch_loss autocast_losses",
}


def page() -> str:
    """The whole page."""
    parts = [HEAD, "\n## Objects\n", *map(object_section, OBJECTS)]
    for title, functions in SECTIONS.items():
        parts += [f"\n## {title}\n", *map(function_section, functions)]
    return "".join(parts)


def object_section(cls: type) -> str:
    """A class: its path, its docstring without sections, and a table of members."""
    described = members(cls)
    rows = [f"| `{name}` | {described[name]} |" for name in OBJECTS[cls].split()]
    table = "\n".join(["| name | what it is |", "|---|---|", *rows])
    return f"\n### `{cls.__module__}.{cls.__name__}`\n\n{first_part(cls)}\n\n{table}\n"


def function_section(function: Callable) -> str:
    """A function: its path, its signature and its docstring, with arguments as a list."""
    module = "gprune" if function.__name__ in gprune.__all__ else function.__module__
    parameters = inspect.signature(function).parameters.values()  # without types, which docstrings have
    call = inspect.Signature([each.replace(annotation=inspect.Parameter.empty) for each in parameters])
    text, *sections = re.split(r"\n\n(?=(?:Example|Args|Raises):\n)", inspect.cleandoc(function.__doc__))
    paragraphs = [f"### `{module}.{function.__name__}`", f"`{function.__name__}{call}`", text]
    for section in sections:  # errors are for people who read the code
        title, _, content = section.partition(":\n")
        if title == "Example":
            code = textwrap.dedent(content).strip().replace("\n\n@", "\n\n\n@")  # as ruff formats it
            paragraphs.append(f"```python\n{code}\n```")
        elif title == "Args":
            paragraphs.append(arguments(content))
    return "\n" + "\n\n".join(paragraphs) + "\n"


def arguments(section: str) -> str:
    """A docstring's section of arguments as a list in Markdown."""
    entries = re.split(r"\n(?=\S)", textwrap.dedent(section).strip())
    items = [re.sub(r"^(\w+): ", r"- `\1`: ", " ".join(entry.split())) for entry in entries]
    return "\n".join(textwrap.fill(item, 120, subsequent_indent="  ", break_on_hyphens=False) for item in items)


def first_part(cls: type) -> str:
    """The docstring of a class up to its first section, such as `Args:`."""
    return re.split(r"\n\n(?:Args|Attributes):\n", inspect.cleandoc(cls.__doc__))[0]


def members(cls: type) -> dict[str, str]:
    """Member -> its description: the first paragraph of a docstring, or the comment beside a field."""
    lines = inspect.getsource(cls).splitlines()
    described = {}
    for node in ast.parse(textwrap.dedent("\n".join(lines))).body[0].body:
        if isinstance(node, ast.AnnAssign):
            described[node.target.id] = comment_of(lines, node)
        elif isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            described[node.name] = one_line(re.split(r"\n\n", text)[0]) + called(node)
    return described


def comment_of(lines: list[str], node: ast.AnnAssign) -> str:
    """The comment at the end of a field's line or, without one, in the lines before it; at least the type."""
    kind = f"`{ast.unparse(node.annotation)}`"
    _, found, text = lines[node.lineno - 1].partition("  # ")
    above = node.lineno - 2
    while not found and lines[above].strip().startswith("# "):
        text = f"{lines[above].strip()[2:]} {text}"
        above -= 1
    return one_line(f"{kind}. {text}" if text else kind)


def called(node: ast.FunctionDef) -> str:
    """How a method is called; empty for a property."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if decorators & {"property", "cached_property"}:
        return ""
    names = [argument.arg for argument in (*node.args.args[1:], *node.args.kwonlyargs)]  # without self or cls
    return f" Called as `{node.name}({', '.join(names)})`."


def one_line(text: str) -> str:
    """Text in one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
