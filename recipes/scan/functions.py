"""Ordinary functions, as JSONL: what detectors learn as harmless, or what the alert rate of a scan is counted on.

    python recipes/scan/functions.py runs/scan/corpus --every 4 --out runs/scan/ordinary.jsonl
    python recipes/scan/functions.py site-packages/peewee.py site-packages/semgrep --out runs/scan/calm.jsonl

Takes folders of source files, whose name is the package's, and corpora that recipes/scan/corpus.py made. Functions are
cut as `shrew scan` cuts them; of equal ones the first counts. `--most` keeps one large package from deciding a rate.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from shrew import files
from shrew.data import read_jsonl
from shrew.errors import DataError
from shrew.scan.config import ScanSpec
from shrew.scan.functions import Source, functions, parse
from shrew.scan.sources import Walk, decode, read
from shrew.spec import parse_bytes


def sources(place: Path) -> Iterator[tuple[str, Source]]:
    """(package, file) of a corpus or of a folder."""
    if (place / "manifest.json").is_file():
        for path in sorted(place.glob("*.jsonl")):
            for _, row in read_jsonl(path):
                yield row["package"], Source(row["id"], path.stem, row["text"].encode(), row["text"])
        return
    for entry in Walk([str(place)], str(place.parent), [], False, False):
        data, language = read(entry, parse_bytes(ScanSpec().max_file_size))
        if language:
            try:
                text, _ = decode(data)
            except DataError as error:
                print(f"{entry.shown}: {error}")
                continue
            yield place.stem, Source(entry.shown, language, text.encode(), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--every", type=int, default=1, help="of so many functions one is taken, by their hash")
    parser.add_argument("--most", type=int, help="of a package and language, by their hash; no limit if not given")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    rows: dict[tuple[str, str], list[tuple[str, str]]] = {}  # package, language -> hash, line
    for place in args.places:
        for package, source in sources(place):
            try:
                found = functions(source, parse(source))
            except DataError as error:
                print(f"{source.path}: {error}")
                continue
            for item in found:
                if item.key not in seen and int(item.key[:8], 16) % args.every == 0:
                    line = json.dumps({"id": f"{source.path}:{item.start}", "text": item.text,
                                       "language": source.language, "project": package})  # fmt: skip
                    rows.setdefault((package, source.language), []).append((item.key, line))
                seen.add(item.key)
    for (_, language), found in rows.items():
        if args.most is not None and len(found) > args.most:
            found[:] = sorted(found)[: args.most]
        counts[language] += len(found)
    files.write_text(args.out, "".join(f"{line}\n" for found in rows.values() for _, line in found))
    print(f"{counts.total():,} functions: {', '.join(f'{count:,} {name}' for name, count in counts.most_common())}")


if __name__ == "__main__":
    main()
