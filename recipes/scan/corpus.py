"""Make the corpus that the detectors are pretrained on, and its tokenizer; docs/scan-training.md says from what.

    python recipes/scan/corpus.py --sources runs/scan/sources --exclude pairs.jsonl --out runs/scan/corpus
"""

import argparse
from pathlib import Path

from shrew import data, files
from shrew.data import code
from shrew.data.tokenizer import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, help="folder of .tar.gz and .tgz archives, from pip and npm")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="JSONL files of evaluated pairs")
    parser.add_argument("--no-installed", action="store_true", help="leave the packages of this interpreter out")
    parser.add_argument("--megabytes", type=float, default=60.0, help="at most so much text")
    parser.add_argument("--tokens", type=int, default=4096, help="entries of the tokenizer, a folder in the corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    archives = [path for path in args.sources.iterdir() if path.suffix in {".gz", ".tgz"}] if args.sources else []
    evaluated = code.Evaluated(args.exclude)
    rows, manifest = code.build(archives, evaluated, int(args.megabytes * 1e6), not args.no_installed)
    code.write(args.out, rows, manifest)
    with files.new_folder(args.out / "tokenizer", "tokenizer.json") as temporary:
        tokenizer = train_tokenizer(data.documents([str(args.out)]), args.tokens, 0, marks=data.MARKS[0])
        tokenizer.save_pretrained(temporary)
    print(f"{len(manifest.packages)} packages; {manifest.projects} evaluated projects are left out.")
    for language, entry in manifest.languages.items():
        print(f"{language}: {entry['files']} files, {entry['bytes'] / 1e6:.1f} MB")
    for reason, count in manifest.excluded.items():
        print(f"left out: {count} ({reason})")


if __name__ == "__main__":
    main()
