"""A tokenizer as GGUF holds it: token list, types, merges, special ids and the name of its
pre-tokenizer.

A Hugging Face tokenizer goes in, a `Vocabulary` comes out; from a file's vocabulary a tokenizer is
built again, by nothing but what the file says, so that the two can be compared. Byte-level BPE
only, which is what Qwen2, Qwen3, Llama 3 and SmolLM2 use.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

WORD_SPLITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names. Each stands for a way to cut text into words before merges apply.
SPLITS = {"qwen2": WORD_SPLITS % r"\p{N}", "llama-bpe": WORD_SPLITS % r"\p{N}{1,3}"}
SINGLE_DIGITS = {"gpt-2": False, "smollm": True}
PROBE = (
    "Hello   world, it's 12 + 3,456.70 = 3468 IT'S we'LL\n\n\tf(x)  =  1;  \r\n naïve 数学 العدد "
    "😀🦙 _a_ --> <answer>7</answer> \u0662\u0663 ½ x² ...!? \n "
)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPECIAL = ("bos", "eos", "eot", "eom", "unknown", "padding")


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says of a tokenizer; `special` holds ids by the names of its keys."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    chat_template: str | None


def build_pre_tokenizer(name: str) -> Any:
    """Return what cuts text into words, for a name that llama.cpp knows."""
    from tokenizers import Regex, pre_tokenizers

    if name in SPLITS:
        cut = pre_tokenizers.Split(Regex(SPLITS[name]), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([cut, level])
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if SINGLE_DIGITS[name] else []
    return pre_tokenizers.Sequence([*digits, level])


def recognise_pre_tokenizer(backend: "Tokenizer") -> str:
    """Return llama.cpp's name for how a tokenizer cuts text into words, found by what it does.

    Raises:
        ValueError: it is none of those known here.
    """
    found = backend.pre_tokenizer
    if found is not None:
        words = [word for word, _ in found.pre_tokenize_str(PROBE)]
        for name in (*SPLITS, *SINGLE_DIGITS):
            expected = build_pre_tokenizer(name).pre_tokenize_str(PROBE)
            if words == [word for word, _ in expected]:
                return name
    raise ValueError(
        "the tokenizer cuts text into words in a way that is none of "
        f"{', '.join((*SPLITS, *SINGLE_DIGITS))}: GGUF cannot name it, so export safetensors and "
        "convert that with llama.cpp's own script"
    )


def describe_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", vocab_size: int, end_ids: list[int]
) -> Vocabulary:
    """Return a tokenizer as GGUF holds it, filled up to the model's `vocab_size` rows.

    `end_ids` are the tokens that end a completion, the end of a turn first: llama.cpp stops on
    those it finds as eos, eot and eom.

    Raises:
        ValueError: it is no byte-level BPE, or there are more ends than GGUF has names for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    if model.get("type") != "BPE" or "Ġ" not in "".join(model["vocab"]):
        raise ValueError(
            "the tokenizer is no byte-level BPE (Llama 2's sentencepiece is none): export "
            "safetensors and convert that with llama.cpp's own script"
        )
    if not 1 <= len(end_ids) <= 3:
        raise ValueError(f"a completion ends with one of {end_ids}: GGUF names one to three ends")
    tokens, types = list_tokens(tokenizer, vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    ids = dict(zip(("eos", "eot", "eom"), end_ids, strict=False))
    ids |= {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id}
    ids |= {"padding": tokenizer.pad_token_id}
    return Vocabulary(
        pre=recognise_pre_tokenizer(backend),
        tokens=tokens,
        types=types,
        merges=merges,
        special={name: ids[name] for name in SPECIAL if ids.get(name) is not None},
        add_bos=tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id,
        chat_template=tokenizer.chat_template,
    )


def list_tokens(
    tokenizer: "PreTrainedTokenizerBase", vocab_size: int
) -> tuple[list[str], list[int]]:
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(names) >= vocab_size:
        raise ValueError(
            f"the tokenizer knows token {max(names)}, but the model's embedding has {vocab_size} "
            "rows: they are not of one model"
        )
    tokens = [names.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    types = [NORMAL if index in names else UNUSED for index in range(vocab_size)]
    for index, added in tokenizer.added_tokens_decoder.items():
        types[index] = CONTROL if added.special else USER_DEFINED
    return tokens, types


def write_vocabulary(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    """Add a vocabulary's keys to a file that is being written."""
    from gguf import TokenType

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([TokenType(kind) for kind in vocabulary.types])
    writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def read_vocabulary(reader: "GGUFReader") -> Vocabulary:
    """Return the vocabulary that a file holds."""

    def get(key: str, default: Any = None) -> Any:
        field = reader.get_field(f"tokenizer.{key}")
        return default if field is None else field.contents()

    special = {name: get(f"ggml.{name}_token_id") for name in SPECIAL}
    return Vocabulary(
        pre=get("ggml.pre"),
        tokens=get("ggml.tokens", []),
        types=get("ggml.token_type", []),
        merges=get("ggml.merges", []),
        special={name: index for name, index in special.items() if index is not None},
        add_bos=bool(get("ggml.add_bos_token", False)),
        chat_template=get("chat_template"),
    )


def build_tokenizer(vocabulary: Vocabulary) -> "Tokenizer":
    """Build the tokenizer that a vocabulary describes, without a normaliser, as llama.cpp reads it.

    Raises:
        ValueError: a merge makes a token that the list does not hold.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE

    rows = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    known = {token: index for index, (token, kind) in enumerate(rows) if kind != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    try:
        model = BPE(known, merges, ignore_merges=vocabulary.pre == "llama-bpe")
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"the merges do not fit the tokens ({error})") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = build_pre_tokenizer(vocabulary.pre)
    for token, kind in rows:
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(token, special=kind == CONTROL, normalized=False)
            tokenizer.add_special_tokens([added]) if kind == CONTROL else tokenizer.add_tokens(
                [added]
            )
    return tokenizer
