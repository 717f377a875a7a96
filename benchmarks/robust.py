"""What the models that `patches.py scaling` left can stand, and where they spend: noise, spelling, unseen scripts and
languages; FLOPs a byte over a document.

Noise is that of the Byte Latent Transformer's paper (Pagnoni et al. 2024), with swapped letters in the place of its
spaced capitals. Probes ask for likelihoods alone: which of four continuations follows a noisy passage (by what the
passage adds to its log-probability), and which of two spellings stands in the book.
"""

import argparse
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import panels
import torch

from shrew import files, folder, tasks
from shrew.blocks.model import build
from shrew.data import Document
from shrew.folder import Loaded
from shrew.measure import interval, paired_bootstrap
from shrew.measure.statistics import share_interval
from shrew.record import Record
from shrew.tasks import Scores
from shrew.tasks.likelihood import continuations

OPTIONS, CONTEXT, ANSWER = 4, 240, 60  # of a question: continuations, and characters of the passage and of each
NEUTRAL = "\n"  # what a continuation's log-probability is held against

# Article 1 of the Universal Declaration of Human Rights, its first sentence.
LANGUAGES = {
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Italian": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "Dutch": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.",
    "Portuguese": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "Chinese": "人人生而自由,在尊严和权利上一律平等。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
}


# --- texts made worse -------------------------------------------------------------------------------------------------


def drop(text: str, draw: random.Random) -> str:
    """A tenth of the characters is left out."""
    return "".join(letter for letter in text if draw.random() >= 0.1)


def repeat(text: str, draw: random.Random) -> str:
    """A fifth of the characters stands two to five times."""
    return "".join(letter * (1 + draw.randint(1, 4)) if draw.random() < 0.2 else letter for letter in text)


def case(text: str, draw: random.Random) -> str:
    """Every character is large or small by chance."""
    return "".join(letter.upper() if draw.random() < 0.5 else letter.lower() for letter in text)


def upper(text: str, draw: random.Random) -> str:
    return text.upper()


def swap(text: str, draw: random.Random) -> str:
    """A tenth of the characters changes places with the next; none moves twice."""
    letters, at = list(text), 0
    while at + 1 < len(letters):
        if draw.random() < 0.1:
            letters[at], letters[at + 1] = letters[at + 1], letters[at]
            at += 1
        at += 1
    return "".join(letters)


NOISES: dict[str, Callable[[str, random.Random], str]] = {
    "drop": drop, "repeat": repeat, "case": case, "upper": upper, "swap": swap,
}  # fmt: skip
SCRIPTS = {"Cyrillic": 0x430, "Greek": 0x3B1, "Georgian": 0x10D0}  # where their small letters begin


def rewritten(text: str, first: int) -> str:
    """The same text with every Latin letter written as another script's, one for one."""
    return "".join(chr(first + ord(letter) - ord("a")) if "a" <= letter <= "z" else letter for letter in text.lower())


def conditions(books: Sequence[Document]) -> dict[str, list[Document]]:
    """The same books as they are, with each noise, and in other scripts; and the languages."""
    found = {"clean": list(books)}
    for name, work in NOISES.items():
        found[name] = [Document(book.id, work(book.text, random.Random(f"{name} {book.id}"))) for book in books]
    for name, first in SCRIPTS.items():
        found[f"in {name}"] = [Document(book.id, rewritten(book.text, first)) for book in books]
    return found | {"languages": [Document(name, text) for name, text in LANGUAGES.items()]}


# --- probes -----------------------------------------------------------------------------------------------------------


def questions(books: Sequence[Document], count: int, draw: random.Random) -> list[tuple[str, list[str]]]:
    """Passages, and behind each what follows it first, then what follows other places of the same book."""
    found = []
    for number in range(count):
        text = " ".join(books[number % len(books)].text.split())
        spaces = [at for at in range(CONTEXT, len(text) - ANSWER) if text[at] == " "]
        places = draw.sample(spaces, OPTIONS)
        found.append((text[places[0] - CONTEXT : places[0]], [text[at : at + ANSWER] for at in places]))
    return found


def answered(loaded: Loaded, asked: Sequence[tuple[str, list[str]]]) -> np.ndarray:
    """[n], 1 where the passage adds most to the log-probability of its own continuation."""
    pairs = [(passage, option) for passage, options in asked for option in options]
    gain = continuations(loaded, pairs) - continuations(loaded, [(NEUTRAL, option) for _, option in pairs])
    return (gain.reshape(-1, OPTIONS).argmax(1) == 0).astype(float)


def misspelt(books: Sequence[Document], count: int, draw: random.Random) -> list[tuple[str, str, str]]:
    """A passage, what follows it, and the same with two inner letters of its first word changed about."""
    found = []
    known = {word for book in books for word in re.findall(r"[a-z]+", book.text)}
    for number in range(count):
        text = " ".join(books[number % len(books)].text.split())
        words = [word for word in re.finditer(r" [a-z]{5,}(?= )", text) if word.start() > CONTEXT]
        for word in draw.sample(words, len(words)):
            right = word.group()
            inner = [at for at in range(2, len(right) - 2) if right[at] != right[at + 1]]
            if inner:
                at = draw.choice(inner)
                wrong = right[:at] + right[at + 1] + right[at] + right[at + 2 :]
                if wrong[1:] not in known:
                    rest = text[word.end() : word.end() + 20]
                    found.append((text[word.start() - CONTEXT : word.start()], right + rest, wrong + rest))
                    break
    return found


def spelt(loaded: Loaded, asked: Sequence[tuple[str, str, str]]) -> np.ndarray:
    """[n], 1 where the right spelling is the likelier."""
    right, wrong = (continuations(loaded, [(one[0], one[which]) for one in asked]) for which in (1, 2))
    return (right > wrong).astype(float)


def models(work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each arm of a study and its largest model."""
    known = work / "chosen.json"
    for arm, told in json.loads(known.read_text()).items() if known.exists() else ():
        if (work / told["model"] / "config.json").exists():
            yield arm, told | {"path": work / told["model"]}


def noise(args: argparse.Namespace) -> list[Record]:
    """Bits per byte and probes under noise and on unseen scripts and languages, of each arm's largest model."""
    work, found = args.work.resolve(), []
    held = json.loads((work / "held.json").read_text())["held"]["final"]
    books = [Document(name, text[: args.characters]) for name, text in held]
    texts = tasks.Text(splits=conditions(books))
    asked = questions(books, args.questions, random.Random(0))
    spelling = misspelt(books, args.questions, random.Random(1))
    first: dict[str, Scores] = {}
    rows: dict[str, list[str]] = {}
    for arm, told in models(work):
        loaded = folder.load(told["path"])
        window = tasks.Text(splits=texts.splits, window=loaded.model.config.max_position_embeddings)
        for name in texts.splits:
            one = window.score(loaded, name)
            columns = {key: one.columns[key] for key in ("bits", "bytes")}
            one = Scores(one.task, one.split, one.metric, one.units, columns)
            base = first.setdefault(name, one)
            common: dict[str, Any] = {"run": "patches-noise", "model": arm, "unit": "bits/byte", "task": one.task}
            found.append(Record(metric="bits_per_byte", detail={"text": name}, **common, **vars(interval(one))))
            cell = f"{one.value():.3f}"
            if one is not base:
                gap = paired_bootstrap(base, one, "difference")
                found.append(Record(metric="difference", detail={"text": name, "against": next(iter(rows))}, **common,
                                    **vars(gap)))  # fmt: skip
                cell += f" ({gap.value:+.3f}, {gap.low:+.3f} to {gap.high:+.3f})"
            rows.setdefault(arm, []).append(cell)
        probes = {"spelling": (spelt(loaded, spelling), 1 / 2)}
        for name, change in {"clean": lambda text, _: text, **NOISES}.items():
            worse = [(change(passage, random.Random(passage)), options) for passage, options in asked]
            probes[f"continuation, {name}"] = (answered(loaded, worse), 1 / OPTIONS)
        for name, (right, chance) in probes.items():
            share = share_interval(right)
            found.append(Record(run="patches-noise", model=arm, metric="accuracy", **vars(share),
                                detail={"probe": name, "chance": chance}))  # fmt: skip
            rows[arm].append(f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})")
    if not rows:
        raise SystemExit(f"{work} holds no models; run `scaling` first.")
    names = [*texts.splits, *probes]
    lines = [f"| {name} | {' | '.join(row[at] for row in rows.values())} |" for at, name in enumerate(names)]
    print("\n".join([f"| | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}", *lines]))
    return found


# --- where it spends --------------------------------------------------------------------------------------------------


def passages(book: str) -> dict[str, str]:
    """Easy and hard text, some 400 bytes each."""
    book = " ".join(book.split())
    prose = book[:400]
    sentence = book[-90:].partition(" ")[2] + " "
    draw = random.Random(0)
    return {"prose": prose, "the same words again": (sentence * 9)[:400],
            "numbers": " ".join(str(number) for number in range(100, 200)),
            "words by chance": " ".join(draw.sample(prose.split(), len(prose.split())))[:400],
            "letters by chance": "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(400))}  # fmt: skip


@torch.no_grad()
def spent(loaded: Loaded, text: str) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs and bits of each byte of a text: a byte has the local layers and its share of the patch that it is in."""
    model: Any = loaded.model
    ids = torch.tensor([[256, *text.encode()]])
    length = ids.shape[1]
    ends = model.model.ends(ids)[0]
    logs = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    bits = -logs.gather(1, ids[0, 1:, None])[:, 0].double().numpy() / math.log(2)
    near, patch = shares(model, length)
    starts = torch.cat([torch.tensor([True]), ends[:-1]])
    number = starts.cumsum(0) - 1
    size = torch.bincount(number)[number].double()
    return (near + patch / size).numpy()[1:], bits


def shares(model: Any, length: int) -> tuple[float, float]:
    """FLOPs of a byte in the local layers and the model of entropies, and of a patch in its layers."""
    size, context = model.model.front.bytes, length // 2
    endless = build(replace(model.spec, front=replace(model.spec.front, mean=1e9)))  # has no patch but one
    near = endless.flops(context)
    return near, (model.flops(context) - near) * size


def dynamic(args: argparse.Namespace) -> list[Record]:
    """FLOPs a byte over a document of easy and hard passages."""
    work = args.work.resolve()
    known = dict(models(work))
    if args.arm not in known:
        raise SystemExit(f"{work} holds no model of {args.arm}; run `scaling` first.")
    loaded = folder.load(known[args.arm]["path"])
    book = json.loads((work / "held.json").read_text())["held"]["final"][0][1]
    parts = passages(book)
    flops, bits = spent(loaded, "".join(parts.values()))
    found, low = [], 0
    for name, text in parts.items():
        span = slice(low, low + len(text.encode()))
        low = span.stop
        found.append(Record(run="patches-dynamic", model=args.arm, metric="flops_per_byte", unit="FLOP",
                            value=float(flops[span].mean()), n=span.stop - span.start,
                            detail={"passage": name, "bits_per_byte": float(bits[span].mean()), "from": span.start,
                                    "to": span.stop}))  # fmt: skip
        print(f"{name}: {found[-1].value / 1e3:,.0f} kFLOP and {found[-1].detail['bits_per_byte']:.2f} bits a byte")
    if args.plot:
        files.write_text(args.plot, strip(flops, found))
    return found


def strip(flops: np.ndarray, found: Sequence[Record], over: int = 24) -> str:
    """FLOPs a byte along the document, averaged over `over` bytes, with the mean of each passage, as one SVG."""
    wide, high, left, top, bottom = 860, 260, 58, 34, 40
    right = wide - 12
    smooth = np.convolve(flops, np.ones(over), "same") / np.convolve(np.ones(len(flops)), np.ones(over), "same")
    most = float(smooth.max()) * 1.05

    def across(byte: float) -> float:
        return left + byte / len(flops) * (right - left)

    def down(value: float) -> float:
        return high - bottom - value / most * (high - bottom - top)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" role="img">',
             f'<style>{panels.STYLE}</style><rect class="paper" width="{wide}" height="{high}"/>',
             '<text x="6" y="16">FLOPs a byte</text>']  # fmt: skip
    step = panels.even_step(most)
    for number in range(int(most / step) + 1):
        at = down(number * step)
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{right}"/><text x="{left - 6}" y="{at + 4:.1f}" '
                     f'text-anchor="end">{number * step / 1e3:,.0f}k</text>')  # fmt: skip
    line = "L".join(f"{across(byte):.1f} {down(value):.1f}" for byte, value in enumerate(smooth))
    parts.append(f'<path class="curve" stroke="{panels.COLOURS[0]}" d="M{line}"/>')
    for item in found:
        low, end = across(item.detail["from"]), across(item.detail["to"])
        at = down(float(item.value or 0))
        parts.append(f'<path class="curve" stroke="{panels.COLOURS[1]}" d="M{low:.1f} {at:.1f}H{end:.1f}"/>'
                     f'<path class="grid" d="M{end:.1f} {top}V{high - bottom}"/>'
                     f'<text x="{(low + end) / 2:.1f}" y="{high - bottom + 17}" text-anchor="middle">'
                     f'{escape(item.detail["passage"])}</text><text x="{(low + end) / 2:.1f}" y="{high - bottom + 32}" '
                     f'text-anchor="middle">{item.detail["bits_per_byte"]:.2f} bits a byte</text>')  # fmt: skip
    return "".join(parts) + "</svg>\n"
