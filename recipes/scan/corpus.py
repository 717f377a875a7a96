"""Make the corpus that the detectors are pretrained on; docs/scan-training.md says from what.

    python recipes/scan/corpus.py --sources runs/scan/sources --exclude pairs.jsonl --out runs/scan/corpus
"""

import argparse
from pathlib import Path

from shrew.data import code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, help="folder of .tar.gz and .tgz archives, from pip and npm")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="JSONL files of evaluated pairs")
    parser.add_argument("--no-installed", action="store_true", help="leave the packages of this interpreter out")
    parser.add_argument("--megabytes", type=float, default=60.0, help="at most so much text")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    archives = [path for path in args.sources.iterdir() if path.suffix in {".gz", ".tgz"}] if args.sources else []
    evaluated = code.Evaluated(args.exclude)
    rows, manifest = code.build(archives, evaluated, int(args.megabytes * 1e6), not args.no_installed)
    code.write(args.out, rows, manifest)
    print(f"{len(manifest.packages)} packages; {manifest.projects} evaluated projects are left out.")
    for language, entry in manifest.languages.items():
        print(f"{language}: {entry['files']} files, {entry['bytes'] / 1e6:.1f} MB")
    for reason, count in manifest.excluded.items():
        print(f"left out: {count} ({reason})")


if __name__ == "__main__":
    main()
