"""`shrew serve PACK...`: packed models behind an API that OpenAI's clients speak."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from shrew import spec
from shrew.errors import UsageError
from shrew.runtime import Engine, load, manifest
from shrew.runtime.server import wire
from shrew.runtime.server.app import application
from shrew.runtime.server.state import Options, Served, State, check

__all__ = ["Options", "Served", "State", "application", "main"]


def main(argv: list[str]) -> int:
    parser = spec.Parser(prog="shrew serve", description="Serve packed models over HTTP, as OpenAI does.")
    parser.add_argument("packs", nargs="+", metavar="PACK", type=Path,
                        help="packed folders; a model folder or 'starter' is packed first")  # fmt: skip
    spec.add_flags(parser, Options)
    args = parser.parse_args(argv)
    options = spec.from_flags(Options, args)
    if not options.key and (key := os.environ.get("SHREW_KEY", "")):
        options = replace(options, key=key)
    check(options)
    serve(args.packs, options)
    return 0


def serve(packs: Sequence[Path], options: Options) -> None:
    """Serve until told to stop; returns when what ran has finished or `grace` is over."""
    with ExitStack() as stack:
        listening = stack.enter_context(wire.listen(options))  # first: a port in use is known before models are read
        draft = load(options.draft) if options.draft not in (None, "lookup") else options.draft
        models: dict[str, Served] = {}
        for pack in packs:
            model = load(pack, threads=options.threads or None)
            name = model.manifest.name
            if model.manifest.kind != "causal":
                raise UsageError(f"{pack} is a classifier, which writes no text; give a model that does.")
            if name in models:
                raise UsageError(f"Two of the models are called '{name}'; change the name in {manifest.NAME} of one.")
            # The queue that counts is the gate's; this one also holds, for a moment, those that were cancelled
            queue = 4 * options.slots + options.queue
            engine = stack.enter_context(Engine(model, slots=options.slots, draft=draft, queue=queue))
            models[name] = Served(name, model, engine, options)
        state = State(options, models)
        stack.callback(state.close)
        _say(state, listening.getsockname())
        wire.server(application(state), state).run(sockets=[listening])


def _say(state: State, address: Any) -> None:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    print(f"Serving {', '.join(state.models)} at http://{host}:{address[1]}/v1; Ctrl-C stops.", flush=True)
    if not state.options.key and not state.options.is_local:
        print(f"shrew: anyone who can reach {state.options.host} may use this server; --key SECRET changes that.",
              file=sys.stderr, flush=True)  # fmt: skip
