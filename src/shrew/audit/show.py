"""An audit as tables for people and as plain values for machines."""

import re
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shrew.audit.held import ROLES, SEVERITIES, Audit, Held, mean_bits, printable

COLORS = {"note": "dim", "waste": "yellow", "fallback": "yellow", "claim": "red", "broken": "bold red"}
TITLES = {"linear": "linear layers", "embedding": "embeddings", "head": "head", "other": "the rest"}


def plain(audit: Audit) -> dict[str, Any]:
    """For --json."""
    return {
        "path": str(audit.path), "format": audit.format, "claims": audit.claims, "bytes": audit.size,
        "weights": audit.weights, "bits_per_weight": audit.bits,
        "tensors": [{"name": item.name, "shape": list(item.shape), "role": item.role, "effective": item.effective,
                     "quantized": item.quantized, "code_bits": item.code, "bytes": item.bytes,
                     "bits_per_weight": item.bits} for item in audit.held],
        "findings": [{"severity": item.severity, "text": item.text, "advice": item.advice,
                      "tensors": list(item.tensors)} for item in audit.findings],
    }  # fmt: skip


def show(audit: Audit, console: Console) -> None:
    console.print(f"[bold]{escape(printable(audit.path.name))}[/bold]: {escape(audit.format)}", soft_wrap=True)
    for claim in audit.claims:
        console.print(f"  says [italic]{escape(claim)}[/italic]", soft_wrap=True)
    console.print(_sums(audit))
    console.print(_tensors(audit))
    for item in sorted(audit.findings, key=lambda item: -[*SEVERITIES].index(item.severity)):
        advice = f" [dim]({escape(item.advice)})[/dim]" if item.advice else ""
        color = COLORS[item.severity]
        console.print(f"[{color}]{item.severity}[/{color}]: {escape(item.text)}{advice}", soft_wrap=True)
    if not any(item.severity != "note" for item in audit.findings):
        console.print("Nothing is hidden: the weights are what the label says, as far as sizes tell.")


def _sums(audit: Audit) -> Table:
    table = Table("", "types", "tensors", "weights", "bytes", "bits a weight", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    table.add_row("[bold]whole file[/bold]", "", f"{len(audit.held):,}", f"{audit.weights:,}", f"{audit.size:,}",
                  f"[bold]{audit.bits.get('whole file', 0):.3f}[/bold]")  # fmt: skip
    for role in ROLES:
        items = audit.role(role)
        if items:
            sizes: dict[str, int] = defaultdict(int)
            for item in items:
                sizes[item.effective] += item.weights
            total = max(sum(sizes.values()), 1)
            kinds = ", ".join(f"{escape(kind)} {size / total:.0%}" if len(sizes) > 1 else escape(kind)
                              for kind, size in sorted(sizes.items(), key=lambda pair: -pair[1]))  # fmt: skip
            table.add_row(TITLES[role], kinds, f"{len(items):,}", f"{sum(item.weights for item in items):,}",
                          f"{sum(item.bytes for item in items):,}", f"{mean_bits(items):.3f}")  # fmt: skip
    return table


def _tensors(audit: Audit) -> Table:
    """Every weight; those of one name in several layers, with the same type and shape, in one row."""
    rows: dict[tuple[Any, ...], list[Held]] = defaultdict(list)
    for item in audit.held:
        rows[re.sub(r"\d+", "#", item.name), item.shape, item.effective, round(item.bits, 6)].append(item)
    table = Table("weight", "shape", "type", "bits a weight")
    table.columns[0].overflow = "fold"
    table.columns[3].justify = "right"
    for items in rows.values():
        first = items[0]
        count = f" [dim]× {len(items)}[/dim]" if len(items) > 1 else ""
        name = escape(together([item.name.removesuffix(".weight") for item in items])) + count
        table.add_row(name, " × ".join(map(str, first.shape)), escape(first.effective), f"{first.bits:.3f}")
    return table


def together(names: list[str]) -> str:
    """Names that differ in numbers alone as one: layers.{0-3,7}.mlp."""
    pieces = [re.split(r"(\d+)", name) for name in names]
    shown = []
    for place, piece in enumerate(pieces[0]):
        if place % 2 == 0:
            shown.append(piece)
            continue
        numbers = sorted({int(item[place]) for item in pieces})
        if len(numbers) == 1:
            shown.append(piece)
            continue
        runs = [[numbers[0], numbers[0]]]
        for number in numbers[1:]:
            if number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        shown.append("{" + ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs) + "}")
    return "".join(shown)
