"""A GGUF file run in llama.cpp, and compared with the merged model: ids, ends, logits, answers.

llama.cpp multiplies in the weights' own type (it rounds activations to 8 bits beside 8-bit weights,
to 16 beside 16-bit ones), so its logits differ from those of the same weights in float32.
"""

import ctypes
import importlib.util
import logging
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_grpo.export.gguf.quants import QUANTS
from lora_grpo.export.gguf.tokenizer import PROBE
from lora_grpo.machine.terminal import FailedError
from lora_grpo.policy.base import declared_end_ids, read_tokenizer
from lora_grpo.policy.generate import Advance, Completion
from lora_grpo.proof.checks import Check, check_kl
from lora_grpo.proof.distance import KEPT_POSITIONS, measure_distance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_grpo.proof.reference import Reference

PROGRAM, PACKAGE = "llama-quantize", "llama-cpp-python==0.3.36"
HOW_TO_INSTALL = (
    f"pip install {PACKAGE} (it compiles for some minutes), or put llama.cpp's {PROGRAM} on the "
    "path"
)
KEEP_F32 = 0  # ggml's type number, for keys and values


def is_installed() -> bool:
    """Return whether llama.cpp can run a file here."""
    return importlib.util.find_spec("llama_cpp") is not None


def can_quantize() -> bool:
    """Return whether llama.cpp can quantise a file here."""
    return is_installed() or shutil.which(PROGRAM) is not None


def quantize_file(source: Path, target: Path, quant: str) -> None:
    """Quantise a 16-bit GGUF file.

    Raises:
        RuntimeError: llama.cpp did not.
    """
    if is_installed():
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
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
        """Return whether llama.cpp stops at a token."""
        import llama_cpp

        return llama_cpp.llama_vocab_is_eog(self.model._model.vocab, token)

    def logits(self, sequence: list[int], kept: int) -> np.ndarray:
        """Return the logits of a sequence's last positions, (K, V)."""
        self.model.reset()
        self.model.eval(sequence)
        return self.model.scores[: len(sequence)][-kept:].copy()

    def continue_greedily(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        """Return the greedy completion of a prompt, the token that ends it included."""
        self.model.reset()
        ids = []
        for token in self.model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            ids.append(token)
            if len(ids) == max_new_tokens or self.ends(token):
                break
        return ids

    def complete(
        self,
        prompts: list[str],
        max_completion_length: int,
        advance: Advance = lambda count: None,
        sampling: None = None,
    ) -> list[Completion]:
        """Answer each rendered prompt greedily, in their order; nothing is sampled here."""
        completions = []
        for prompt in prompts:
            ids = self.continue_greedily(self.tokenize(prompt), max_completion_length)
            truncated = not (ids and self.ends(ids[-1]))
            text = self.model.detokenize(ids if truncated else ids[:-1]).decode(errors="replace")
            completions.append(Completion(text, len(ids), truncated))
            advance(1)
        return completions


# Mean KL, in nats per token, of llama.cpp's logits from those of the same weights in float32, by
# the weights' bits. docs/exports.md has the worst of the embedded model and SmolLM2-135M.
KL_BOUND_16, KL_BOUND_LESS = 1e-3, 1e-2
SIXTEEN_BITS = ("f16", "bf16")


def prove_in_llamacpp(
    path: Path,
    folder: Path,
    reference: "Reference",
    expected: list[torch.Tensor],
    quant: str,
    lora: Path | None = None,
) -> tuple[list[Check], dict[str, Any]]:
    """Run a file, and maybe a LoRA file on it, on the merged model's sequences; `expected` holds
    the logits of the same weights in float32.

    Returns the checks, and how far llama.cpp is from the merged model and from `expected`.
    """
    tokenizer = read_tokenizer(folder)
    room = max(map(len, reference.sequences)) + 1
    model = LlamaCpp(path, room, lora, keep_logits=True)
    try:
        logits = [
            torch.from_numpy(model.logits(sequence, KEPT_POSITIONS))
            for sequence in reference.sequences
        ]
        same = count_same_answers(model, reference)
        checks = [
            check_ids(model, tokenizer, reference.texts),
            check_ends(model, declared_end_ids(folder, tokenizer)),
        ]
    finally:
        model.close()
    distance = measure_distance(expected, logits)
    bound = KL_BOUND_16 if quant in SIXTEEN_BITS else KL_BOUND_LESS
    checks.append(check_kl(distance, bound, "llamacpp_logits"))
    figures = {
        "llamacpp_from_same_weights": asdict(distance),
        "llamacpp_from_merged": asdict(measure_distance(reference.logits, logits)),
        "llamacpp_same_answers": f"{same} of {len(reference.sequences)}",
    }
    return checks, figures


def count_same_answers(model: LlamaCpp, reference: "Reference") -> int:
    """Return for how many prompts llama.cpp's greedy answer is the merged model's, id by id."""
    pairs = zip(reference.prompts, reference.sequences, strict=True)
    return sum(
        model.continue_greedily(prompt, len(sequence) - len(prompt)) == sequence[len(prompt) :]
        for prompt, sequence in pairs
    )


def check_ids(model: LlamaCpp, tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> Check:
    """Tokenize prompts and a probe in llama.cpp and by the merged folder's tokenizer."""
    probes = [*texts, PROBE, "".join(tokenizer.all_special_tokens)]
    different = [
        text
        for text in probes
        if model.tokenize(text) != tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    detail = f"{len(different)} of {len(probes)} texts get other ids"
    return Check("llamacpp_tokens", not different, detail)


def check_ends(model: LlamaCpp, ends: list[int]) -> Check:
    """Ask llama.cpp whether it stops at every token that ends a completion."""
    missed = [token for token in ends if not model.ends(token)]
    detail = f"it does not stop after {missed}" if missed else f"stops at {ends}"
    return Check("llamacpp_end", not missed, detail)
