"""The embedded model: small, ordinary, its tokenizer the same when loaded or trained again."""

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lora_grpo.data.arithmetic import generate_problems
from lora_grpo.dev.tiny_model import train_tokenizer
from lora_grpo.policy.base import EMBEDDED_FOLDER


def test_it_is_small_and_whole() -> None:
    names = {path.name for path in EMBEDDED_FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.glob("*.safetensors")) <= 8 << 20


def test_a_tokenizer_loaded_or_trained_again_gives_the_same_ids() -> None:
    raw = Tokenizer.from_file(str(EMBEDDED_FOLDER / "tokenizer.json"))
    loaded, again = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER), train_tokenizer(0)
    assert again.get_vocab() == loaded.get_vocab()
    texts = [row["question"] + "\n" + row["answer"] for row in generate_problems(200)]
    for text in [*texts, "<reasoning>\n12*3=36\n</reasoning>\n<answer>\n36\n</answer><|im_end|>"]:
        ids = raw.encode(text).ids
        assert loaded(text)["input_ids"] == ids and again(text)["input_ids"] == ids
    assert loaded.tokenize("12345") == ["1", "2", "3", "4", "5"]
    assert loaded.eos_token == "<|im_end|>" and loaded.pad_token_id != loaded.eos_token_id
