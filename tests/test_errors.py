"""Every message of a UserError has one of the five forms in the docstring of `gprune.errors`.

The messages are collected from the source: the texts of `raise UserError(...)` and of the helpers that make messages.
A placeholder of an f-string, or a variable, becomes `X`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from gprune.config import RunConfig, config_from_mapping, parse
from gprune.corpora import load_corpus
from gprune.errors import UserError, quoting

ROOT = Path(__file__).parent.parent / "gprune"
X = "X"
# Optional beginning of every form. It must not contain the words with which a form begins.
PLACE = r"(?:(?!(?:Cannot|Unknown)\b)(?:[^:;.]|[:.](?! ))+: )*"  # a file, a row, or a flag with its value
MORE = r"(?: [^ ].*[.])?"  # sentences with the remedy
FORMS = {
    "invalid value": re.compile(rf"{PLACE}[^:;]+ must (?:not )?.+?(?:; got .+?)?[.]{MORE}", re.DOTALL),
    "settings": re.compile(rf"{PLACE}[^;]+? (?:needs|cannot) .+?(?:; got .+?)?[.]{MORE}", re.DOTALL),
    "unknown name": re.compile(rf"{PLACE}Unknown [^.]+[.]{MORE}", re.DOTALL),
    "failure": re.compile(rf"{PLACE}Cannot .+?: .+[.]{MORE}", re.DOTALL),
}
BEGINNING = re.compile(rf"--[a-z]|[A-Z$'{X}]")
DIALECT = re.compile(
    r"\b(?:expected|is none|are none|that is no|could not be had|is not there|was asked|were asked|sittings?|takes? up|"
    r"but for|stands? for|what came|brings|lies)\b"
)
# Functions that make a message from their arguments, by the positions of the parts of the text.
HELPERS = {
    "UserError": (0,),
    "UnregisteredError": (0,),
    "UnreadableModuleError": (0,),
    "quoting": (0, 1),
    "require": (2,),
    "read_yaml": (1,),
}
ENDINGS = {"require": "; got X.", "read_yaml": " 'X' (X)."}  # what a helper adds to its argument
# Messages that are passed on, or made by `validation_message`, have one of the forms already.
PASSED_ON = {"error": "Cannot do it: the cause.", "validation_message": "--flag must be a number; got 1"}


def template(node: ast.expr | None, names: dict[str, str]) -> str:
    """Return the text of an expression, with `X` for everything that is not literal.

    Args:
        names: text of local variables, by name.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return template(node.value, names) if isinstance(node.value, ast.Name | ast.Call) else X
    if isinstance(node, ast.IfExp):
        return max(template(node.body, names), template(node.orelse, names), key=len)
    if isinstance(node, ast.Call):
        return PASSED_ON.get(getattr(node.func, "id", ""), X)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, names) + template(node.right, names)
    if isinstance(node, ast.Name):
        return names.get(node.id, X)
    return X


def messages(path: Path) -> list[tuple[int, str]]:
    """Return (line, message) of all user errors in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    function_of = {n: function for function in functions for n in ast.walk(function)}  # the innermost one comes last
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)):
        if call.func.id not in HELPERS or getattr(function_of.get(call), "name", "") in HELPERS:
            continue
        # Local variables with a literal text, such as `remedy = "..."`, are part of the message. With several
        # assignments the last one before the call counts.
        names = {"error": PASSED_ON["error"]}
        for n in ast.walk(function_of.get(call, tree)):
            if isinstance(n, ast.Assign) and n.lineno <= call.lineno and isinstance(n.targets[0], ast.Name):
                text = template(n.value, names)
                names[n.targets[0].id] = text if " " in text else X
        parts = [call.args[i] for i in HELPERS[call.func.id] if i < len(call.args)]
        text = (X if call.func.id == "quoting" else "").join([template(part, names) for part in parts])
        if call.func.id == "quoting" and len(parts) == 1:
            text += f"{X}."
        text += ENDINGS.get(call.func.id, "")
        if text.strip(X):  # otherwise the whole message is made by another function
            found.append((call.lineno, text))
    return found


def faults(text: str) -> list[str]:
    """Return the faults of a message."""
    rules = {
        "is not one line": "\n" in text or text != text.strip(),
        "does not begin with a flag or a capital letter": not BEGINNING.match(text),
        "does not end with a full stop": not text.endswith("."),
        "has none of the five forms": not any(form.fullmatch(text) for form in FORMS.values()),
        "has a word of the old dialect": bool(DIALECT.search(text)),
        "has two full stops": ".." in text.replace("...", ""),
    }
    return [fault for fault, holds in rules.items() if holds]


def files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if path != ROOT / "errors.py")


def test_every_message_has_one_of_the_four_forms():
    found = {name: messages(ROOT / name) for name in files()}
    assert sum(map(len, found.values())) > 200
    assert [
        f"{name}:{line}: {', '.join(faults(text))}: {text}"
        for name, of_file in found.items()
        for line, text in of_file
        if faults(text)
    ] == []


def fail_in_a_library():
    with quoting("Cannot read it: "):
        raise OSError("first line.\nsecond line")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: RunConfig(ridge=-1), "--ridge must be 0 or more; got -1."),
        (lambda: RunConfig(nothing=1), "RunConfig: Unknown setting 'nothing'. Available: "),
        (lambda: RunConfig(gprune="yes"), "--gprune must be a valid boolean; got 'yes'."),
        (lambda: config_from_mapping({"logging.tags": [""]}, where="Row 'a'"),
         "Row 'a': --logging.tags[0] must have at least 1 character; got ''."),
        (lambda: RunConfig(trainer={"callbacks": [{"init_args": {}}]}),
         "--trainer.callbacks[0].class_path must be given."),
        (lambda: parse(["ridge=1"]), "Cannot read the command line: unrecognized arguments: ridge=1. See --help."),
        (lambda: load_corpus("no_such_corpus", "test"), "Unknown corpus 'no_such_corpus'. Available: "),
        (fail_in_a_library, "Cannot read it: first line."),
    ],
)  # fmt: skip
def test_messages_made_at_run_time_have_one_of_the_four_forms(call, text):
    with pytest.raises(UserError) as error:
        call()
    assert str(error.value).startswith(text)
    assert faults(str(error.value)) == []
