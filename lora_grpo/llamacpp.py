"""llama.cpp itself, where it is installed: it quantises GGUF files, and runs them.

`llama_cpp` is the package llama-cpp-python. Without it `llama-quantize` on the path still
quantises; what runs a file needs the package.
"""

import ctypes
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from lora_grpo.gguf_quants import QUANTS
from lora_grpo.rollout import Advance, Completion
from lora_grpo.terminal import FailedError

PROGRAM, PACKAGE = "llama-quantize", "llama-cpp-python==0.3.36"
HOW_TO_INSTALL = (
    f"pip install {PACKAGE} (it compiles for some minutes), or put llama.cpp's {PROGRAM} on the "
    "path"
)
KEEP_F32 = 0  # ggml's type number, for keys and values


def is_installed() -> bool:
    """Tell whether llama.cpp can run a file here."""
    return importlib.util.find_spec("llama_cpp") is not None


def can_quantize() -> bool:
    """Tell whether llama.cpp can quantise a file here."""
    return is_installed() or shutil.which(PROGRAM) is not None


def quantize_file(source: Path, target: Path, quant: str) -> None:
    """Quantise a 16-bit GGUF file.

    Raises:
        RuntimeError: llama.cpp did not.
    """
    if is_installed():
        import llama_cpp

        llama_cpp.llama_log_set(silent(), ctypes.c_void_p())
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = QUANTS[quant].file_type
        names = (bytes(source), bytes(target))
        failed = llama_cpp.llama_model_quantize(*names, ctypes.byref(settings))
        said = f"code {failed}"
    else:
        command = [PROGRAM, str(source), str(target), quant.upper()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        failed, said = done.returncode, (done.stderr.strip().splitlines() or ["nothing"])[-1]
    if failed or not target.is_file():
        raise FailedError(f"llama.cpp did not quantise {source.name} to {quant}: {said}")


@cache
def silent() -> object:
    """Return a log function of llama.cpp's type that drops what it is told.

    It is made once and kept, since C holds no more than its address.
    """
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    """A GGUF model loaded in llama.cpp on the CPU, with a LoRA file on it where one is named.

    `keep_logits` holds those of every position, n_ctx * V float32 values.
    """

    def __init__(
        self, path: Path, n_ctx: int, lora: Path | None = None, keep_logits: bool = False
    ) -> None:
        import llama_cpp

        self.model = llama_cpp.Llama(
            str(path),
            n_ctx=n_ctx,
            logits_all=keep_logits,
            lora_path=str(lora) if lora else None,
            type_k=KEEP_F32,
            type_v=KEEP_F32,
            verbose=False,
        )

    def close(self) -> None:
        """Free the model."""
        self.model.close()

    def tokenize(self, text: str) -> list[int]:
        """Return a text's ids, special tokens read as such; none is added in front."""
        return self.model.tokenize(text.encode(), add_bos=False, special=True)

    def ends(self, token: int) -> bool:
        """Tell whether llama.cpp stops at a token."""
        import llama_cpp

        return llama_cpp.llama_vocab_is_eog(self.model._model.vocab, token)

    def logits(self, sequence: list[int], kept: int) -> np.ndarray:
        """Return the logits of a sequence's last positions, (K, V)."""
        self.model.reset()
        self.model.eval(sequence)
        return self.model.scores[: len(sequence)][-kept:].copy()

    def continue_greedily(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        """Return the greedy completion of a prompt, the token that ends it included."""
        return list(self.stream(prompt, max_new_tokens))

    def stream(self, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
        self.model.reset()
        tokens = self.model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        for _, token in zip(range(max_new_tokens), tokens, strict=False):
            yield token
            if self.ends(token):
                return

    def complete(
        self, prompts: list[str], max_completion_length: int, advance: Advance = lambda count: None
    ) -> list[Completion]:
        """Answer each rendered prompt greedily, in their order."""
        completions = []
        for prompt in prompts:
            ids = self.continue_greedily(self.tokenize(prompt), max_completion_length)
            truncated = not (ids and self.ends(ids[-1]))
            text = self.model.detokenize(ids if truncated else ids[:-1]).decode(errors="replace")
            completions.append(Completion(text, len(ids), truncated))
            advance(1)
        return completions
