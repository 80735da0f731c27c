"""Short texts: an answer is right if it is one of the gold answers, up to how it is written.

Letter case, white space, punctuation and quotes around words, and a leading article do not count.
Several gold answers are written as a JSON list, so that they travel as one text.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress

from lora_grpo.tasks.task import Task, between

AROUND_WORDS = ".,;:!?\"'`()[]{}*_\u2018\u2019\u201c\u201d\u00ab\u00bb\u3002\uff0c"
ARTICLE = re.compile(r"(?:a|an|the)\s+(?=\S)")
SAID = re.compile(r"answer\s*(?:is|:|=)+\s*(?P<rest>[^\n]+)", re.IGNORECASE)


def normalise(text: str) -> str:
    """Return a text as it is compared; punctuation alone stays as it is."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = [word.strip(AROUND_WORDS) for word in folded.split()]
    bare = " ".join(filter(None, words))
    return ARTICLE.sub("", bare, count=1) if ARTICLE.match(bare) else bare or folded.strip()


def join_golds(golds: Sequence[str]) -> str:
    """Return one text that stands for all gold answers, each of which is right."""
    different = list(dict.fromkeys(golds))
    return different[0] if len(different) == 1 else json.dumps(different, ensure_ascii=False)


def split_golds(gold: str) -> list[str]:
    """Return the gold answers that `join_golds` joined."""
    if gold.startswith("["):
        with suppress(json.JSONDecodeError):
            golds = json.loads(gold)
            if golds and all(isinstance(one, str) for one in golds):
                return golds
    return [gold]


def same_text(answer: str, gold: str) -> bool:
    """Return whether an answer is one of the gold answers."""
    written = normalise(answer)
    return bool(written) and any(written == normalise(one) for one in split_golds(gold))


def last_text(completion: str) -> str | None:
    """Return what stands in the answer tags, else what follows the last `the answer is`, else the
    last line."""
    tagged = between(completion, *Task.answer)
    if tagged is not None:
        return tagged
    said = list(SAID.finditer(completion))
    if said:
        return said[-1]["rest"]
    lines = [line for line in completion.splitlines() if line.strip()]
    return lines[-1] if lines else None


TEXT_TASK = Task(
    name="text",
    noun="text",
    compare=lambda answer, gold, row: same_text(answer, gold),
    can_read=lambda text: bool(normalise(text)),
    find_last=last_text,
    write_gold=lambda gold: split_golds(gold)[0],
    instruction="The answer is a few words, without a sentence around them.",
)
