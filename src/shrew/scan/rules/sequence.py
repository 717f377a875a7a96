"""What follows what within a function: `then` after `first` with the same name, and no `reset` between.

"After" is by place in the text: what stands in the other branch of an `if` does not follow, nor does anything behind a
block that ends by leaving (return, goto, break, exit). Loops are not gone round.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shrew.scan.functions import words
from shrew.scan.rules.flow import File
from shrew.scan.rules.query import Captures, Query, Steps
from shrew.scan.rules.rule import Rule
from shrew.scan.rules.syntax import callee, first_child, name_of

if TYPE_CHECKING:
    from tree_sitter import Node

ORDINARY = 60  # levels between a statement's part and its function that cost nothing
_LEAVE = words("exit _exit abort err errx die _Exit longjmp sys.exit os.exit panic")


def after(file: File, rule: Rule, captures: Captures, steps: Steps) -> Iterator["Node"]:
    """The first node that fits `then` where it may follow what `captures` found. Raises Spent."""
    begun = captures.get("name")
    if rule.then is None or begun is None:
        return
    name = _name(begun, file)
    function = file.function(begun)
    reach = _reach(captures.get("at", begun), function, file, steps)
    start = captures.get("at", begun).end_byte
    resets = list(_places(rule.reset, function, name, start, file, steps)) if rule.reset is not None else []
    for node, at in sorted(_places(rule.then, function, name, start, file, steps), key=lambda item: item[1]):
        if not any(low <= at < high for low, high in reach):
            continue
        if any(start <= place <= at for _, place in resets):
            return
        yield node
        return


def _name(node: "Node", file: File) -> str:
    return name_of(node, file.syntax)


def _places(
    query: Query, function: "Node", name: str, start: int, file: File, steps: Steps
) -> "Iterator[tuple[Node, int]]":
    """What fits in the function from byte `start` on with this name: the node to report and where the name stands."""
    waiting = [function]
    while waiting:
        node = waiting.pop()
        steps.take()
        if node.end_byte <= start:
            continue
        if node.type in query.roots:
            for captures in query.matches(node, steps):
                named = captures.get("name")  # in one alternative and not in another, perhaps
                if named is not None and named.start_byte >= start and _name(named, file) == name:
                    yield captures.get("at", node), named.start_byte
        waiting += node.children


def _reach(node: "Node", function: "Node", file: File, steps: Steps) -> list[tuple[int, int]]:
    """The byte ranges that may run after `node`. Raises Spent."""
    ranges: list[tuple[int, int]] = []
    start, up = node.end_byte, 0
    while node.id != function.id and (above := node.parent) is not None:
        up += 1
        steps.take(up if up > ORDINARY else 0)  # tree-sitter finds a parent from the root down
        if above.type in file.syntax.blocks or above.type == "block_body":
            ranges.append((start, above.end_byte))
            if _leaves(above, start, file):
                return ranges
            start = above.end_byte
        elif above.type in ("if_statement", "else_clause"):
            if above.type == "if_statement" and _is(node, above.child_by_field_name("condition")):
                ranges.append((start, above.end_byte))
            elif node.type in file.syntax.jumps:
                return ranges
            start = above.end_byte
        node = above
    return [*ranges, (start, function.end_byte)]


def _is(node: "Node", other: "Node | None") -> bool:
    return other is not None and node.id == other.id


def _leaves(block: "Node", start: int, file: File) -> bool:
    """Whether a block leaves, on its own level, after byte `start`."""
    for child in block.children:
        if child.end_byte <= start:
            continue
        if child.type in file.syntax.jumps:
            return True
        inner = first_child(child) if child.type == "expression_statement" else None
        if inner is not None and inner.type in file.syntax.calls and callee(inner, file.syntax) in _LEAVE:
            return True
    return False
