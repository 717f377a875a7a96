"""From what a client sent to what an engine takes: prompts as token ids, sampling settings, room in the context."""

from collections.abc import Sequence
from typing import Any

from shrew.errors import ShrewError
from shrew.runtime.request import Token
from shrew.runtime.server.faults import Fault
from shrew.runtime.server.schema import Sampling
from shrew.runtime.server.state import Options, Served

# prefix, suffix, middle as tokenizers spell them
MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it
TEMPERATURE = 1.0


def check_causal(served: Served) -> None:
    if served.manifest.kind != "causal":
        raise Fault(400, f"'{served.name}' is a classifier: it writes no text.", "model")


def encode(served: Served, text: str, special: bool = True) -> list[int]:
    """Token ids; raises Fault for text that no tokenizer takes."""
    try:
        found: list[int] = served.tokenizer.encode(text, add_special_tokens=special).ids
    except ShrewError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise Fault(400, f"The text cannot be tokenized: {error}.") from None
    return found


def check_ids(served: Served, ids: Sequence[int], where: str) -> None:
    """Refuse token ids that the model does not have."""
    if ids and max(ids) >= served.manifest.vocabulary:
        raise Fault(400, f"{where} has a token id above {served.manifest.vocabulary - 1}, the last of '{served.name}'.",
                    where)  # fmt: skip


def prompts(served: Served, given: Any, where: str, most: int) -> list[str | list[int]]:
    """The prompts of one request: texts as they are, or token ids that the model has."""
    if given is None:
        given = ""
    if isinstance(given, str):
        return [given]
    if all(isinstance(item, int) for item in given):
        given = [given]
    if any(isinstance(item, int) for item in given):
        raise Fault(400, f"{where} mixes token ids with texts or lists; send one or the other.", where)
    if len(given) > most:
        raise Fault(400, f"{where} has {len(given)} entries, more than the {most} that this server allows.", where)
    for item in given:
        if not isinstance(item, str):
            check_ids(served, item, where)
    return list(given)


def as_ids(served: Served, prompt: str | list[int]) -> list[int]:
    """The ids of a prompt; an empty one begins as texts do in training."""
    ids = encode(served, prompt) if isinstance(prompt, str) else list(prompt)
    if not ids and served.manifest.first is not None:
        ids = [served.manifest.first]
    if not ids:
        raise Fault(400, "The prompt is empty, and this model has no token to begin with; send some text.", "prompt")
    return ids


def with_suffix(served: Served, prompt: str | list[int], suffix: str) -> list[int]:
    """PREFIX prompt SUFFIX suffix MIDDLE, for models that were trained to fill in the middle."""
    if not isinstance(prompt, str):
        raise Fault(400, "suffix goes with a prompt that is text.", "suffix")
    for marks in MARKS:
        ids = [served.tokenizer.token_to_id(mark) for mark in marks]
        if None not in ids:
            begin = [] if served.manifest.bos is None else [served.manifest.bos]
            head, tail = encode(served, prompt, special=False), encode(served, suffix, special=False)
            return [*begin, ids[0], *head, ids[1], *tail, ids[2]]
    raise Fault(400, f"'{served.name}' was not made to fill in the middle; leave suffix out.", "suffix")


def room(served: Served, options: Options, prompt: int, wanted: int | None, where: str = "max_tokens") -> int:
    """How many tokens may be written after so many: what was asked, at most what the context has left.

    Raises Fault where nothing fits, or where more was asked than the server allows.
    """
    if options.max_tokens and wanted is not None and wanted > options.max_tokens:
        raise Fault(400, f"{where} is {wanted}, and this server allows {options.max_tokens}.", where)
    left = served.manifest.context - prompt
    if left < 0 or (left == 0 and wanted != 0):
        raise Fault(400, f"The prompt has {prompt} tokens; '{served.name}' holds {served.manifest.context}, its answer "
                    "included. Send less.", code="context_length_exceeded")  # fmt: skip
    return min([left, *([wanted] if wanted is not None else []), *([options.max_tokens] if options.max_tokens else [])])


def settings(served: Served, request: Sampling) -> dict[str, Any]:
    """The sampling settings of an engine's Request; raises Fault for a token that the model does not have."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise Fault(400, f"logit_bias: '{key[:20]}' is no token id.", "logit_bias")
        bias[int(key)] = value
    check_ids(served, list(bias), "logit_bias")
    found = {
        "temperature": TEMPERATURE if request.temperature is None else request.temperature,
        "top_p": request.top_p,
        "top_k": None if request.top_k is None else max(0, request.top_k),
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "ignore_eos": request.ignore_eos,
    }
    return {"stop": tuple(stop), "logit_bias": bias, **{key: item for key, item in found.items() if item is not None}}


def choices(seed: int | None, count: int) -> list[int | None]:
    """A seed for each choice: the first has the one that was given."""
    return [None if seed is None else (seed + number) % 2**64 for number in range(count)]


def alternatives(served: Served, token: Token) -> list[tuple[str, float]]:
    """The texts of a token's alternatives with their log-probabilities, the token itself among them."""
    found = [(served.text_of(number), value) for number, value in token.top]
    if token.logprob is not None and token.id not in {number for number, _ in token.top}:
        found.append((served.text_of(token.id), token.logprob))
    return found
