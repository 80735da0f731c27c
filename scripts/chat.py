"""Chat with an adapter or a merged model in the terminal; it streams, reasoning and answer apart.

    python scripts/chat.py adapters/tiny
    python scripts/chat.py adapters/tiny --compare --ask "What is 12 + 30?"
    python scripts/chat.py adapters/tiny --json < questions.txt    # one JSON object a line

Each question is asked alone, with the training prompt and greedily: the completion is the one that
evaluate.py scores. Exit status: 0 answered, 2 bad input, 130 interrupted.
"""

import sys

import tyro

from lora_grpo.chat import ChatConfig, chat


def main() -> int:
    config = tyro.cli(ChatConfig)
    try:
        chat(config)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
