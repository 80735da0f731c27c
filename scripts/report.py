"""Write report.html of a run, or of several side by side: verdict, curves and completions.

    python scripts/report.py adapters/tiny
    python scripts/report.py adapters/tiny adapters/tiny-2 --output compared.html

One file under 5 MB that needs no network; also for a run that has not ended.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.cli import run

if __name__ == "__main__":
    sys.exit(run("report"))
