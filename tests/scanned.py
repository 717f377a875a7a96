"""Made-up scans, honest and hostile, for the tests of what `shrew scan` prints and writes."""

import hashlib
from typing import Any

from hypothesis import strategies as st

from shrew.scan.alerts import Alert, Report
from shrew.scan.cwe import SEVERITIES
from shrew.scan.functions import Function, Source
from shrew.scan.rules import Finding

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


def alert(
    text: str = FIND, probability: float = 0.91, cwe: str = "CWE-89", severity: str = "high", **more: Any
) -> Alert:
    told = {key: more.pop(key) for key in ("findings", "lines", "message", "fingerprint", "suppressed") if key in more}
    return Alert(function(text, **more), probability, cwe, severity, **told)


def report(*alerts: Alert, **more: Any) -> Report:
    told: dict[str, Any] = {"files": 3, "functions": 40, "skipped": [], "seconds": 1.25, "point": "balanced",
                            "alerts_per_1000": 5.0} | more  # fmt: skip
    return Report(list(alerts), **told)


def example() -> Report:
    """A scan with a bit of everything."""
    built = "A query is put together from parts of text."
    said = Finding("python-sql-built", "CWE-89", "high", built, "app/db.py", 15, 15, 13)
    other = Finding("B608", "CWE-89", "medium", "Possible SQL injection vector.", "app/db.py", 15, 15, 13, "bandit")
    joined = Finding("python-path-joined", "CWE-22", "medium", "A path is made from a request.", "app/views.py", 35, 35)
    path = 'def download(request):\n    name = request.args["file"]\n    return send(open(ROOT + "/" + name).read())'
    long = "def handle(self, data):\n" + "".join(f"    step_{i} = self.stage({i}, data)\n" for i in range(60)) + \
        "    return pickle.loads(data)\n" + "".join(f"    self.done({i})\n" for i in range(30))  # fmt: skip
    scores = [-2.0 + 0.01 * i for i in range(61)] + [3.5] + [-2.0] * 30
    scores[20] = 1.0
    return report(
        alert(findings=(said, other), lines=(-2.0, -3.0, -1.0, 3.0, 2.0, -2.0)),
        alert(RUN, 0.74, "CWE-787", "high", path="native/run.c", name="run", start=120, language="c",
              lines=(-1.0, -1.0, 0.2, -1.0, 2.0, 1.5, -1.0)),
        alert(long, 0.66, "CWE-502", "medium", path="app/jobs/queue.py", name="Queue.handle", start=200,
              lines=tuple(scores)),
        alert(path, 0.41, "CWE-22", "medium", path="app/views.py", name="download", start=33,
              findings=(joined,)),
        alert("def check(user):\n    return user is not None", 0.22, "", "low", path="app/views.py",
              name="check", start=60),
        files=48, functions=913, seconds=6.4, detector="scan (hybrid, 5.1 MB)", notes=["2 rule files were read."],
        skipped=[("data/logo.py", "binary"), ("old/latin.py", "larger than 4 MB")],
        suppressed=[alert(FIND.replace("find", "first"), suppressed="inline", start=30)],
    )  # fmt: skip


TRICKS = [
    "</style><script>x()</script>", '" onload="x', "<img src=//evil.example onerror=x>", "</code></div><b>", "<!--",
    "&lt;", "javascript:x", "[click](https://evil.example)", "{0}", "../../etc/passwd", "C:/x y", "//evil.example/x",
    "a:b", "%41", "?#", "\u05d0\u05d1 code", "\x1b[31m\u202e\ud800\x00\x9b2J\u2028", "a\r\nb",
]  # fmt: skip
HOSTILE = st.one_of(
    st.sampled_from(TRICKS),
    st.text(max_size=40),
    st.text(alphabet="<>/\"'&=! scriptonlhef:jav\x00\x1b-]\n\r\t\u202e\u2066\ud800\udcff\u2028", max_size=40),
)  # fmt: skip


@st.composite
def reports(draw: st.DrawFn) -> Report:
    """Scans of hostile code with hostile names in hostile places, with scores and rules of any kind."""
    found = []
    for _ in range(draw(st.integers(0, 4))):
        text, path, start = draw(HOSTILE), draw(HOSTILE), draw(st.integers(1, 5))
        numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)
        said = [
            Finding(draw(HOSTILE), draw(HOSTILE), "low", draw(HOSTILE), path, draw(st.integers(1, 9)), 9,
                 draw(st.integers(1, 50)), draw(HOSTILE))
            for _ in range(draw(st.integers(0, 2)))
        ]  # fmt: skip
        weakness = draw(st.one_of(HOSTILE, st.sampled_from(["CWE-89", "cwe-022"])))
        held = draw(st.sampled_from(["", "", "inline", "baseline"]))
        found.append(alert(text, draw(st.floats(0, 1)), weakness, draw(st.sampled_from(SEVERITIES)), path=path,
                           name=draw(HOSTILE), start=start, findings=tuple(said), message=draw(HOSTILE),
                           lines=tuple(draw(st.lists(numbers, max_size=6))), suppressed=held))  # fmt: skip
    return report(
        *[item for item in found if not item.suppressed],
        suppressed=[item for item in found if item.suppressed],
        skipped=draw(st.lists(st.tuples(HOSTILE, HOSTILE), max_size=2)), point=draw(HOSTILE), detector=draw(HOSTILE),
        notes=draw(st.lists(HOSTILE, max_size=2)), compared=draw(st.booleans()),
    )  # fmt: skip


def tricked(trick: str) -> Report:
    """A scan in which everything that comes from outside is one trick."""
    said = Finding(trick, trick, "high", trick, trick, 2, 2, 1, trick)
    long = "\n".join([trick] * 40)
    found = [alert(text, path=trick, name=trick, cwe=trick, message=message, findings=(said,), start=1,
                   lines=(0.0, 0.0, 4.0), suppressed=held)
             for text, message, held in ((trick, trick, ""), (long, "", ""), (trick, trick, "inline"))]  # fmt: skip
    return report(*found[:2], suppressed=found[2:], skipped=[(trick, trick)], notes=[trick], point=trick,
                  detector=trick)  # fmt: skip
