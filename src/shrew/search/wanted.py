"""What the user of `shrew shrink` asks for."""

from dataclasses import dataclass
from typing import Annotated

from shrew import spec
from shrew.errors import SpecError
from shrew.search.kinds import Palette, blocks, widths
from shrew.spec import Meta, doc

ALONE = 0.98  # the floor when nothing else was asked for
LEAST = 0.05  # below it a percentage was meant


@dataclass(frozen=True, kw_only=True)
class ShrinkSpec:
    """What the user asks for; everything else is derived and printed."""

    keep: float | None = doc("share of the quality to keep; 0.98 if nothing is asked", None)
    under: str | None = doc("largest weights file, such as 16MB", None)
    faster: str | None = doc("at least so many times faster, such as 2x", None)
    memory: str | None = doc("largest peak memory of a fresh process, such as 500MB", None)
    fairness: str = doc("pairs of texts whose bias is compared before and after (JSONL or CSV)", "")
    minutes: Annotated[float, Meta(gt=0)] = doc("start no new trial after this long", 30.0)
    heal: Annotated[int, Meta(ge=0)] = doc("steps that a finalist is healed for; a quarter of it to rank cuts", 64)
    lr: Annotated[float, Meta(gt=0)] = doc("peak learning rate of healing", 5e-4)
    rows: Annotated[int, Meta(ge=1)] = doc("windows of text in a healing step", 4)
    group: Annotated[int, Meta(ge=16)] = doc("weights that share a scale", 64)
    symmetric: bool = doc("grids without zero points", True)
    coded: bool = doc(
        "code weights by their entropy, at a rate instead of bits and groups: by far the fewest bytes on disk, but "
        "only Shrew's own folder holds them, and in memory they are as large as 8 bits",
        False,
    )
    gguf: bool = doc(
        "choose among GGUF's block types for each weight instead of bits and groups, and write model.gguf beside the "
        "model: what llama.cpp runs; sizes are of that file",
        False,
    )
    candidates: Annotated[int, Meta(ge=1, le=8)] = doc("models that may be tried on the final split", 3)
    jobs: Annotated[int, Meta(ge=0)] = doc("trials at a time; 0: one a core", 0)

    def __post_init__(self) -> None:
        if self.keep is not None and not LEAST <= self.keep <= 1:
            raise SpecError(f"--keep {self.keep:g} is no share from {LEAST} to 1; write 0.98 for 98 %.")
        if self.gguf and self.coded:
            raise SpecError("--gguf and --coded exclude each other: GGUF holds no coded weights; leave one out.")

    def palette(self) -> Palette:
        """What weights may be stored as, where they are not coded."""
        return blocks() if self.gguf else widths(self.group, self.symmetric)

    def goals(self) -> dict[str, float | None]:
        """The wanted numbers. Raises SpecError for sizes and factors that are none."""
        alone = self.keep is None and not (self.under or self.faster or self.memory)
        return {
            "keep": ALONE if alone else self.keep,
            "under": spec.parse_bytes(self.under) if self.under else None,
            "faster": spec.parse_times(self.faster) if self.faster else None,
            "memory": spec.parse_bytes(self.memory) if self.memory else None,
        }
