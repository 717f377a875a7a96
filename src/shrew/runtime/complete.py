"""`shrew complete PACK [PROMPT]`: a text and how it goes on, streamed to the terminal."""

import argparse
import json
import signal
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from shrew import spec
from shrew.errors import DataError, RequestError, ShrewError, UsageError
from shrew.runtime.engine import Engine
from shrew.runtime.pack import Model, load
from shrew.runtime.request import Constraint, Piece, Request, Token
from shrew.spec import Meta, doc

PROMPT_BYTES = 50_000_000
CANCELLED = 1  # the exit code of an answer that was stopped


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next tokens are chosen."""

    max_tokens: Annotated[int, Meta(ge=1, le=1 << 24)] = doc("tokens at most", 256)
    temperature: Annotated[float, Meta(ge=0, le=10)] = doc("0: always the likeliest token; higher: more varied", 0.7)
    top_p: Annotated[float, Meta(gt=0, le=1)] = doc("only the likeliest tokens that together have it", 1.0)
    top_k: Annotated[int, Meta(ge=0)] = doc("only so many of the likeliest tokens; 0: all", 0)
    min_p: Annotated[float, Meta(ge=0, le=1)] = doc("no token less likely than this part of the likeliest", 0.0)
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = doc("above 1: less of what has been there", 1.0)
    presence_penalty: Annotated[float, Meta(ge=-10, le=10)] = doc("taken from the logits of tokens that came", 0.0)
    frequency_penalty: Annotated[float, Meta(ge=-10, le=10)] = doc("the same, each time that they came", 0.0)
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = doc("the same seed gives the same text", None)
    seconds: Annotated[float, Meta(gt=0)] | None = doc("end after so many seconds", None)

    def request(self, prompt: Sequence[int], **more: Any) -> Request:
        """A request for what follows the tokens of `prompt`."""
        return Request(prompt=prompt, **asdict(self), **more)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the text must be; at most one of these."""

    schema: str | None = doc("a file with a JSON Schema: compact JSON that fits it", None)
    regex: str | None = doc("a regular expression: a text that matches all of it", None)
    grammar: str | None = doc("a file with a grammar in Lark's notation", None)

    def constraint(self, model: Model, max_tokens: int) -> Constraint | None:
        """What holds the text to its form; None if any text will do. Raises UsageError for what cannot be met."""
        given = [name for name, value in asdict(self).items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"--{given[0]} and --{given[1]} exclude each other; give one.")
        if not given:
            return None
        from shrew.runtime.constrain import Grammars  # llguidance, only where it is used

        grammars = Grammars(model.tokenizer, model.manifest.vocabulary, model.manifest.eos)
        if self.regex is not None:
            return grammars.regex(self.regex, max_tokens)
        if self.grammar is not None:
            return grammars.lark(_read(Path(self.grammar)), max_tokens)
        try:
            schema = json.loads(_read(Path(str(self.schema))))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.schema} is no JSON ({error}).") from None
        return grammars.json_schema(schema, max_tokens)


@dataclass
class Screen:
    """Where text goes. In a terminal, control characters of a model's making are left out: they could do anything."""

    is_terminal: bool = field(default_factory=lambda: sys.stdout.isatty())

    def write(self, text: str) -> None:
        sys.stdout.write(harmless(text) if self.is_terminal else text)
        sys.stdout.flush()


def harmless(text: str) -> str:
    """The text without control characters but line ends and tabs."""
    if text.isprintable():
        return text
    return "".join(each for each in text if each in "\n\t" or unicodedata.category(each) != "Cc")


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    sampling, form = spec.from_flags(Sampling, args), spec.from_flags(Form, args)
    prompt = args.prompt
    if args.stdin or (prompt is None and not sys.stdin.isatty()):
        if prompt is not None:
            raise UsageError("the prompt is given twice, as a word and with --stdin; give one.")
        prompt = read_stdin()
    if prompt is None:
        raise UsageError('there is no prompt; give one: shrew complete MODEL "Once upon a time", or --stdin.')
    model = load(args.model, args.threads, verify=args.verify)
    tokens = encode(model, prompt)
    left = min(sampling.max_tokens, max(model.manifest.context - len(tokens), 1))
    constraint = form.constraint(model, left)
    request = sampling.request(tokens, stop=tuple(args.stop), logprobs=args.logprobs, constraint=constraint)
    with Engine(model, slots=1) as engine:
        return _show(engine, request, args.json)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = spec.Parser("shrew complete", description="Let a model go on with a text.")
    parser.add_argument("model", metavar="MODEL", help="a packed folder; a model folder or 'starter' is packed first")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to go on with")
    parser.add_argument("--stdin", action="store_true", help="read the prompt from standard input")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    parser.add_argument("--logprobs", type=int, metavar="N",
                        help="one token a line, with its log-probability and N alternatives")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, an object a line as the text comes")
    add_common(parser)
    spec.add_flags(parser, Sampling)
    spec.add_flags(parser, Form)
    return parser.parse_args(argv)


def add_common(parser: argparse.ArgumentParser) -> None:
    """What concerns the model, whatever it is asked."""
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default all cores)")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True,
                        help="check the hashes of the packed files first (default yes)")  # fmt: skip


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from None


def read_stdin() -> str:
    """All of standard input, which must be UTF-8."""
    content = sys.stdin.buffer.read(PROMPT_BYTES + 1)
    if len(content) > PROMPT_BYTES:
        raise DataError(f"standard input is longer than {PROMPT_BYTES:,} bytes; give less.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is no UTF-8 (byte {error.start}); convert it first.") from None


def encode(model: Model, text: str, special: bool = True) -> list[int]:
    """Token ids; an empty text begins as texts did in training."""
    try:
        text.encode("utf-8")
        tokens: list[int] = model.tokenizer.encode(text, add_special_tokens=special).ids
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise RequestError(f"the text cannot be tokenized ({error}).") from None
    if not tokens and model.manifest.first is not None:
        return [model.manifest.first]
    return tokens


@contextmanager
def stoppable(answer: Any) -> Iterator[None]:
    """Ctrl-C ends the answer; a second one ends the program, as it does everywhere else."""
    def stop(signum: int, frame: Any) -> None:
        if answer.is_cancelled:
            raise KeyboardInterrupt
        answer.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def pieces(engine: Engine, request: Request) -> Iterator[Piece]:
    """The pieces of an answer that Ctrl-C can stop. Raises ShrewError where it failed."""
    answer = engine.submit(request)
    with stoppable(answer):
        for piece in answer:
            if piece.finish == "error":
                raise ShrewError(f"the answer ended early: {piece.error}")
            yield piece


def _show(engine: Engine, request: Request, as_json: bool) -> int:
    screen, finish = Screen(), None
    for piece in pieces(engine, request):
        finish = piece.finish
        if as_json:
            print(json.dumps(_plain(piece, request.logprobs is not None), ensure_ascii=False), flush=True)
        elif request.logprobs is not None:
            for token in piece.tokens:
                print(_line(engine, token), flush=True)
        else:
            screen.write(piece.text)
    if not as_json and request.logprobs is None:
        screen.write("\n")
    return CANCELLED if finish == "cancelled" else 0


def _plain(piece: Piece, with_tokens: bool) -> dict[str, Any]:
    """A piece as JSON, without what it does not have."""
    found: dict[str, Any] = {"text": piece.text}
    if with_tokens:
        found["tokens"] = [token._asdict() for token in piece.tokens]
    if piece.finish is not None:
        found |= {"finish": piece.finish, "usage": usage(piece)}
    return found


def usage(piece: Piece) -> dict[str, Any] | None:
    """What an answer cost, as JSON."""
    if piece.usage is None:
        return None
    found = asdict(piece.usage) | piece.usage.cost()
    return {name: value for name, value in found.items() if value is not None}


def _line(engine: Engine, token: Token) -> str:
    others = "  ".join(f"{json.dumps(engine.vocabulary.text(other), ensure_ascii=False)} {value:.3f}"
                       for other, value in token.top)  # fmt: skip
    return f"{token.logprob or 0:9.4f}  {json.dumps(token.text, ensure_ascii=False):<20}  {others}".rstrip()


