"""A detector of your own for `opencloc label`: YOLOX through ONNX Runtime, its 80 classes matched to phrases.

    opencloc label --detector "yolox_detector.py:make_detector?model=yolox_nano.onnx" ...

Copy this file wherever you like.  It needs `pip install onnxruntime` and a model, such as `yolox_nano.onnx` from the
releases of https://github.com/Megvii-BaseDetection/YOLOX (Apache-2.0; tried with a file of 3,678,356 bytes, SHA-256
e8af074932d4ed7e232278e3055cefcdea3edf178874a3694ae292649fb464dd).  Any YOLOX on COCO's classes works, as exported by
YOLOX's own `export_onnx.py` (raw output, before grid decoding).

An open-vocabulary detector is asked for each image's phrases; a closed one always finds the same 80 classes.  A box of
class `person` becomes "man" only where the caption names a man.  The rules err on the side of no label:

* A phrase stands for a class if its last words are the class name or a synonym, in the singular or plural: "red tennis
  rackets" is a tennis racket, "train station" is no train, "hot dog" is no dog.  Ambiguous words ("board", "glass",
  "computer") stand for nothing.
* A box counts only for its own best class: a dog is never labelled "cat" for want of dogs in the caption.
* Several phrases for one class ("man", "woman") cannot be told apart by a detector that knows only persons.  Boxes take
  the class name itself where it is a phrase, else the first phrase in the singular, else the first.
* A box shows one object, so its text is in the singular: "several young women" gives boxes of "young woman", "people"
  of "person".
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import onnxruntime
from PIL import Image

from opencloc.vesl.detect import Detections

# fmt: off
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
SYNONYMS = {
    "person": "man, woman, boy, girl, child, kid, baby, toddler, lady, guy, gentleman, adult, pedestrian, player, "
    "batter, pitcher, catcher, umpire, skier, snowboarder, skateboarder, surfer, rider, cyclist, biker, driver, chef, "
    "worker",
    "bicycle": "bike",
    "car": "automobile, sedan, suv, taxi, taxi cab, cab",
    "motorcycle": "motorbike, moped",
    "airplane": "plane, aeroplane, jet, airliner",
    "train": "locomotive",
    "truck": "pickup, pickup truck",
    "boat": "ship, sailboat, canoe, kayak, rowboat, ferry",
    "traffic light": "traffic signal, stoplight, stop light",
    "bird": "seagull, duck, goose, pigeon, parrot, swan, eagle, owl, gull, flamingo, crow",
    "cat": "kitten, kitty",
    "dog": "puppy, pup",
    "horse": "pony",
    "sheep": "lamb",
    "cow": "bull, calf, ox, cattle",
    "backpack": "rucksack",
    "umbrella": "parasol",
    "handbag": "purse, hand bag",
    "tie": "necktie, bow tie, neck tie",
    "suitcase": "luggage",
    "skis": "ski",
    "sports ball": "ball, soccer ball, tennis ball, basketball",
    "baseball bat": "bat",
    "baseball glove": "glove, mitt, catcher's mitt",
    "tennis racket": "racket, racquet, tennis racquet",
    "cup": "mug",
    "hot dog": "hotdog",
    "donut": "doughnut",
    "couch": "sofa",
    "potted plant": "plant, houseplant, house plant",
    "dining table": "table, kitchen table",
    "tv": "television, television set",
    "laptop": "laptop computer",
    "mouse": "computer mouse",
    "remote": "remote control, tv remote, wii remote, game controller",
    "cell phone": "phone, cellphone, smartphone, smart phone, mobile phone, telephone",
    "microwave": "microwave oven",
    "oven": "stove",
    "refrigerator": "fridge",
    "teddy bear": "teddy, stuffed bear",
    "hair drier": "hair dryer, blow dryer, hairdryer",
}
IRREGULAR_PLURALS = {
    "men": "man",
    "women": "woman",
    "gentlemen": "gentleman",
    "people": "person",
    "children": "child",
    "knives": "knife",
    "geese": "goose",
    "mice": "mouse",
    "calves": "calf",
    "oxen": "ox",
}
CLASS_OF_NAME = {
    name.strip(): number
    for number, names in enumerate(f"{name}, {SYNONYMS.get(name, name)}" for name in COCO_CLASSES)
    for name in names.split(",")
}
STRIDES = (8, 16, 32)  # pixels per cell of the three output grids
PAD = 114
QUANTIFIERS = "several many few multiple various numerous different other more most two three four all both some"


def make_detector(model: str | None = None, score: str = "0.1", threads: str = "1") -> YoloxDetector:
    """The detector that `--detector yolox_detector.py:make_detector` names.

    `model` is the ONNX file, by default the one in the environment variable OPENCLOC_YOLOX; `score` leaves out weaker
    boxes; `threads` are ONNX Runtime's per worker.  Raises ValueError if no file is named or it is not there.
    """
    path = model or os.environ.get("OPENCLOC_YOLOX")
    if not path:
        raise ValueError("no YOLOX model: write ...:make_detector?model=FILE.onnx or set OPENCLOC_YOLOX")
    if not os.path.isfile(path):
        raise ValueError(f"no YOLOX model at {path}")
    return YoloxDetector(path, float(score), int(threads))


class YoloxDetector:
    """YOLOX as a `Detector`: one image per pass, as the exported file has a fixed batch of one."""

    def __init__(self, path: str, score: float, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        entry = self._session.get_inputs()[0]
        self._input, self._side_px = entry.name, int(entry.shape[-1])
        self._score = score
        self.model_id = os.path.basename(path)

    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        return [self._detect(image, own) for image, own in zip(images, phrases, strict=True)]

    def _detect(self, image: Image.Image, phrases: Sequence[str]) -> Detections:
        pixels, scale = letterbox(image, self._side_px)
        output = np.asarray(self._session.run(None, {self._input: pixels})[0])[0]
        boxes_px, scores = decode(output, self._side_px)
        best = scores.argmax(axis=1)
        phrase_of_class = np.full(len(COCO_CLASSES), -1)
        for number, phrase in phrases_of_classes(phrases).items():
            phrase_of_class[number] = phrase
        phrase, score = phrase_of_class[best], scores.max(axis=1)
        keep = (phrase >= 0) & (score > self._score)
        boxes = boxes_px[keep] / (np.tile(image.size, 2) * scale)
        texts = np.array([of_one(text) for text in phrases], dtype=object)[phrase[keep]]
        return Detections(boxes=boxes, scores=score[keep], phrase=phrase[keep], texts=texts)


def letterbox(image: Image.Image, side_px: int) -> tuple[np.ndarray, float]:
    """(pixels (1, 3, side, side), BGR 0 to 255, the image at the top left, the factor by which it was resized)."""
    scale = side_px / max(image.size)
    width, height = (max(1, round(px * scale)) for px in image.size)
    square = np.full((side_px, side_px, 3), PAD, dtype=np.float32)
    square[:height, :width] = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(square[:, :, ::-1].transpose(2, 0, 1)[None]), scale


def decode(output: np.ndarray, side_px: int) -> tuple[np.ndarray, np.ndarray]:
    """(XYXY boxes (N, 4) in pixels of the square, scores (N, C)) of YOLOX's raw output (N, 5 + C).

    Each of the N cells holds a centre relative to itself and a log size, both in units of its stride, then the
    objectness and the class probabilities, whose product is the score.
    """
    cells, strides = [], []
    for stride in STRIDES:
        side = side_px // stride
        y, x = np.mgrid[:side, :side]
        cells.append(np.stack([x, y], axis=-1).reshape(-1, 2))
        strides.append(np.full((side * side, 1), stride))
    stride = np.concatenate(strides)
    centre = (output[:, :2] + np.concatenate(cells)) * stride
    size = np.exp(output[:, 2:4]) * stride
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1), output[:, 4:5] * output[:, 5:]


def phrases_of_classes(phrases: Sequence[str]) -> dict[int, int]:
    """For every class that an image's phrases name, which phrase its boxes get: {class number: phrase number}."""
    chosen: dict[int, tuple[int, int]] = {}  # class number -> (rank, phrase number), the least wins
    for number, phrase in enumerate(phrases):
        name, ending = _name_and_ending(phrase)
        if name is not None:
            found = CLASS_OF_NAME[name]
            rank = 0 if phrase == COCO_CLASSES[found] else 1 if ending == name else 2
            chosen[found] = min(chosen.get(found, (3, 0)), (rank, number))
    return {found: number for found, (_, number) in chosen.items()}


def of_one(phrase: str) -> str:
    """What one object of a phrase is called: "several young women" -> "young woman"; other phrases as they are."""
    name, ending = _name_and_ending(phrase)
    if name is None or name == ending:
        return phrase
    words = phrase[: len(phrase) - len(ending)].split()
    return " ".join([*(word for word in words if word not in QUANTIFIERS.split()), name])


def class_of_phrase(phrase: str) -> int | None:
    """The class that a phrase stands for by its last words, or None."""
    name, _ = _name_and_ending(phrase)
    return None if name is None else CLASS_OF_NAME[name]


def _name_and_ending(phrase: str) -> tuple[str | None, str]:
    """(the name or synonym of a class with which a phrase ends, the ending as it stands there, perhaps a plural)."""
    words = phrase.lower().split()
    for start in range(len(words)):  # longest ending first, so that "hot dog" is not "dog"
        ending = " ".join(words[start:])
        if (name := _singular(ending)) is not None:
            return name, ending
    return None, ""


def _singular(ending: str) -> str | None:
    """The known name of which `ending` is the singular or plural, or None."""
    *first, last = ending.split()
    forms = [last, IRREGULAR_PLURALS.get(last, last)]
    forms += [last.removesuffix(suffix) + new for suffix, new in (("s", ""), ("es", ""), ("ies", "y"))]
    return next((known for form in forms if (known := " ".join([*first, form])) in CLASS_OF_NAME), None)
