"""What a model folder claims of its quantization, and where the weights are otherwise.

Every method has settings of its own; a row of METHODS turns them into one question: what should this module be?
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrew.audit.held import Finding, Held, mean_bits, named, printable

NAME = re.compile(
    r"(?:^|[^a-z0-9])(?:w(\d)a\d+|int(\d)|(\d)[-_ ]?bits?|(nf4|fp4|mxfp4|nvfp4)|fp8)(?:[^a-z0-9]|$)", re.I
)
WHOLE = 9  # bits from which on a weight counts as not quantized
# Regular expressions of strangers are tried only in a form that cannot take for ever.
SLOW = re.compile(r"\)[*+?{]|[{]|[*+][*+?]|[^(]\?|^\?")
WILDCARDS, LONGEST = 3, 200


@dataclass(frozen=True)
class Wanted:
    """What a module should be stored as; None where nothing is said. `group` 0 is a row."""

    bits: float
    group: int | None = None
    name: str = ""

    def __str__(self) -> str:
        shown = self.name or f"{self.bits:g} bits"
        return shown + ("" if self.group is None else f" in groups of {self.group}" if self.group else " by rows")


@dataclass(frozen=True)
class Claim:
    """`of` says what the module of a weight of a role should be, None for one that is left as it is on purpose."""

    words: str
    of: Callable[[str, str], Wanted | None]
    unread: tuple[str, ...] = ()  # rules that are not tried


class Rules:
    """Names and regular expressions of modules, those that are not tried kept in `unread`."""

    def __init__(self) -> None:
        self.unread: list[str] = []

    def one(self, pattern: Any, regex: bool, part: bool = False) -> Callable[[str], bool]:
        """Whether a rule fits a module: as a regular expression, as (with `part`) a piece of the name, or in full."""
        if not isinstance(pattern, str) or len(pattern) > LONGEST:
            self.unread.append(printable(str(pattern)))
            return lambda module: False
        if not regex:
            return lambda module: pattern in module if part else module == pattern or module.endswith("." + pattern)
        try:
            if SLOW.search(pattern) or len(re.findall(r"[*+]", pattern)) > WILDCARDS:
                raise ValueError("slow")
            known = re.compile(pattern)
        except (ValueError, re.error, RecursionError, OverflowError):
            self.unread.append(printable(pattern))
            return lambda module: False
        return lambda module: known.match(module[:LONGEST]) is not None

    def any(self, patterns: Any, regex: bool = False, part: bool = False) -> Callable[[str], bool]:
        found = [self.one(item, regex, part) for item in patterns] if isinstance(patterns, list | tuple | dict) else []
        return lambda module: any(fits(module) for fits in found)

    def marked(self, patterns: Any) -> Callable[[str], bool]:
        """Rules of compressed-tensors: 're:' begins a regular expression."""
        found = []
        for item in patterns if isinstance(patterns, list) else []:
            regex = isinstance(item, str) and item.startswith("re:")
            found.append(self.one(item.removeprefix("re:") if regex else item, regex))
        return lambda module: any(fits(module) for fits in found)


def _whole(value: Any) -> int | None:
    return value if type(value) is int and -1 <= value < 2**31 else None


def _group(value: Any) -> int | None:
    found = _whole(value)
    return 0 if found == -1 else found


def gptq(stated: dict[str, Any]) -> Claim:
    """AutoGPTQ, GPTQModel and AWQ say bits and groups once; `dynamic` rules change or except modules."""
    rules = Rules()
    bits, group = _whole(stated.get("bits", stated.get("w_bit"))), stated.get("group_size", stated.get("q_group_size"))
    default = Wanted(bits, _group(group)) if bits and bits > 0 else None
    left = rules.any(stated.get("modules_to_not_convert"), part=True)
    inside = stated.get("modules_in_block_to_quantize")
    if isinstance(inside, list) and inside and isinstance(inside[0], list):
        inside = [name for block in inside if isinstance(block, list) for name in block]
    only = rules.any(inside)
    dynamic: list[tuple[Callable[[str], bool], Wanted | None]] = []
    given = stated.get("dynamic")
    for pattern, change in given.items() if isinstance(given, dict) else ():
        wanted = None
        if not pattern.startswith("-:") and isinstance(change, dict) and default is not None:
            own = _group(change.get("group_size"))
            wanted = Wanted(_whole(change.get("bits")) or default.bits, default.group if own is None else own)
        dynamic.append((rules.one(re.sub(r"^[-+]:", "", pattern), True), wanted))

    def of(module: str, role: str) -> Wanted | None:
        if role == "embedding" or left(module) or (role == "head" and stated.get("lm_head") is not True):
            return None
        for fits, wanted in dynamic:
            if fits(module):
                return wanted
        return default if not inside or only(module) or role == "head" else None

    return Claim(_words(stated, default), of, tuple(rules.unread))


def auto_round(stated: dict[str, Any]) -> Claim:
    """One setting for the blocks; `extra_config` has others by module or pattern."""
    rules, bits = Rules(), _whole(stated.get("bits"))
    default = Wanted(bits, _group(stated.get("group_size"))) if bits and bits > 0 else None
    blocks = stated.get("block_name_to_quantize", stated.get("to_quant_block_names"))
    blocks = blocks.split(",") if isinstance(blocks, str) else blocks
    inside = rules.any(blocks, part=True)
    others: list[tuple[Callable[[str], bool], Wanted | None]] = []
    given = stated.get("extra_config")
    for pattern, change in given.items() if isinstance(given, dict) else ():
        own = _whole(change.get("bits")) if isinstance(change, dict) else None
        own = bits if own is None else own
        group = _group(change.get("group_size", stated.get("group_size"))) if isinstance(change, dict) else None
        wanted = Wanted(own, group) if own and 0 < own < WHOLE else None
        others.append((rules.one(pattern, regex=bool(re.search(r"[*\\(\[^$]", pattern))), wanted))

    def of(module: str, role: str) -> Wanted | None:
        for fits, wanted in others:
            if fits(module):
                return wanted
        return default if role == "linear" and (not blocks or inside(module)) else None

    return Claim(_words(stated, default), of, tuple(rules.unread))


def bitsandbytes(stated: dict[str, Any]) -> Claim:
    rules, default = Rules(), None
    if stated.get("load_in_4bit") or stated.get("_load_in_4bit"):
        name = stated.get("bnb_4bit_quant_type", "fp4")
        default = Wanted(4, None, name if name in ("nf4", "fp4") else "")
    elif stated.get("load_in_8bit") or stated.get("_load_in_8bit"):
        default = Wanted(8, None, "int8")
    skipped = stated.get("llm_int8_skip_modules")
    left = rules.any(skipped, part=True)

    def of(module: str, role: str) -> Wanted | None:
        return default if role == "linear" and not left(module) else None

    return Claim(f"bitsandbytes, {default or 'nothing said'}", of, tuple(rules.unread))


def compressed(stated: dict[str, Any]) -> Claim:
    """compressed-tensors: groups of modules, each with its own weights; the first that fits a module counts."""
    rules = Rules()
    ignored = rules.marked(stated.get("ignore"))
    groups: list[tuple[Callable[[str], bool], bool, Wanted]] = []
    given = stated.get("config_groups")
    for group in given.values() if isinstance(given, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        bits = _whole(weights.get("num_bits")) if isinstance(weights, dict) else None
        if not isinstance(weights, dict) or not bits or bits < 1:
            continue
        floats = weights.get("type") == "float"
        strategy, size = weights.get("strategy"), _group(weights.get("group_size"))
        name = f"fp{bits}" if floats else ""
        wanted = Wanted(bits, 0 if strategy == "channel" else size if strategy in ("group", "tensor_group") else None,
                        name)  # fmt: skip
        targets = group.get("targets")
        groups.append((rules.marked(targets), isinstance(targets, list) and "Linear" in targets, wanted))

    def of(module: str, role: str) -> Wanted | None:
        if ignored(module):
            return None
        for fits, every, wanted in groups:
            if (every and role in ("linear", "head")) or fits(module):
                return wanted
        return None

    kinds = ", ".join(dict.fromkeys(str(wanted) for *_, wanted in groups)) or "nothing said"
    return Claim(f"compressed-tensors ({printable(str(stated.get('format')))}), {kinds}", of, tuple(rules.unread))


def floats(stated: dict[str, Any]) -> Claim:
    """fp8 and mxfp4 of transformers, and ModelOpt's, which say one type for all and name what is left."""
    rules, method = Rules(), str(stated.get("quant_method"))
    algorithm = str(stated.get("quant_algo", method)).lower()
    bits = 4 if "fp4" in algorithm else 8 if "fp8" in algorithm or "int8" in algorithm else 0
    default = Wanted(bits, None, algorithm if bits else "") if bits else None
    left = stated.get("modules_to_not_convert") or stated.get("exclude_modules") or stated.get("ignore")
    left = left if isinstance(left, list) else []
    skip = rules.any([re.escape(item).replace(r"\*", ".*") for item in left if isinstance(item, str)], regex=True)
    parts = rules.any(left, part=True)

    def of(module: str, role: str) -> Wanted | None:
        return default if role == "linear" and not skip(module) and not parts(module) else None

    return Claim(f"{printable(method)}, {default or 'nothing said'}", of, tuple(rules.unread))


def hqq(stated: dict[str, Any]) -> Claim:
    rules, settings = Rules(), stated.get("quant_config")
    weights = settings.get("weight_quant_params") if isinstance(settings, dict) else None
    bits = _whole(weights.get("nbits")) if isinstance(weights, dict) else None
    default = Wanted(bits, _group(weights.get("group_size"))) if isinstance(weights, dict) and bits else None
    left = rules.any(stated.get("skip_modules"), part=True)

    def of(module: str, role: str) -> Wanted | None:
        return default if role == "linear" and not left(module) else None

    return Claim(f"HQQ, {default or 'nothing said'}", of, tuple(rules.unread))


def _words(stated: dict[str, Any], default: Wanted | None) -> str:
    more = [str(stated[key]) for key in ("checkpoint_format", "packing_format", "version")
            if isinstance(stated.get(key), str)]  # fmt: skip
    return f"{printable(', '.join([str(stated.get('quant_method', 'gptq')), *more]))}, {default or 'nothing said'}"


METHODS: dict[str, Callable[[dict[str, Any]], Claim]] = {
    "gptq": gptq, "awq": gptq, "auto-round": auto_round, "intel/auto-round": auto_round, "auto_round": auto_round,
    "bitsandbytes": bitsandbytes, "compressed-tensors": compressed, "fp8": floats, "fbgemm_fp8": floats,
    "mxfp4": floats, "modelopt": floats, "hqq": hqq,
}  # fmt: skip


def compare(claim: Claim, held: list[Held]) -> Iterator[Finding]:
    """Where the weights are not what is claimed of them."""
    asked = [(item, claim.of(module_of(item.name), item.role)) for item in held if item.role != "other"]
    wanted = [(item, want) for item, want in asked if want is not None]
    total = sum(item.role == "linear" for item, _ in asked)
    if wanted and not any(item.quantized for item, _ in wanted):
        yield Finding("claim", f"quantization_config claims {claim.words}, and nothing in the file is quantized.",
                      "quantize it again, or remove quantization_config from config.json")  # fmt: skip
        return
    dense = [(item, want) for item, want in wanted if not item.quantized]
    for item, want in dense:
        if item.role == "head":
            yield Finding("fallback", f"{item.name} is listed as quantized ({want}), stored dense ({item.effective}): "
                          f"{item.bytes:,} bytes.", "tools often skip a tied or odd-sized head; take it off the list, "
                          "or quantize it with a tool that can", (item.name,))  # fmt: skip
    layers = [item for item, _ in dense if item.role == "linear"]
    if layers:
        yield Finding("fallback", f"quantization_config claims {claim.words}, and {len(layers)} of {total} linear "
                      f"layers are {_types(layers)}: {named(item.name for item in layers)}.", _dense_advice(layers),
                      tuple(item.name for item in layers))  # fmt: skip
    for what, differs in (("bits", _other_bits), ("groups", _other_group)):
        other = [(item, want) for item, want in wanted if item.quantized and differs(item, want)]
        if other:
            first, want = other[0]
            yield Finding("claim", f"quantization_config claims {want}, and {len(other)} of {total} linear layers have "
                          f"other {what} ({_types(item for item, _ in other)}): "
                          f"{named(item.name for item, _ in other)}.", "believe the sizes: "
                          f"{first.name} takes {first.bits:.2f} bits a weight", tuple(item.name for item, _ in other)
                          )  # fmt: skip
    more = [item for item, want in asked if want is None and item.quantized]
    if more:
        yield Finding("note", f"{len(more)} weights are quantized that quantization_config does not name "
                      f"({_types(more)}): {named(item.name for item in more)}.",
                      tensors=tuple(item.name for item in more))  # fmt: skip
    if claim.unread:
        yield Finding("note", f"{len(claim.unread)} rules of quantization_config were not tried, being too long or too "
                      f"slow to match: {named(claim.unread)}.")  # fmt: skip


def _other_bits(item: Held, want: Wanted) -> bool:
    named_otherwise = want.name in ("nf4", "fp4") and not item.effective.startswith((want.name, "mxfp4", "nvfp4"))
    return item.code != want.bits or (want.name.startswith("fp") and item.effective.startswith("int")) or (
        named_otherwise)  # fmt: skip


def _other_group(item: Held, want: Wanted) -> bool:
    """A row that is shorter than a group has one scale either way."""
    if want.group is None or item.group is None or item.code != want.bits:
        return False
    columns = item.shape[-1]
    return (item.group or columns) != min(want.group or columns, columns)


def _dense_advice(layers: list[Held]) -> str:
    odd = sorted({extent for item in layers for extent in item.shape[-2:] if extent % 32})
    if odd:
        return f"tools often skip sizes that are no multiple of 32 ({', '.join(map(str, odd[:4]))}): narrow them first"
    return "name what is left dense (ignore, modules_to_not_convert), or quantize it"


def _types(items: Iterable[Held]) -> str:
    return ", ".join(sorted({item.effective for item in items}))


def module_of(name: str) -> str:
    return name.removesuffix(".weight")


def by_name(path: Path, held: list[Held]) -> tuple[str, list[Finding]]:
    """What the name of a file or folder claims ('' for nothing), compared with the linear layers."""
    found = NAME.findall(path.resolve().name)
    layers = [item for item in held if item.role == "linear"]
    if not found or not layers:
        return "", []
    *numbers, four = found[-1]
    bits = int(next((number for number in numbers if number), 4 if four else 8))
    if not 1 < bits < WHOLE:
        return "", []
    words = f"{bits} bits"
    right = sum(item.weights for item in layers if item.code == bits)
    if 2 * right >= sum(item.weights for item in layers):
        return words, []
    kinds = _types(layers)
    return words, [Finding("claim", f"The name says {words}, and the linear layers are {kinds}: "
                           f"{mean_bits(layers):.2f} bits a weight.", "believe the sizes, and rename it")]  # fmt: skip
