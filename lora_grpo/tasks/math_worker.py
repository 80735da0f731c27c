"""Compares mathematical expressions with math-verify, in a process of its own that may be killed.

Each line on standard input is a JSON list of the gold answer and an answer, in LaTeX without
dollars; each line on standard output is `true` or `false`. It is run as a file, so that it imports
nothing of this package.
"""

import json
import logging
import resource
import sys

SECONDS, BYTES = 2, 2**31  # of each of parsing and comparing; of memory in all


def main() -> None:
    """Answer until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    logging.disable()
    from math_verify import LatexExtractionConfig, parse, verify

    # Math-verify's own timeouts are alarm signals, which need the main thread, as here. They end
    # loops in Python, but no single long operation: that is for the parent.
    config = [LatexExtractionConfig()]

    def read(text: str) -> list:
        return parse(
            f"${text}$",
            config,
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=SECONDS,
        )

    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = map(read, json.loads(line))
        same = bool(gold and answer) and verify(gold, answer, timeout_seconds=SECONDS)
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    main()
