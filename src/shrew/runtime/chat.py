"""`shrew chat PACK`: a conversation in the terminal, or over a pipe: a message a line in, an answer out."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shrew import files, spec
from shrew.errors import ShrewError, UsageError
from shrew.runtime import template
from shrew.runtime.complete import Sampling, Screen, add_common, encode, pieces, usage
from shrew.runtime.engine import Engine
from shrew.runtime.pack import load
from shrew.runtime.request import Piece
from shrew.runtime.template import ChatTemplate

HELP = """\
/help         these lines
/reset        forget the conversation, keep the system message
/system TEXT  set the system message (empty: none) and begin anew
/save FILE    write the conversation, a JSON message a line
/quit         leave (or Ctrl-D); Ctrl-C stops an answer, a second one leaves"""
SHARE = 4  # one part in so many of the context is kept for the answer, where max_tokens is larger


@dataclass
class Conversation:
    """The messages so far, and the model that answers them."""

    engine: Engine
    template: ChatTemplate
    sampling: Sampling
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def all(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.messages

    def answer(self, text: str, show: Callable[[str], None], forgot: Callable[[int], None]) -> Piece:
        """Add the user's message and the answer to it, shown as it comes; returns the last piece.

        The oldest messages are forgotten where all of them do not fit; `forgot` is told how many.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt, dropped = self._prompt()
            if dropped:
                forgot(dropped)
            said: list[str] = []
            last = None
            for last in pieces(self.engine, self.sampling.request(prompt, stop=self.template.stop)):
                piece = last.text if said else last.text.lstrip() if self.template.plain else last.text
                if piece:
                    said.append(piece)
                    show(piece)
        except BaseException:
            self.messages.pop()
            raise
        assert last is not None
        self.messages.append({"role": "assistant", "content": "".join(said)})
        return last

    def _prompt(self) -> tuple[list[int], int]:
        """The tokens of what fits, and how many messages did not."""
        room = self.engine.context - min(self.sampling.max_tokens, self.engine.context // SHARE)
        dropped = 0
        while True:
            tokens = encode(self.engine.model, self.template.render(self.all()), special=self.template.plain)
            if len(tokens) <= room or len(self.messages) < 3:
                return tokens, dropped
            del self.messages[:2]
            dropped += 2


def main(argv: list[str]) -> int:
    parser = spec.Parser("shrew chat", description="Talk with a model.")
    parser.add_argument("model", metavar="MODEL", help="a packed folder; a model folder or 'starter' is packed first")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--json", action="store_true", help="print each answer as a JSON object on a line")
    add_common(parser)
    spec.add_flags(parser, Sampling)
    args = parser.parse_args(argv)
    sampling = spec.from_flags(Sampling, args)
    model = load(args.model, args.threads, verify=args.verify)
    templates = template.of_folder(Path(args.model), model.manifest.files)
    if templates.plain:
        print(f"shrew: {template.PLAIN_NOTE}.", file=sys.stderr)
    with Engine(model, slots=1) as engine:
        talk = Conversation(engine, templates, sampling, args.system)
        if sys.stdin.isatty() and sys.stdout.isatty() and not args.json:
            return _terminal(talk, model.manifest.name)
        return _piped(talk, args.json)


def _piped(talk: Conversation, as_json: bool) -> int:
    """A message a line; the answers one after the other."""
    screen = Screen()

    def forgot(count: int) -> None:
        print(f"shrew: the {count} oldest messages no longer fit and were forgotten.", file=sys.stderr)

    for line in sys.stdin.buffer:
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is no UTF-8 (byte {error.start} of a line); convert it first.") from None
        if not text.strip():
            continue
        if text.startswith("/"):
            if not _command(talk, text, lambda words: print(words, file=sys.stderr)):
                break
            continue
        if not as_json:
            talk.answer(text, screen.write, forgot)
            screen.write("\n")
            continue
        last = talk.answer(text, lambda piece: None, forgot)
        said = {**talk.messages[-1], "finish": last.finish, "usage": usage(last)}
        print(json.dumps(said, ensure_ascii=False), flush=True)
    return 0


def _terminal(talk: Conversation, name: str) -> int:
    """Ask and answer until the user leaves."""
    import readline  # noqa: F401  (gives input() a history and editing)

    from rich.console import Console

    console, screen = Console(highlight=False), Screen()

    def say(words: str) -> None:
        console.print(words, style="dim", markup=False)

    say(f"{name}: {talk.engine.context:,} tokens of context. /help shows the commands.")
    while True:
        try:
            text = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not text.strip():
            continue
        try:
            if text.startswith("/"):
                if not _command(talk, text, say):
                    return 0
                continue
            begun = time.monotonic()
            last = talk.answer(text, screen.write,
                               lambda count: say(f"the {count} oldest messages no longer fit and were forgotten"))
            screen.write("\n")
            if last.usage:
                speed = last.usage.completion_tokens / max(time.monotonic() - begun, 1e-9)
                how = {"length": ", as many as allowed", "cancelled": ", stopped"}.get(str(last.finish), "")
                say(f"{last.usage.completion_tokens} tokens{how}, {speed:.0f} a second")
        except KeyboardInterrupt:
            print()
            return 0
        except ShrewError as error:  # one message that cannot be answered is no reason to end
            say(f"shrew: {error}")


def _command(talk: Conversation, text: str, say: Callable[[str], None]) -> bool:
    """Do what a line that begins with '/' says; False: leave."""
    word, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    match word:
        case "/help":
            say(HELP)
        case "/quit" | "/exit":
            return False
        case "/reset":
            talk.messages.clear()
            say("the conversation begins anew")
        case "/system":
            talk.system = rest
            talk.messages.clear()
            say(f"the system message is {rest!r}" if rest else "there is no system message")
        case "/save" if rest:
            lines = [json.dumps(message, ensure_ascii=False) + "\n" for message in talk.all()]
            try:
                files.write_text(Path(rest).expanduser(), "".join(lines))
            except OSError as error:  # the conversation, which is not saved, goes on
                say(f"{rest} could not be written ({error.strerror})")
            else:
                say(f"wrote {rest}")
        case "/save":
            say("give a file: /save FILE")
        case _:
            say(f"there is no {word}; /help shows what there is")
    return True
