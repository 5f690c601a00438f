"""`generation: vllm` in a process of its own: `python -m tests.engines.samples FOLDER JSON`; keys of a recipe in JSON.

Runs the recipe of `tests/e2e/experiment.py` with those keys in FOLDER, and prints what came of it, or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import infalign
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment
from tests.tiny import tiny_causal

WIDE = {"head_dim": 64, "hidden": 64, "num_attention_heads": 1, "num_key_value_heads": 1}  # what its CPU kernels take


def main() -> None:
    """Run the job of the command line."""
    folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    keys = tiny_experiment(folder)
    tiny_causal(str(keys["model_name_or_path"]), "llama", **WIDE)
    try:
        result = infalign.run({**keys, "generation": "vllm", "dtype": "float32", **changes})
        found = {"drawn": result["drawn"], "trained": result["trained"]}
    except InputError as error:
        found = {"error": str(error)}
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
