"""transformers' own server for one model of this machine.

    python -m lora_grpo.serve_transformers NAME FOLDER [flags of `transformers serve`]

By itself that server lists the Hub's cache, which fails where there is none and never holds a local
folder, and takes the folder's path alone as the model's name.
"""

import sys
import time
from pathlib import Path
from typing import Any


def answer_to_name(name: str, folder: str) -> None:
    """List the served folder as the one model, under a short name that requests may give too."""
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import BaseHandler

    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "local"}
    resolve = BaseHandler._resolve_model

    def resolve_name(self: BaseHandler, body: dict[str, Any]) -> tuple[str, Any, Any]:
        if body.get("model") == name:
            body["model"] = folder
        return resolve(self, body)

    BaseHandler._resolve_model = resolve_name
    ModelManager.get_gen_models = staticmethod(lambda cache_dir=None: [entry])


def main() -> None:
    name, folder, *flags = sys.argv[1:]
    if not Path(folder).is_dir():
        sys.exit(f"error: {folder} is no folder: give a merged model, such as merged/<run>")
    from transformers.cli.transformers import app

    answer_to_name(name, folder)
    app(["serve", folder, *flags])


if __name__ == "__main__":
    main()
