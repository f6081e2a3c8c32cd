"""Results of a list as a file: one line per row for programs (.csv, .json), or tables (.md, .tex, .html)."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from gprune.report.table import in_markdown
from gprune.storage.files import replacing
from gprune.studies.result import StudyResult

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_results(study: StudyResult, path: Path) -> None:
    """Write a file atomically in the format of its suffix."""
    text = WRITERS[path.suffix.lower()](study)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def title_of(study: StudyResult) -> str:
    """Return the title of a list: its key `about`, or the name of the file."""
    return study.listing.content.about or study.listing.path.stem


def notes_of(study: StudyResult) -> list[str]:
    """Return the notes below the tables: protocols, rows with another tokenizer, and rows without a valid record."""
    return [*study.report.protocols(), *study.warnings]


def _csv(study: StudyResult) -> str:
    return study.to_frame().to_csv(index=False, lineterminator="\n")


def _json(study: StudyResult) -> str:
    return study.to_frame().to_json(orient="records", indent=1, double_precision=15, force_ascii=False) + "\n"


def _markdown(study: StudyResult) -> str:
    tables = (f"## {table.title}\n\n{table.to_text()}" for table in study.tables)
    return "\n\n".join([f"# {in_markdown(title_of(study))}", *tables, *map(in_markdown, notes_of(study))]) + "\n"


def _latex(study: StudyResult) -> str:
    comments = (f"% {note}\n" for note in (title_of(study), *notes_of(study)))
    head = "".join(" ".join(comment.splitlines()) + "\n" for comment in comments)
    tables = (table.to_latex(f"tab:{study.listing.path.stem}-{table.name}") for table in study.tables)
    return head + "\n" + "\n".join(tables)


def _html(study: StudyResult) -> str:
    body = []
    for table in study.tables:
        body += [f"<h2>{escape(table.title)}</h2>", table.to_html()]
        body += [f"<p>{escape(table.note)}</p>"] if table.note else []
    body += [f"<p>{escape(note)}</p>" for note in notes_of(study)]
    return PAGE.format(title=escape(title_of(study)), body="\n".join(body))


WRITERS: dict[str, Callable[[StudyResult], str]] = {
    ".csv": _csv, ".json": _json, ".md": _markdown, ".tex": _latex, ".html": _html,
}  # fmt: skip
