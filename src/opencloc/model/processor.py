"""ClocProcessor: images and strings -> the model's tensors, saved beside the model.

Images are letterboxed (paper section 4.1: long side resized, then padded to a square) and normalised; texts are
lower-cased and tokenised.  The tokenizer is any fast tokenizer of transformers; `train_tokenizer` makes one from the
texts of a data set where there is no vocabulary at hand.

Symbols: B images, S side of the square in pixels, T text tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from opencloc.boxes import Letterbox
from opencloc.images import MEAN_RGB, STD_RGB, letterbox_array
from opencloc.model import towers
from opencloc.model.cloc import ClocConfig
from opencloc.model.packing import PackedTexts, pack

# ids 0, 1, 2 in this order: transformers reads eos_token_id == 2 as "the highest id", an old bug kept alive
PAD, EOS, BOS = "<pad>", "<end>", "<start>"


class ClocProcessor(ProcessorMixin):
    """Letterbox and tokenizer.  `processor(images=..., text=...)` gives `pixel_values` and `input_ids`."""

    @no_type_check  # transformers reads the argument names off this function, which a type checker would wrap
    def __init__(
        self,
        tokenizer: Any = None,
        image_size: int = 224,
        max_text_length: int = 77,
        pad_to_max_length: bool = False,
        image_mean: Sequence[float] = MEAN_RGB,
        image_std: Sequence[float] = STD_RGB,
        **kwargs: Any,
    ) -> None:
        self.image_size, self.max_text_length = image_size, max_text_length
        self.pad_to_max_length = pad_to_max_length
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        super().__init__(tokenizer, **kwargs)

    @classmethod
    def for_towers(cls, config: Any, tokenizer: Any, **options: Any) -> ClocProcessor:
        """The processor that fits a towers' configuration (image size, text length, padding rule)."""
        return cls(
            tokenizer,
            image_size=towers.image_size(config),
            max_text_length=towers.max_text_length(config),
            pad_to_max_length=towers.pads_to_max_length(config),
            **options,
        )

    @classmethod
    def from_clip(cls, path: str | Path) -> ClocProcessor:
        """The processor for `ClocModel.from_clip(path)`: its tokenizer, image size, mean and deviation."""
        config: Any = AutoConfig.from_pretrained(path)
        towers.check_family(config)
        options: dict[str, Any] = {}
        preprocessor = _preprocessor_config(path)
        if "image_mean" in preprocessor:
            options = {"image_mean": preprocessor["image_mean"], "image_std": preprocessor["image_std"]}
        return cls.for_towers(config, AutoTokenizer.from_pretrained(path), **options)

    def __call__(self, images: Any = None, text: Any = None, **_: Any) -> dict[str, Tensor]:  # pyright: ignore
        """`pixel_values` (B, 3, S, S) for images (one or many), `input_ids` (B, T) for texts (one or many)."""
        batch: dict[str, Tensor] = {}
        if images is not None:
            batch["pixel_values"] = self.letterbox([images] if isinstance(images, Image.Image) else images)[0]
        if text is not None:
            batch["input_ids"] = self.tokenize([text] if isinstance(text, str) else text)
        return batch

    def letterbox(self, images: Sequence[Image.Image]) -> tuple[Float[Tensor, "B 3 S S"], list[Letterbox]]:
        """Normalised pixels, and for each image where it lies in the square."""
        squares = [letterbox_array(image, self.image_size) for image in images]
        pixels = self.normalize(torch.from_numpy(np.stack(squares)))
        return pixels, [Letterbox(width_px=i.width, height_px=i.height) for i in images]

    def normalize(self, squares: UInt8[Tensor, "B S S 3"]) -> Float[Tensor, "B 3 S S"]:
        """Pixels (value / 255 - mean) / std on the device of the squares."""
        scale = 1 / (255 * torch.tensor(self.image_std, device=squares.device))
        offset = 255 * torch.tensor(self.image_mean, device=squares.device)
        # bytes are transposed sooner than floats, and the arithmetic is in place
        pixels = squares.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.sub_(offset[:, None, None]).mul_(scale[:, None, None])

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "B T"]:
        """Token ids, lower-cased, cut to the towers' length, padded to the longest (SigLIP: to the full length).

        Raises ValueError for an empty text.
        """
        padding = "max_length" if self.pad_to_max_length else True
        return self._encode(texts, padding=padding, return_tensors="pt")

    def pack(self, texts: Sequence[str] | Int[Tensor, "U T"]) -> Int[Tensor, "U T"] | PackedTexts:
        """Texts, or what `tokenize` made of them, for `encode_text` with the least work for the same embeddings.

        CLIP: several to a row.  SigLIP sees its padding as it was trained to: as `tokenize`.  For the host: on a GPU it
        waits for the device.  Raises ValueError for an empty text.
        """
        if self.pad_to_max_length:
            return texts if isinstance(texts, Tensor) else self.tokenize(texts)
        end_id, pad_id = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        rows = texts.tolist() if isinstance(texts, Tensor) else self._encode(texts)
        # up to the first end token, where CLIP reads the embedding: a text may spell that token out
        sequences = [ids[: ids.index(end_id) + 1] for ids in rows]
        return pack(sequences, max_length=self.max_text_length, pad_id=end_id if pad_id is None else pad_id)

    def _encode(self, texts: Sequence[str], **options: Any) -> Any:
        for i, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"text {i} is empty")
        return self.tokenizer(
            [text.lower() for text in texts],
            truncation=True,
            max_length=self.max_text_length,
            padding_side="right",  # as all three families were trained; transformers' Siglip2Tokenizer pads on the left
            return_attention_mask=False,
            **options,
        )["input_ids"]

    def export_clip(self, folder: str | Path) -> None:
        """Tokenizer and image processor for `ClocModel.export_clip(folder)`, as plain transformers files.

        The image processor resizes to the square without keeping the aspect ratio; pad images to a square first
        (LLaVA: `image_aspect_ratio="pad"`) to see what the encoder was trained on.
        """
        self.tokenizer.save_pretrained(folder)
        tokenizer_config = Path(folder) / "tokenizer_config.json"
        settings = json.loads(tokenizer_config.read_text())
        settings.pop("processor_class", None)  # ours; a plain checkpoint must not ask for it
        tokenizer_config.write_text(json.dumps(settings, indent=2) + "\n")
        kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
        config: dict[str, Any] = {
            "image_processor_type": {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}.get(
                kind, "Siglip2ImageProcessor"
            ),
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": int(Image.Resampling.BICUBIC),
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "do_convert_rgb": True,
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most `vocab_size` entries, trained on lower-cased texts.

    Start and end tokens are added as CLIP does; padding, end and start have the ids 0, 1 and 2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = {token: tokenizer.token_to_id(token) for token in (BOS, EOS)}
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=max_length
    )


def _preprocessor_config(path: str | Path) -> dict[str, Any]:
    """The image processor's settings of a checkpoint, whichever of transformers' two files holds them."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            config = json.loads(Path(found).read_text())
            return config.get(key, {}) if key else config
    return {}


AutoProcessor.register(ClocConfig, ClocProcessor)
