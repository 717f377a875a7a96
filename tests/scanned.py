"""Made-up scans for the tests of what `shrew scan` prints and writes."""

import hashlib
from dataclasses import dataclass
from typing import Any

from shrew.scan.alerts import Alert, Report
from shrew.scan.functions import Function, Source


@dataclass(frozen=True)
class Said:
    """What a rule says, in the fields of a Finding."""

    rule: str
    cwe: str
    severity: str
    message: str
    path: str
    start: int
    end: int
    column: int = 1
    tool: str = "shrew"


FIND = '''def find(self, name):
    """All users of that name."""
    cursor = self.connection.cursor()
    query = "SELECT * FROM users WHERE name = '" + name + "'"
    cursor.execute(query)
    return cursor.fetchall()'''
RUN = """static int run(const char *name, size_t n)
{
	char line[64];

	strcpy(line, name);
	return system(line);
}"""


def function(text: str, path: str = "app/db.py", name: str = "Users.find", start: int = 12, before: str = "",
             language: str = "python") -> Function:  # fmt: skip
    """A function that stands in a file of nothing else but `before` above it."""
    whole = before + "\n" * (start - 1 - before.count("\n")) + text + "\n"
    source = Source(path, language, whole.encode("utf-8", "surrogatepass"), whole)
    key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Function(source, name, start, start + text.count("\n"), text, key)


def alert(text: str = FIND, probability: float = 0.91, cwe: str = "CWE-89", severity: str = "high", **more: Any) -> Alert:
    told = {key: more.pop(key) for key in ("findings", "lines", "message", "fingerprint", "suppressed") if key in more}
    return Alert(function(text, **more), probability, cwe, severity, **told)


def report(*alerts: Alert, **more: Any) -> Report:
    told: dict[str, Any] = {"files": 3, "functions": 40, "skipped": [], "seconds": 1.25, "point": "balanced",
                            "alerts_per_1000": 5.0} | more  # fmt: skip
    return Report(list(alerts), **told)


def example() -> Report:
    """A scan with a bit of everything."""
    said = Said("python-sql-built", "CWE-89", "high", "A query is put together from parts of text.", "app/db.py", 15, 15, 13)
    other = Said("B608", "CWE-89", "medium", "Possible SQL injection vector.", "app/db.py", 15, 15, 13, "bandit")
    path = 'def download(request):\n    name = request.args["file"]\n    return send(open(ROOT + "/" + name).read())'
    long = "def handle(self, data):\n" + "".join(f"    step_{i} = self.stage({i}, data)\n" for i in range(60)) + \
        "    return pickle.loads(data)\n" + "".join(f"    self.done({i})\n" for i in range(30))  # fmt: skip
    scores = [-2.0 + 0.01 * i for i in range(61)] + [3.5] + [-2.0] * 30
    scores[20] = 1.0
    return report(
        alert(findings=(said, other), lines=(-2.0, -3.0, -1.0, 3.0, 2.0, -2.0)),
        alert(RUN, 0.74, "CWE-787", "high", path="native/run.c", name="run", start=120, language="c",
              lines=(-1.0, -1.0, 0.2, -1.0, 2.0, 1.5, -1.0)),
        alert(long, 0.66, "CWE-502", "medium", path="app/jobs/queue.py", name="Queue.handle", start=200, lines=tuple(scores)),
        alert(path, 0.41, "CWE-22", "medium", path="app/views.py", name="download", start=33,
              findings=(Said("python-path-joined", "CWE-22", "medium", "A path is made from a request.", "app/views.py", 35, 35),)),
        alert("def check(user):\n    return user is not None", 0.22, "", "low", path="app/views.py", name="check", start=60),
        files=48, functions=913, seconds=6.4, detector="scan (hybrid, 5.1 MB)", notes=["2 rule files were read."],
        skipped=[("data/logo.py", "binary"), ("old/latin.py", "larger than 4 MB")],
        suppressed=[alert(FIND.replace("find", "first"), suppressed="inline", start=30)],
    )  # fmt: skip
