"""Schemathesis against `shrew serve`: thousands of requests made from /openapi.json, sound and broken.

    python benchmarks/server_fuzz.py starter --venv FOLDER --records results/records.jsonl

Schemathesis is installed once into a virtual environment at FOLDER. Answers are counted by the server itself, from its
/metrics. Exit code 1 when any was a 5xx, or when an answer was not what the description says.
"""

import argparse
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from serving import Server

from shrew import record
from shrew.record import Record

VERSION = "4.32.5"
# Not "positive_data_acceptance": no schema can say that a prompt must fit in the context or a regular expression parse.
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
          "response_headers_conformance", "negative_data_rejection", "unsupported_method",
          "allow_header_conformance", "ignored_auth")  # fmt: skip
FLAGS = ("--max-tokens", "32", "--max-choices", "4", "--key", "secret")  # so that a request takes milliseconds


def program(venv: Path) -> Path:
    found = venv / "bin" / "schemathesis"
    if not found.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", f"schemathesis=={VERSION}"], check=True)
    return found


def counts(metrics: str) -> Counter[tuple[str, str]]:
    """Answers by (path, status)."""
    line = re.compile(r'shrew_requests_total\{path="(.*)",status="(\d+)"\} (\d+)')
    return Counter({(found[1], found[2]): int(found[3]) for found in map(line.match, metrics.splitlines()) if found})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what `shrew serve` takes")
    parser.add_argument("--venv", type=Path, required=True, help="virtual environment of schemathesis")
    parser.add_argument("--examples", type=int, default=500, help="for each path")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, help="JSONL file that the records are added to")
    args = parser.parse_args()
    tool = program(args.venv)
    with Server(args.model, *FLAGS) as server:
        command = [str(tool), "run", f"{server.url}/openapi.json", "--checks", ",".join(CHECKS), "--seed",
                   str(args.seed), "--max-examples", str(args.examples), "--header", "Authorization: Bearer secret",
                   "--continue-on-failure", "--no-shrink", "--request-timeout", "60", "--phases",
                   "examples,coverage,fuzzing"]  # fmt: skip
        failed = subprocess.run(command, check=False).returncode
        found = counts(server.get("/metrics", "secret").decode())
        code = server.end(signal.SIGTERM)
    statuses: Counter[str] = Counter()
    for (_, status), count in found.items():
        statuses[status] += count
    table = Table("path", *sorted(statuses))
    for path in sorted({path for path, _ in found}):
        table.add_row(path, *(str(found[path, status] or "") for status in sorted(statuses)))
    Console().print(table)
    if args.records:
        total = sum(statuses.values())
        detail = {"statuses": dict(statuses), "checks": list(CHECKS), "examples": args.examples}
        server_errors = sum(count for status, count in statuses.items() if status >= "500")
        record.append(args.records, [Record(run="server-fuzz", model=server.name, metric="server_errors", n=total,
                                            value=server_errors, seed=args.seed, detail=detail,
                                            task=f"schemathesis {VERSION}")])  # fmt: skip
    bad = [status for status in statuses if status >= "500"]
    print(f"{sum(statuses.values())} answers; {'5xx: ' + ', '.join(bad) if bad else 'nothing but 2xx and 4xx'}")
    return 1 if bad or failed or code else 0


if __name__ == "__main__":
    sys.exit(main())
