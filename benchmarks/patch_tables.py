"""What `patches.py scaling` found, as a table and a picture: functions of records alone."""

import statistics as middle
from collections.abc import Sequence

import panels

from shrew.record import Record

AXES = {"flops": "FLOPs", "cpu": "CPU-seconds"}


def report(found: Sequence[Record]) -> str:
    """Markdown: bits per byte by budget, what each arm is at the largest, and the laws."""
    runs = [item for item in found if item.metric == "bits_per_byte"]
    budgets = sorted({item.detail["budget"] for item in runs})
    names = list(dict.fromkeys(item.model for item in runs))
    gaps = {(item.model, item.detail["budget"]): item for item in found if item.metric == "difference"}
    rows = [f"| arm | {' | '.join(f'{budget:g} FLOPs' for budget in budgets)} | parameters | table bytes | "
            "bytes a patch | CPU-seconds |", "|---|" + "---|" * (len(budgets) + 4)]  # fmt: skip
    for name in names:
        mine = [item for item in runs if item.model == name]
        cells = []
        for budget in budgets:
            values = [float(item.value or 0) for item in mine if item.detail["budget"] == budget]
            gap = gaps.get((name, budget))
            told = "" if gap is None else f" ({gap.value:+.3f}, {gap.low:+.3f} to {gap.high:+.3f})"
            cells.append(f"{middle.fmean(values):.3f}{told}" if values else "diverged")
        last = mine[-1].detail
        rows.append(f"| {name} | {' | '.join(cells)} | {last['parameters']:,} | {last['table_bytes']:,} | "
                    f"{last['patch']:.2f} | {last['cpu']:.0f} |")  # fmt: skip
    rows.append("")
    for item in found:
        axis = AXES.get(item.detail.get("axis", ""), "")
        span = f"{item.value:+.4f} ({item.low:+.4f} to {item.high:+.4f})" if item.low is not None else ""
        if item.metric == "slope":
            rows.append(f"{item.model}, {axis}: slope {span}")
        elif item.metric == "predicted":
            rows.append(f"{item.model}, {axis}: {span} predicted, {item.detail['measured']:.4f} measured")
        elif item.metric == "slope_difference":
            cross = item.detail["cross"]
            met = "parallel" if cross is None else f"meets {item.detail['against']} at {cross:.3g} {axis}"
            rows.append(f"{item.model}, {axis}: slope {span} against {item.detail['against']}'s; {met}")
    return "\n".join(rows)


def picture(found: Sequence[Record]) -> str:
    """Bits per byte against FLOPs, CPU-seconds and the bytes of the saved model. Plain bytes stand in the table alone:
    so far above the others that these would fall together."""
    runs = [item for item in found if item.metric == "bits_per_byte" and item.model != "bytes"]
    drawn = []
    for key, label in (("flops", "training FLOPs"), ("cpu", "CPU-seconds, one thread"),
                       ("bytes", "bytes of the saved model (bf16), tables too")):  # fmt: skip
        series: dict[str, list[panels.Point]] = {}
        for name, budget in dict.fromkeys((item.model, item.detail["budget"]) for item in runs):
            some = [item for item in runs if (item.model, item.detail["budget"]) == (name, budget)]
            x = middle.fmean(item.detail[key] for item in some)
            y = middle.fmean(float(item.value or 0) for item in some)
            series.setdefault(name, []).append(panels.Point(x, y))
        drawn.append(panels.Panel(label, series))
    return panels.draw(drawn, "bits per byte, held-out authors")
