"""What running a packed model takes: bytes installed, seconds to the first token, peak memory.

    python benchmarks/light.py PACK --records results/records.jsonl

A fresh virtual environment gets Shrew with what its base install needs and no more. Then `shrew complete PACK` is
started again and again, and what counts is the time from the start of the process to the first byte of its answer.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from shrew import record
from shrew.record import Record

ROOT = Path(__file__).parents[1]
PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"""


def installed(place: Path) -> tuple[Counter[str], list[str]]:
    """Bytes of the environment's packages without pip's own, by what they are, and the packages' names."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    pip = [python, "-m", "pip"]
    subprocess.run([*pip, "install", "-q", "-c", ROOT / "constraints.txt", ROOT], check=True)
    listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, stdout=subprocess.PIPE, text=True)
    names = [line.split("==")[0] for line in listed.stdout.split() if not line.startswith(("pip=", "setuptools="))]
    (packages,) = place.glob("lib/python*/site-packages")
    files = [path for path in packages.rglob("*") if path.is_file() and not path.is_symlink()]
    sizes = Counter[str]()
    for path in files:
        top = path.relative_to(packages).parts[0]
        if top.startswith(("pip", "setuptools", "pkg_resources", "_distutils_hack")):
            continue
        kind = "shrew and its models" if top.startswith("shrew") else "dependencies"
        sizes["bytecode written by pip" if path.suffix == ".pyc" else kind] += path.stat().st_size
    return sizes, names


def first_token(command: list[str]) -> float:
    """Seconds from the start of the process to the first byte of its answer."""
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as child:
        assert child.stdout is not None
        if not child.stdout.read(1):
            raise SystemExit(f"{' '.join(command)} gave nothing.")
        spent = time.perf_counter() - begun
        child.stdout.read()
    return spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        sizes, names = installed(Path(folder, "venv"))
        shrew = str(Path(folder, "venv", "bin", "shrew"))
        command = [shrew, "complete", str(args.pack), "def main():", "--max-tokens", "8"]
        times = sorted([first_token(command) for _ in range(args.runs + 1)][1:])  # the first one compiles and caches
        done = subprocess.run([sys.executable, "-c", PEAK, *command], check=True, capture_output=True, text=True)
    facts = [
        Record(run="light", model="base install", metric="bytes", value=sizes.total(), unit="bytes",
               detail={"packages": names, "bytes": sizes}),
        Record(run="light", model=args.pack.name, metric="first_token_seconds", value=statistics.median(times),
               unit="s", n=len(times), low=times[0], high=times[-1], detail={"interval": "least and most"}),
        Record(run="light", model=args.pack.name, metric="peak_memory", value=int(done.stdout), unit="bytes"),
    ]  # fmt: skip
    for one in facts:
        print(f"{one.model:20} {one.metric:22} {one.value:>14,.4g} {one.unit}")
    if args.records:
        record.append(args.records, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
