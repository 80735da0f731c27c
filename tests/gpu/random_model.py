"""Write a model folder of Qwen2.5-0.5B's shape with random weights, from the tokenizer's folder.

    python tests/gpu/random_model.py TOKENIZER_FOLDER MODELS_DIR/qwen2.5-0.5b-random

For a GPU machine to which 7 MB of tokenizer can be carried and 1 GB of random numbers need not.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "rope_theta": 1_000_000.0,
}


def main(source: Path, folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    model.generation_config.eos_token_id = [151645, 151643]
    model.generation_config.pad_token_id = 151643
    model.save_pretrained(folder)
    for name in ("tokenizer*", "chat_template*", "vocab*", "merges*"):
        for path in source.glob(name):
            shutil.copy(path, folder)
    print(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not (Path(sys.argv[1]) / "tokenizer.json").is_file():
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
