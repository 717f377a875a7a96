"""Prefixes of earlier texts, kept so that a text that begins the same way need not be computed again.

A tree: each block holds the tokens that follow its parent's and a snapshot of what they added. Texts that begin alike
share blocks. The oldest leaf goes first when there is no more room: whoever is used makes its parents newer than
itself, so the oldest block of all is always a leaf.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shrew.runtime.states import Snapshot

ID_BYTES = 8
BLOCK_OVERHEAD = 1024  # bytes, about what the objects of a block take


@dataclass(eq=False, slots=True)
class Block:
    parent: "Block | None"
    key: bytes  # its tokens
    end: int  # tokens from the beginning of the text to the end of this block
    snapshot: Snapshot | None
    children: dict[bytes, "Block"] = field(default_factory=dict)
    sizes: Counter[int] = field(default_factory=Counter)  # bytes of the children's keys
    is_kept: bool = True

    @property
    def bytes(self) -> int:
        return BLOCK_OVERHEAD + len(self.key) + (self.snapshot.bytes if self.snapshot else 0)


class Prefixes:
    """At most `limit` bytes of them. For one thread."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.root = Block(None, b"", 0, None)
        self._order: OrderedDict[Block, None] = OrderedDict()  # the newest last

    def __len__(self) -> int:
        return len(self._order)

    def find(self, raw: bytes, most: int) -> list[Block]:
        """The blocks that a text begins with, up to `most` tokens; from the end of the last one it can go on. `raw`:
        its tokens as int64."""
        raw = raw[: most * ID_BYTES]
        path: list[Block] = []
        block: Block | None = self.root
        while block is not None:
            at, children = block.end * ID_BYTES, block.children
            found = (children.get(raw[at : at + size]) for size in sorted(block.sizes, reverse=True))
            block = next((child for child in found if child is not None), None)
            if block is not None:
                path.append(block)
        while path and (path[-1].snapshot is None or path[-1].snapshot.recurrent is None):
            path.pop()
        self._touch(path)
        return path

    def known(self, parent: Block, tokens: Sequence[int]) -> Block | None:
        """The block of these tokens after `parent`, if a text can go on from it."""
        block = parent.children.get(np.asarray(tokens, np.int64).tobytes())
        return block if block and block.snapshot and block.snapshot.recurrent is not None else None

    def add(self, parent: Block, tokens: Sequence[int], snapshot: Snapshot) -> Block | None:
        """Keep the snapshot of `tokens` after `parent`; None where it cannot be kept."""
        key = np.asarray(tokens, np.int64).tobytes()
        block = Block(parent, key, parent.end + len(tokens), snapshot)
        if not parent.is_kept or block.bytes > self.limit:
            return None
        if (old := parent.children.get(key)) is not None:
            self.bytes += snapshot.bytes - (old.snapshot.bytes if old.snapshot else 0)
            old.snapshot = snapshot
            block = old
        else:
            parent.children[key] = block
            parent.sizes[len(key)] += 1
            self._order[block] = None
            self.bytes += block.bytes
        path = [block]
        while (above := path[0].parent) is not None and above is not self.root:
            path.insert(0, above)
        self._touch(path)
        while self.bytes > self.limit:
            self._drop()
        return block if block.is_kept else None

    def _touch(self, path: Sequence[Block]) -> None:
        for block in reversed(path):
            self._order.move_to_end(block)

    def _drop(self) -> None:
        block, _ = self._order.popitem(last=False)
        self.bytes -= block.bytes
        assert block.parent is not None and not block.children
        del block.parent.children[block.key]
        block.parent.sizes[len(block.key)] -= 1
        block.parent.sizes += Counter()  # without those that are gone
        block.is_kept, block.snapshot = False, None
