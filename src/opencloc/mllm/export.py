"""A trained model as a plain LLaVA folder, which transformers, vLLM and lmms-eval open without our code.

Region tokens and their sampler stay behind; everything that is asked without regions is answered as before.  The names
of the weights are those that LLaVA's checkpoints on the hub have, which every version of transformers and vLLM reads;
`save_pretrained` writes others from version to version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlavaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from opencloc import files
from opencloc.config import Strict
from opencloc.mllm.chat_format import ChatFormat
from opencloc.mllm.model import RegionLlava
from opencloc.mllm.processor import IMAGE, RegionLlavaProcessor
from opencloc.model.export import MARK, check_apart, may_be_replaced, pixel_settings
from opencloc.model.processor import save_tokenizer

_NAMES = (  # of this version of transformers -> as exported
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_REGION_PARTS = ("model.sampler.",)


@dataclass(frozen=True, kw_only=True)
class MllmExportConfig(Strict):
    """The model without its region tokens, as a folder that LlavaForConditionalGeneration loads."""

    model: str
    """Folder of the multimodal model."""
    out: str
    """Folder to write.  An earlier export of that name is replaced, anything else refused."""


def run_export(config: MllmExportConfig) -> Path:
    """The folder written.  Raises ValueError as `export_llava`, and where one folder is or holds the other."""
    disable_progress_bar()  # transformers' own
    check_apart(config.model, config.out)
    model = RegionLlava.from_pretrained(config.model)
    return export_llava(model, RegionLlavaProcessor.from_pretrained(config.model), config.out)


def export_llava(model: Any, processor: RegionLlavaProcessor, folder: str | Path) -> Path:
    """The folder, which appears when it is complete.  An older export of that name is replaced.

    Raises ValueError where the name holds anything else, and for a model that LLaVA's classes can't compute
    (`shared_positions`).
    """
    folder = Path(folder)
    if folder.exists() and not may_be_replaced(folder):
        raise ValueError(f"{folder} is there already and is no earlier export: it is not replaced")
    if getattr(model.config, "shared_positions", False):
        raise ValueError(
            "this model adds positions to its image tokens (shared_positions), which plain LLaVA does not: it cannot "
            "be exported. Build one without"
        )
    weights = llava_weights(model.state_dict(), tied=bool(model.config.tie_word_embeddings))
    with files.new_folder(folder) as partial:
        save_torch_state_dict(weights, partial, metadata={"format": "pt"})
        files.write_json(partial / "config.json", _config(model))
        generation = model.generation_config.to_diff_dict() | {"eos_token_id": processor.end_ids[-1]}
        files.write_json(partial / "generation_config.json", generation)
        _save_tokenizer(processor, partial)
        files.write_text(partial / "chat_template.jinja", chat_template(processor.format))
        for name, content in _processor(model.config, processor).items():
            files.write_json(partial / name, content)
        files.write_text(partial / "README.md", _readme(processor))
    return folder


def llava_weights(state: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """The weights by LLaVA's names, without those of the regions, and without the head where it is the embeddings.

    Raises ValueError naming a weight that LLaVA has no place for.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(_REGION_PARTS) or (tied and name.startswith("lm_head.")):
            continue
        prefix, exported = next((pair for pair in _NAMES if name.startswith(pair[0])), ("", ""))
        if not prefix:
            raise ValueError(f"plain LLaVA has no weight for {name}")
        found[exported + name.removeprefix(prefix)] = value.contiguous()
    return found


def chat_template(form: ChatFormat) -> str:
    """A Jinja template that writes what training wrote, from contents that are strings or lists of images and texts.

    Images come first, each as the image token and a line break.  A system message's text stands before the question.
    """
    head, ask, end, between, image = map(_quoted, (form.head, form.ask, form.end, form.between, f"{IMAGE}\n"))
    return f"""{{%- set ns = namespace(asked=false, system='') -%}}
{{%- for message in messages -%}}
{{%- set parts = namespace(images='', text='') -%}}
{{%- if message['content'] is string -%}}
{{%- set parts.text = message['content'] -%}}
{{%- else -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'image' -%}}
{{%- set parts.images = parts.images + {image} -%}}
{{%- elif part['type'] == 'text' -%}}
{{%- set parts.text = parts.text + part['text'] -%}}
{{%- else -%}}
{{{{- raise_exception('only images and texts are taken, not ' + part['type']) -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{%- if message['role'] == 'system' -%}}
{{%- set ns.system = (parts.text | trim) + '\\n' -%}}
{{%- elif message['role'] == 'user' -%}}
{{{{- ({between} if ns.asked else {head}) + parts.images + ns.system + (parts.text | trim) -}}}}
{{%- set ns.asked = true -%}}
{{%- set ns.system = '' -%}}
{{%- if not loop.last or add_generation_prompt -%}}
{{{{- {ask} -}}}}
{{%- endif -%}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- (parts.text | trim) + {end} -}}}}
{{%- else -%}}
{{{{- raise_exception('unknown role ' + message['role']) -}}}}
{{%- endif -%}}
{{%- endfor -%}}"""


def _quoted(text: str) -> str:
    """A text as a literal of Jinja, whose escapes are Python's."""
    return "'" + text.encode("unicode-escape").decode("ascii").replace("'", "\\'") + "'"


def _config(model: Any) -> dict[str, Any]:
    """LLaVA's configuration, with what others look for written out."""
    ours, plain = model.config.to_dict(), LlavaConfig().to_dict()
    config = {name: value for name, value in ours.items() if name in plain or name in ("dtype", "tie_word_embeddings")}
    text = config["text_config"]
    text["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]]]
    side = config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]
    return config | {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": side * side,
        "image_token_index": model.config.image_token_index,
    }


def _save_tokenizer(processor: RegionLlavaProcessor, folder: Path) -> None:
    """The tokenizer, adding no token by itself: the chat template writes them, and some callers add them again."""
    save_tokenizer(processor.tokenizer, folder, processor.max_length)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("chat_template", "add_bos_token", "add_eos_token"):
        settings.pop(name, None)
    files.write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    file = str(folder / "tokenizer.json")
    content = json.loads(Path(file).read_text())
    content["post_processor"] = None
    files.write_text(file, json.dumps(content, ensure_ascii=False))
    Tokenizer.from_file(file)  # it is one still


def _processor(config: Any, processor: RegionLlavaProcessor) -> dict[str, dict[str, Any]]:
    """File name -> content: `processor_config.json` of transformers 5, `preprocessor_config.json` of version 4."""
    side = processor.image_size
    square = {"height": side, "width": side}
    image = {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "size": square,
        "do_center_crop": True,  # of what is a square already; its size is what token counts are made of
        "crop_size": square,
    } | pixel_settings(processor.image_mean, processor.image_std)
    strategy = config.vision_feature_select_strategy
    settings = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1 if strategy == "default" else 0,
    }
    return {
        "processor_config.json": settings | {"image_processor": image},
        "preprocessor_config.json": settings | image,
    }


def _readme(processor: RegionLlavaProcessor) -> str:
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- {MARK}
- llava
---

# A LLaVA with a CLOC encoder

A plain `LlavaForConditionalGeneration`, written by `opencloc mllm export`. It answers what is asked without regions;
regions need the folder it was made of.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
```

The image processor letterboxes: photos are padded to a square, which is resized to {processor.image_size} x
{processor.image_size} pixels. Boxes in answers are `[x0, y0, x1, y1]`, whole numbers from 0 to 999 of that square.
"""
