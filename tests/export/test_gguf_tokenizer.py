"""A tokenizer goes into GGUF and comes out the same, by what the file says alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader
from gguf_models import make_model
from merge_models import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_grpo.export.gguf.tokenizer import (
    PROBE,
    build_pre_tokenizer,
    build_tokenizer,
    describe_tokenizer,
    read_vocabulary,
    recognise_pre_tokenizer,
)
from lora_grpo.export.gguf.write import read_model, write_model

TEXTS = (
    "What's 12 + 3,456.70?\n\n\tf(x)  = 1",
    "naïve 数学 😀 ½ ٢٣ \u00a0x",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    PROBE,
)
REAL = Path.home() / ".cache" / "real-models"


def test_the_vocabulary_survives_the_file(tmp_path: Path) -> None:
    folder, tokenizer = make_model("qwen2"), make_tokenizer()
    vocabulary = describe_tokenizer(tokenizer, 512, [2])
    write_model(tmp_path / "m.gguf", read_model(folder), vocabulary, "bf16", "m")
    found = read_vocabulary(GGUFReader(tmp_path / "m.gguf"))
    assert found == vocabulary
    rebuilt = build_tokenizer(found)
    # transformers reads the same file by its own rules for Qwen2.
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert rebuilt.encode(text, add_special_tokens=False).ids == ids
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids


def test_unused_rows_and_special_tokens_are_marked() -> None:
    vocabulary = describe_tokenizer(make_tokenizer(), 512, [2, 0])
    used = len(make_tokenizer())
    assert vocabulary.types[:3] == [3, 3, 3] and set(vocabulary.types[3:used]) == {1}
    assert set(vocabulary.types[used:]) == {5} and len(set(vocabulary.tokens)) == 512
    assert vocabulary.special["eos"] == 2 and vocabulary.special["eot"] == 0
    assert not vocabulary.add_bos


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "gpt-2", "smollm"])
def test_the_way_to_cut_words_is_found_by_what_it_does(name: str) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = build_pre_tokenizer(name)
    assert recognise_pre_tokenizer(backend) == name


def test_an_unknown_way_to_cut_words_is_refused() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="none of qwen2, llama-bpe, gpt-2, smollm"):
        recognise_pre_tokenizer(backend)


def test_sentencepiece_is_refused() -> None:
    backend = Tokenizer(models.BPE({"▁a": 0, "</s>": 1}, []))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(ValueError, match="no byte-level BPE"):
        describe_tokenizer(tokenizer, 2, [1])


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="embedding has 100 rows"):
        describe_tokenizer(make_tokenizer(), 100, [2])


def test_a_merge_without_its_token_is_refused() -> None:
    vocabulary = describe_tokenizer(make_tokenizer(), 512, [2])
    broken = replace(vocabulary, merges=[*vocabulary.merges, "q ☃"])
    with pytest.raises(ValueError, match="the merges do not fit"):
        build_tokenizer(broken)


def test_bos_is_added_where_the_tokenizer_adds_it() -> None:
    said = json.loads(make_tokenizer().backend_tokenizer.to_str())
    said["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(said)),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    assert describe_tokenizer(tokenizer, 512, [2]).add_bos


@pytest.mark.parametrize("name", ["qwen2.5-tokenizer", "smollm2-135m-instruct"])
def test_a_real_tokenizer(name: str) -> None:
    folder = REAL / name
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no {name}: shared/tools/real_models.py builds it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rebuilt = build_tokenizer(describe_tokenizer(tokenizer, len(tokenizer), [2]))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert rebuilt.encode(text, add_special_tokens=False).ids == ids
