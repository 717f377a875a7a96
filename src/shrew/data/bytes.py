"""A tokenizer whose tokens are the bytes: byte b is id b, and 256 is the token that begins and ends a document."""

from typing import Any

END, COUNT = 256, 257
PROBE = "Aé\n\t~"


def byte_tokenizer(marks: tuple[str, ...] = ()) -> Any:
    """256 bytes, one token that begins and ends documents, and then the `marks`: nothing is merged."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    core = Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(_letters())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (end, *marks)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, pad_token=end,
                                   extra_special_tokens=list(marks))  # fmt: skip


def reads_bytes(tokenizer: Any) -> bool:
    """Whether a tokenizer's ids are the bytes of the text themselves."""
    found: list[int] = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return found == list(PROBE.encode())


def _letters() -> list[str]:
    """What byte-level tokenizers write for each byte (Radford et al. 2019): itself where Latin-1 prints it, the others
    in order from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(0x100 + others.index(byte)) for byte in range(256)]
