"""ClocProcessor: images and strings -> the model's tensors, saved beside the model.

Images are letterboxed (paper section 4.1: long side resized, then padded to a square) and normalised; texts are
brought to their canonical form and tokenised.  The tokenizer is any fast tokenizer of transformers; `train_tokenizer`
makes one from the texts of a data set where there is no vocabulary at hand.

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
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from opencloc.boxes import Letterbox
from opencloc.images import MEAN_RGB, STD_RGB, letterbox_array, open_image
from opencloc.model import loading, open_clip, towers
from opencloc.model.cloc import ClocConfig
from opencloc.model.packing import PackedTexts, pack
from opencloc.texts import canonical

# ids 0, 1, 2 in this order: transformers reads eos_token_id == 2 as "the highest id", an old bug kept alive
PAD, EOS, BOS = "<pad>", "<end>", "<start>"
# What transformers adds to a tokenizer's settings when it is loaded or called: nothing of the tokenizer itself.
_SETTINGS_OF_CALLS = (
    "is_local",
    "local_files_only",
    "max_length",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding_side",
    "stride",
    "truncation_side",
    "truncation_strategy",
    "trust_remote_code",
)


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
        for name, value in (("image_size", image_size), ("max_text_length", max_text_length)):
            if type(value) is not int or not 1 <= value <= 65536:
                raise ValueError(f"{name} is {value!r}, must be a whole number from 1 to 65536")
        for name, values, least in (("image_mean", image_mean, 0), ("image_std", image_std, 1e-6)):
            sound = isinstance(values, Sequence) and len(values) == 3 and all(type(v) in (int, float) for v in values)
            if not sound or not all(least <= v <= 1 for v in values):
                raise ValueError(f"{name} is {str(values)[:100]}, must be three numbers from {least} to 1")
        if type(pad_to_max_length) is not bool:
            raise ValueError(f"pad_to_max_length is {pad_to_max_length!r}, must be true or false")
        self.image_size, self.max_text_length = image_size, max_text_length
        self.pad_to_max_length = pad_to_max_length
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        super().__init__(tokenizer, **kwargs)

    @classmethod
    def for_towers(
        cls, config: Any, tokenizer: Any, where: str | Path = "the tokenizer", **options: Any
    ) -> ClocProcessor:
        """The processor that fits a towers' configuration (image size, text length, padding rule).

        Raises ValueError naming `where` for a tokenizer that does not fit (`loading.check_tokenizer`).
        """
        loading.check_tokenizer(tokenizer, config, where)
        return cls(
            tokenizer,
            image_size=towers.image_size(config),
            max_text_length=towers.max_text_length(config),
            pad_to_max_length=towers.pads_to_max_length(config),
            **options,
        )

    @classmethod
    def from_clip(cls, path: str | Path) -> ClocProcessor:
        """The processor for `ClocModel.from_clip(path)`: its tokenizer, image size, mean and deviation.

        Raises ValueError as `loading` does.
        """
        config = loading.load_config(path)
        with loading.naming(path):
            towers.check_family(config)
            settings = _image_settings(path)
            options: dict[str, Any] = {name: settings[name] for name in ("image_mean", "image_std") if name in settings}
            if (unit := 255 * settings.get("rescale_factor", 1 / 255)) != 1:  # ours is 1/255: the same pixels by it
                options = {name: [value / unit for value in values] for name, values in options.items()}
            if not settings.get("do_normalize", True):
                options = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
            return cls.for_towers(config, loading.load_tokenizer(path), path, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> ClocProcessor:
        """The processor of a CLOC checkpoint.

        Raises ValueError naming the folder where files are missing or broken, or do not fit the model beside them.
        """
        path = pretrained_model_name_or_path
        folder = Path(loading.model_path(path))
        has_model = not folder.is_dir() or (folder / "config.json").is_file()
        config = loading.load_config(path) if has_model else None
        if config is not None and config.model_type != "cloc":
            raise ValueError(f"{path} holds a {config.model_type!r} model: use ClocProcessor.from_clip")
        if folder.is_dir() and not (folder / "processor_config.json").is_file():
            raise ValueError(f"{path}: there is no processor_config.json")
        loading.check_tokenizer_files(path)
        with loading.naming(path):
            load: Any = super().from_pretrained
            processor = load(str(folder), **options | {"trust_remote_code": False})
        if config is not None:
            fitting = cls.for_towers(config.clip_config, processor.tokenizer, path)
            for name in ("image_size", "max_text_length", "pad_to_max_length"):
                here, there = getattr(processor, name), getattr(fitting, name)
                if here != there:
                    raise ValueError(f"{path}: {name} is {here} in processor_config.json, the model's is {there}")
        return processor

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Any = None, text: Any = None, *, return_tensors: str = "pt", padding: Any = True
    ) -> BatchFeature:
        """`pixel_values` (B, 3, S, S) for images (one or a list), `input_ids` (B, T) for texts (one or a list).

        An image is what `opencloc.images.open_image` takes, turned upright.
        `return_tensors` and `padding` are taken since every processor of transformers takes them: the result is always
        padded torch tensors.  Raises ValueError for an empty text.
        """
        if return_tensors != "pt" or padding is False:
            raise ValueError("only padded torch tensors are made: return_tensors='pt', padding=True")
        batch: dict[str, Tensor] = {}
        if images is not None:
            listed = images if isinstance(images, list | tuple) else [images]
            batch["pixel_values"] = self.letterbox([open_image(image) for image in listed])[0]
        if text is not None:
            batch["input_ids"] = self.tokenize(text)
        return BatchFeature(batch)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> list[str]:
        """Writes processor and tokenizer: the same files however often they were saved and loaded."""
        written = super().save_pretrained(save_directory, **options)
        save_tokenizer(self.tokenizer, save_directory, self.max_text_length)
        return written

    def letterbox(self, images: Sequence[Image.Image]) -> tuple[Float[Tensor, "B 3 S S"], list[Letterbox]]:
        """Normalised pixels, and for each image where it lies in the square."""
        squares = [letterbox_array(image, self.image_size) for image in images]
        empty = np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        pixels = self.normalize(torch.from_numpy(np.stack(squares) if squares else empty))
        return pixels, [Letterbox(width_px=i.width, height_px=i.height) for i in images]

    def normalize(self, squares: UInt8[Tensor, "B S S 3"]) -> Float[Tensor, "B 3 S S"]:
        """Pixels (value / 255 - mean) / std on the device of the squares."""
        return normalize(squares, self.image_mean, self.image_std)

    def tokenize(self, texts: str | Sequence[Any]) -> Int[Tensor, "B T"]:
        """Token ids of one text or many, cut to the towers' length, padded to the longest (SigLIP: to the full length).

        Texts are brought to their canonical form first (`opencloc.texts`): NFC, lower case, runs of white space as one
        space.  Raises ValueError for a text that is empty, no string, or holds half a surrogate pair.
        """
        if not len(texts) and not isinstance(texts, str):
            return torch.zeros(0, self.max_text_length, dtype=torch.long)
        padding = "max_length" if self.pad_to_max_length else True
        return self._encode(texts, padding=padding, return_tensors="pt")

    def pack(self, texts: str | Sequence[str] | Int[Tensor, "U T"]) -> Int[Tensor, "U T"] | PackedTexts:
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

    def _encode(self, texts: str | Sequence[Any], **options: Any) -> Any:
        listed = [texts] if isinstance(texts, str) else texts
        for i, text in enumerate(listed):
            if not isinstance(text, str):
                raise ValueError(f"text {i} is {text!r}, not a string")
            if not text.strip():
                raise ValueError(f"text {i} is empty")
        return self.tokenizer(
            [canonical(text) for text in listed],
            truncation=True,
            max_length=self.max_text_length,
            padding_side="right",  # as all three families were trained; transformers' Siglip2Tokenizer pads on the left
            return_attention_mask=False,
            **options,
        )["input_ids"]


def normalize(
    squares: UInt8[Tensor, "B S S 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "B 3 S S"]:
    """Pixels (value / 255 - mean) / std on the device of the squares."""
    scale = 1 / (255 * torch.tensor(std, device=squares.device))
    offset = 255 * torch.tensor(mean, device=squares.device)
    # bytes are transposed sooner than floats, and the arithmetic is in place
    pixels = squares.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.sub_(offset[:, None, None]).mul_(scale[:, None, None])


def save_tokenizer(tokenizer: Any, folder: str | Path, max_length: int) -> None:
    """Writes a tokenizer's files: the same ones however often it was saved and loaded, for transformers 4 and 5.

    `max_length`: most tokens of a text, which the tokenizers of lengthened text towers say wrongly.
    """
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for name in _SETTINGS_OF_CALLS:
        settings.pop(name, None)
    settings.pop("processor_class", None)
    settings["model_max_length"] = max_length
    if settings.get("tokenizer_class") == "TokenizersBackend":  # its name in version 5
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if (saved := Path(folder) / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(saved))
        backend.no_truncation()  # both are as the last call left them
        backend.no_padding()
        backend.save(str(saved))


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


def _image_settings(path: str | Path) -> dict[str, Any]:
    """The image processor's settings of a checkpoint, from one of transformers' two files or OpenCLIP's."""
    if open_clip.is_open_clip(path):
        return open_clip.image_settings(path)
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            config = json.loads(Path(found).read_text())
            return config.get(key, {}) if key else config
    return {}


AutoProcessor.register(ClocConfig, ClocProcessor)
