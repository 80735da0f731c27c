"""Chat with an adapter or a merged model in the terminal; it streams, reasoning and answer apart.

    python scripts/chat.py adapters/tiny
    python scripts/chat.py adapters/tiny --compare --ask "What is 12 + 30?"
    python scripts/chat.py adapters/tiny --json < questions.txt    # one JSON object per line

Each question is asked alone, with the training prompt and greedily: the completion is the one that
evaluate.py scores. Exit status: 0 answered, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.cli import run

if __name__ == "__main__":
    sys.exit(run("chat"))
