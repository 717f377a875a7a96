"""The weaknesses that the scanner names: CWE ids, the families they form, and what to do about each.

A family is what an alert's rule id is made of (`shrew/sql-injection`): it groups ids that call for the same repair and
that nobody tells apart reliably. The first row of a family gives the family its title, its severity and its help. Ids
and names are those of MITRE's list (https://cwe.mitre.org), names shortened; the help is ours. The severity is a number
as of CVSS, 0.1 to 10: what such a weakness typically costs where it can be reached, not what this one does.
"""

import re
from dataclasses import dataclass

UNKNOWN = "unknown"
SEVERITIES = ("low", "medium", "high")  # from the mildest to the worst


@dataclass(frozen=True, slots=True)
class Weakness:
    number: int  # 89; 0 for the unknown one
    name: str
    family: str  # "sql-injection"
    score: float  # 0.1 to 10
    help: str  # one sentence: what to do

    @property
    def id(self) -> str:
        return f"CWE-{self.number}" if self.number else ""

    @property
    def severity(self) -> str:
        return SEVERITIES[(self.score >= 4) + (self.score >= 7)]


_ROWS: list[tuple[int, str, str, float, str]] = [
    (89, "SQL injection", "sql-injection", 8.8,
     "Pass values as parameters of the query; take names of tables and columns from a fixed list."),
    (943, "Injection into a data query", "sql-injection", 8.0,
     "Build queries from typed values, never from text or objects as they came in."),
    (78, "OS command injection", "command-injection", 9.3,
     "Run programs with a list of arguments and no shell; check what may become an option."),
    (77, "Command injection", "command-injection", 9.0,
     "Keep commands and data apart; allow known words only."),
    (88, "Argument injection", "command-injection", 8.0,
     "Put -- before values, and refuse values that begin with a dash."),
    (94, "Code injection", "code-injection", 9.1,
     "Never run text from outside as code; look the action up in a table."),
    (95, "Code injection through eval", "code-injection", 9.1,
     "Replace eval and exec by a parser of the values that you expect."),
    (1336, "Template injection", "code-injection", 8.5,
     "Keep templates in files of your own; pass what comes from outside as values."),
    (470, "Class or code chosen from outside", "code-injection", 7.5,
     "Look the name up in a table of what is allowed."),
    (79, "Cross-site scripting", "cross-site-scripting", 6.1,
     "Escape for the place where the value stands; leave the template's own escaping on."),
    (80, "HTML tags not neutralized", "cross-site-scripting", 6.1,
     "Escape <, >, & and quotes in everything that enters a page."),
    (116, "Output not encoded", "cross-site-scripting", 5.8,
     "Encode for the format that the text becomes part of, with that format's own function."),
    (22, "Path traversal", "path-traversal", 7.5,
     "Resolve the path, then check that it is still inside the folder that you mean."),
    (23, "Relative path traversal", "path-traversal", 7.5,
     "Refuse .. after decoding, and check the resolved path."),
    (36, "Absolute path traversal", "path-traversal", 7.5,
     "Refuse absolute paths; joining a folder with one forgets the folder."),
    (73, "File name controlled from outside", "path-traversal", 7.2,
     "Map what was asked for to a name of your own."),
    (59, "Link followed", "path-traversal", 6.5,
     "Open without following links, and work on the opened file."),
    (434, "Dangerous file upload", "file-upload", 8.8,
     "Allow known types by content, choose the name yourself, and store where nothing is run."),
    (502, "Unsafe deserialization", "deserialization", 8.8,
     "Read a format that holds data alone (JSON), or sign what you wrote and check the signature first."),
    (915, "Attributes set from outside", "object-properties", 7.3,
     "Copy the fields that may be set, by name."),
    (1321, "Prototype pollution", "object-properties", 7.3,
     "Refuse the keys __proto__, constructor and prototype, or use a Map."),
    (611, "XML external entities", "xml-entities", 7.5,
     "Turn off document types and external entities in the parser."),
    (776, "XML entity expansion", "xml-entities", 6.5,
     "Turn off document types, or limit how far entities expand."),
    (91, "XML injection", "xml-entities", 6.3,
     "Build XML with a library, not from pieces of text."),
    (643, "XPath injection", "xpath-injection", 7.4,
     "Pass values as variables of the expression."),
    (90, "LDAP injection", "ldap-injection", 7.5,
     "Escape values with the library's filter and name functions."),
    (918, "Server-side request forgery", "request-forgery", 8.1,
     "Take hosts from a fixed list, and check the address after it was resolved and after each redirect."),
    (601, "Open redirect", "open-redirect", 5.4,
     "Redirect to paths of your own, or to hosts from a fixed list."),
    (352, "Cross-site request forgery", "cross-site-request", 6.8,
     "Ask for a token in every request that changes something, and set SameSite on cookies."),
    (93, "Line breaks injected", "crlf-injection", 6.1,
     "Refuse carriage returns and newlines in text that a line-based format is made of."),
    (113, "Header injection", "crlf-injection", 6.1,
     "Refuse carriage returns and newlines in everything that becomes a header."),
    (117, "Log injection", "crlf-injection", 4.3,
     "Replace line breaks in what is logged."),
    (287, "Improper authentication", "authentication", 8.6,
     "Check who asks before anything is done, in one place that every route passes."),
    (306, "Authentication missing", "authentication", 8.9,
     "Ask for authentication for every action that is not meant for everybody."),
    (345, "Authenticity not checked", "authentication", 7.2,
     "Check the signature before the content is used, and refuse unsigned content."),
    (347, "Signature not checked", "authentication", 7.5,
     "Verify with a fixed algorithm and key, and stop on failure."),
    (384, "Identifier of a login kept", "authentication", 7.0,
     "Give a new identifier at every login."),
    (862, "Authorization missing", "authorization", 7.7,
     "Check that this user may do this to this object, on the server."),
    (863, "Authorization wrong", "authorization", 7.5,
     "Check rights on the object itself, after it was loaded."),
    (639, "Key of an object chosen from outside", "authorization", 7.1,
     "Ask for the object together with its owner."),
    (269, "Privileges handled wrongly", "authorization", 7.8,
     "Drop privileges before input is read, and check that it worked."),
    (264, "Permissions and access control", "authorization", 7.0,
     "Check rights before the action, and deny unless allowed."),
    (284, "Access control wrong", "authorization", 7.0,
     "Deny unless allowed, and check in one place."),
    (276, "Default permissions too wide", "permissions", 6.2,
     "Create files for their owner alone, and widen on purpose."),
    (732, "Permissions too wide", "permissions", 6.5,
     "Give the narrowest mode that works; never write for everybody."),
    (377, "Insecure temporary file", "temporary-file", 5.5,
     "Use mkstemp, NamedTemporaryFile or mkdtemp, which create and open in one step."),
    (379, "Temporary file in an open folder", "temporary-file", 5.0,
     "Make a folder of your own with mkdtemp first."),
    (798, "Password or key in the code", "hard-coded-secret", 7.8,
     "Read it from the environment or a secret store, and change the one that was in the code."),
    (259, "Password in the code", "hard-coded-secret", 7.5,
     "Read it from the environment or a secret store."),
    (321, "Key in the code", "hard-coded-secret", 7.5,
     "Make keys where they are used, and keep them in a key store."),
    (522, "Credentials poorly protected", "hard-coded-secret", 6.8,
     "Keep credentials out of addresses, logs and plain files."),
    (295, "Certificate not checked", "transport-security", 7.4,
     "Leave certificate and host name checks on; add your own authority where it is needed."),
    (319, "Sent in the clear", "transport-security", 6.5,
     "Use TLS."),
    (327, "Broken or risky cryptography", "weak-cryptography", 6.5,
     "Use AES-GCM or ChaCha20-Poly1305, and SHA-256 or newer."),
    (326, "Key too short", "weak-cryptography", 6.2,
     "Use at least 2,048 bits for RSA, 256 for curves, 128 for symmetric keys."),
    (328, "Weak hash", "weak-cryptography", 5.9,
     "Use SHA-256 or newer."),
    (916, "Password hash too cheap", "weak-cryptography", 6.4,
     "Use argon2, scrypt or bcrypt with a salt."),
    (330, "Randomness too weak", "weak-randomness", 6.0,
     "Use the secrets module or the system's generator for everything that must not be guessed."),
    (338, "Predictable random generator", "weak-randomness", 6.0,
     "Use the system's generator."),
    (200, "Information exposed", "information-exposure", 5.3,
     "Send what is needed and no more; clear buffers before they leave."),
    (209, "Error message tells too much", "information-exposure", 4.8,
     "Log the details, and send a short message."),
    (532, "Secrets in the log", "information-exposure", 5.0,
     "Leave secrets out of what is logged."),
    (20, "Input not checked", "input-validation", 6.3,
     "Check type, length, range and form where the value comes in."),
    (400, "Resources without limit", "resource-exhaustion", 6.5,
     "Set limits: size, time, depth, number."),
    (1333, "Regular expression that takes exponential time", "resource-exhaustion", 5.6,
     "Remove nested repetition, or limit the length before matching."),
    (770, "Allocation without limit", "resource-exhaustion", 6.5,
     "Bound what one request may allocate."),
    (674, "Recursion without limit", "resource-exhaustion", 5.5,
     "Count the depth and stop."),
    (835, "Loop without end", "resource-exhaustion", 5.5,
     "Make sure that every turn consumes something."),
    (787, "Out-of-bounds write", "memory-bounds", 8.8,
     "Check the length of the target before every write, with the terminator counted."),
    (119, "Memory access out of bounds", "memory-bounds", 8.2,
     "Check index and length against the buffer's own size."),
    (120, "Copy without checking the size", "memory-bounds", 8.4,
     "Use functions that take the size of the target, and check what was cut off."),
    (121, "Stack buffer overflow", "memory-bounds", 8.4,
     "Check lengths against the array on the stack."),
    (122, "Heap buffer overflow", "memory-bounds", 8.4,
     "Allocate from the same length that is written."),
    (125, "Out-of-bounds read", "memory-bounds", 7.1,
     "Check that enough bytes are left before each read."),
    (676, "Dangerous function", "memory-bounds", 6.0,
     "Use the bounded counterpart: snprintf, fgets, strlcpy."),
    (416, "Use after free", "memory-lifetime", 8.1,
     "Say who owns the object, and set the pointer to null when it is freed."),
    (415, "Double free", "memory-lifetime", 7.8,
     "Free in one place, and set the pointer to null."),
    (401, "Memory leak", "memory-leak", 5.0,
     "Release on every way out, the failing ones too."),
    (772, "Resource not released", "memory-leak", 5.0,
     "Release on every way out."),
    (476, "Null pointer dereference", "null-pointer", 5.9,
     "Check what may be null before it is used."),
    (908, "Use of uninitialized memory", "uninitialized", 6.0,
     "Initialize where it is declared."),
    (190, "Integer overflow", "integer-overflow", 7.4,
     "Check before the sum or product, in a wider type, and before it becomes a size."),
    (191, "Integer underflow", "integer-overflow", 7.0,
     "Compare before subtracting from what is unsigned."),
    (681, "Wrong conversion between numbers", "integer-overflow", 6.3,
     "Check the range before a narrower or signed type takes the value."),
    (369, "Division by zero", "integer-overflow", 5.0,
     "Check the divisor."),
    (134, "Format string from outside", "format-string", 8.2,
     "Give a constant format, and the text as its argument."),
    (362, "Race condition", "race-condition", 6.6,
     "Hold one lock across the check and the use."),
    (367, "Checked, then used", "race-condition", 6.4,
     "Open first, then check what was opened."),
    (667, "Locking wrong", "race-condition", 5.8,
     "Take locks in one order, and release them on every way out."),
    (703, "Failure not handled", "unhandled-error", 4.5,
     "Check what a call returns, and act on failure."),
    (617, "Assertion that can be reached", "unhandled-error", 5.0,
     "Report the failure as an error that the caller handles."),
    (0, "Suspicious code", UNKNOWN, 5.0,
     "Ask where its values come from, and what checks them."),
]  # fmt: skip

# Ids that other tools report and that ask for the same repair as one in the table.
KIN = {
    564: 89, 184: 20, 83: 79, 87: 79, 98: 73, 99: 73, 624: 94, 917: 94, 96: 94, 1188: 276, 250: 269, 285: 863,
    613: 384, 312: 522, 256: 522, 257: 522, 313: 522, 297: 295, 310: 327, 759: 916, 760: 916, 335: 338, 337: 338,
    340: 330, 329: 327, 497: 209, 201: 200, 203: 200, 215: 200, 489: 200, 404: 772, 775: 772, 405: 400, 407: 400,
    409: 400, 834: 835, 126: 125, 127: 125, 124: 787, 788: 787, 786: 119, 823: 119, 129: 119, 131: 787, 193: 787,
    170: 120, 242: 676, 825: 416, 672: 416, 763: 415, 590: 415, 690: 476, 252: 703, 253: 703, 390: 703, 391: 703,
    754: 703, 755: 703, 457: 908, 665: 908, 824: 908, 192: 190, 194: 681, 195: 681, 196: 681, 197: 681, 682: 190,
    680: 190, 366: 362, 364: 362, 833: 667, 378: 377, 444: 113, 1004: 522, 614: 319, 311: 319, 494: 345, 829: 345,
    353: 345, 1236: 116, 425: 862, 566: 639, 538: 200, 548: 200, 552: 732,
}  # fmt: skip

TABLE = {row[0]: Weakness(*row) for row in _ROWS}
FAMILIES: dict[str, tuple[Weakness, ...]] = {}
for _row in TABLE.values():
    FAMILIES[_row.family] = (*FAMILIES.get(_row.family, ()), _row)


def normal(cwe: str | int) -> str:
    """'cwe-089', 'CWE-89: SQL Injection', 'external/cwe/cwe-089' and 89 as 'CWE-89'; '' for what names no CWE."""
    text = str(cwe).strip()
    named = re.search(r"cwe[-_ :]*0*([1-9]\d{0,5})(?!\d)", text, re.I | re.A)
    match = named or re.fullmatch(r"0*([1-9]\d{0,5})", text, re.A)
    return f"CWE-{match[1]}" if match else ""


def weakness(cwe: str | int) -> Weakness:
    """The row of an id, in any spelling; that of its nearest kin, or of the unknown, where it has none of its own."""
    number = int(normal(cwe)[4:] or 0)
    return TABLE.get(KIN.get(number, number), TABLE[0])


def family(cwe: str | int) -> str:
    """'CWE-564' is 'sql-injection'; what is not in the table is 'unknown'."""
    return weakness(cwe).family
