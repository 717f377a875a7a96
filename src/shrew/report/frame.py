"""What every page of ours is framed by: the document around it, sections, tables, boxes that scroll."""

from collections.abc import Iterable

from shrew.report.style import CSS
from shrew.report.words import escape

# Nothing may be fetched and nothing may run, whatever is shown.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(title: str, body: str, style: str = "") -> str:
    """A whole HTML document; `style` goes behind the common style sheet."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def section(title: str, note: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + (f'<p class="note">{note}</p>\n' if note else "") + f"{body}</section>\n"


def scroll(label: str, table: str) -> str:
    """A box of its own for what may be wider than a phone; it can be reached and scrolled by keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">{table}</div>\n'


def table(head: Iterable[tuple[str, str]], rows: Iterable[str], kind: str = "") -> str:
    """A table from (class, text) heads and finished rows."""
    cells = "".join(f'<th scope="col" class="{look}">{text}</th>' for look, text in head)
    return f'<table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>\n{"".join(rows)}</tbody></table>'


def small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""
