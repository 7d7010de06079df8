"""Every evaluation set in miniature, in the files that people download: written here, read by the tests beside it.

All photos are 40 x 20 pixels in one colour, so that a test can tell them apart; boxes are pixels of them.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WIDTH, HEIGHT = 40, 20
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def photo(path: Path, colour: str = "red", size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Writes a photo in one colour, in whatever format the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(path, "JPEG" if path.suffix.lower() != ".png" else "PNG", quality=95)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco_image(image_id: int, file_name: str) -> dict[str, Any]:
    return {"id": image_id, "file_name": file_name, "width": WIDTH, "height": HEIGHT, "license": 1}


def annotation(number: int, image_id: int, category: int, bbox: Sequence[float], **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": category, "bbox": list(bbox), **more}


def write_coco(root: Path) -> None:
    """val2017 of two photos with boxes and one without, and their captions."""
    for number, colour in ((139, "red"), (285, "green"), (632, "blue")):
        photo(root / f"val2017/{number:012}.jpg", colour)
    images = [coco_image(number, f"{number:012}.jpg") for number in (139, 285, 632)]
    annotations = [
        annotation(1, 139, 1, [10, 5, 20, 10], area=150.5, iscrowd=0),
        annotation(2, 139, 90, [0, 0, 10, 10], area=60.0, iscrowd=0),
        annotation(3, 139, 1, [0, 0, 40, 20], area=700.0, iscrowd=1),
        annotation(4, 285, 90, [30, 10, 20, 20], area=9500.0, iscrowd=0),  # reaches outside
        annotation(5, 285, 1, [5, 5, 0, 3], area=0.0, iscrowd=0),
    ]
    categories = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
    write_json(
        root / "annotations/instances_val2017.json",
        {"info": {}, "images": images, "annotations": annotations, "categories": categories},
    )
    texts = [(139, f"Caption {i} of the first.") for i in range(6)] + [(285, "A green photo."), (632, " ")]
    captions = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(texts)]
    write_json(root / "annotations/captions_val2017.json", {"images": images, "annotations": captions})


def write_panoptic(root: Path) -> None:
    """panoptic_val2017.json of two photos: a person before a wall and a floor, a crowd on grass; PNGs of segments."""
    images = []
    annotations = []
    segments = {  # colour -> (segment id, category, box in pixels, crowd)
        "red": [
            (7, 1, (10, 5, 20, 10), 0),
            (256 * 3 + 1, 199, (0, 0, 40, 10), 0),
            (65536 * 2 + 5, 190, (0, 10, 40, 10), 0),
        ],
        "green": [(9, 1, (0, 0, 40, 10), 1), (300, 193, (0, 10, 40, 10), 0), (301, 199, (0, 0, 3, 3), 0)],
    }
    for number, (colour, drawn) in enumerate(segments.items(), start=1):
        photo(root / f"val2017/{number:012}.jpg", colour)
        images.append(coco_image(number, f"{number:012}.jpg"))
        ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
        for one, _, (x, y, w, h), _ in reversed(drawn if number == 1 else drawn[:2]):  # the last of green has no pixel
            ids[y : y + h, x : x + w] = one
        png = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        (root / "annotations/panoptic_val2017").mkdir(parents=True, exist_ok=True)
        Image.fromarray(png).save(root / f"annotations/panoptic_val2017/{number:012}.png")
        infos = [
            {"id": one, "category_id": category, "bbox": list(box), "area": 1, "iscrowd": crowd}
            for one, category, box, crowd in drawn
        ]
        annotations.append({"image_id": number, "file_name": f"{number:012}.png", "segments_info": infos})
    categories = [
        {"id": one, "name": name, "isthing": int(one < 92), "supercategory": "x"}
        for one, name in ((1, "person"), (190, "floor-other-merged"), (193, "grass-merged"), (199, "wall-brick"))
    ]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    write_json(root / "annotations/panoptic_val2017.json", content)


def write_open_images(root: Path) -> None:
    """validation-annotations-bbox.csv of two photos, one box of a group, and the classes' descriptions."""
    for name, colour in (("0001eeaf4aed83f9", "red"), ("0004886b7d043cfd", "green")):
        photo(root / f"validation/{name}.jpg", colour)
    heading = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    rows = [
        "0001eeaf4aed83f9,xclick,/m/0cmf2,1,0,0.5,0.25,0.75,0,0,0,0,0",
        "0001eeaf4aed83f9,xclick,/m/01g317,1,0.5,1,0,1,0,0,1,0,0",
        "0004886b7d043cfd,xclick,/m/01g317,1,0.1,0.9,0,1,1,1,0,1,1",
    ]
    (root / "validation-annotations-bbox.csv").write_text("\n".join([heading, *rows]) + "\n")
    names = '/m/0cmf2,Airplane\n/m/01g317,Person\n/m/0l3ms,"Balloon, hot air"\n'
    (root / "class-descriptions-boxable.csv").write_text(names)


def write_sugarcrepe(root: Path) -> None:
    """The seven files, with two pairs in the first and one in each other; photos of val2017."""
    for number, colour in ((1, "red"), (2, "green")):
        photo(root / f"val2017/{number:012}.jpg", colour)
    kinds = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
    for i, kind in enumerate(kinds):
        numbers = (1, 2) if i == 0 else (1 + i % 2,)
        pairs = {
            str(7 * n): {
                "filename": f"{n:012}.jpg",
                "caption": f"{kind} of {n}",
                "negative_caption": f"{kind}, not {n}",
            }
            for n in numbers
        }
        write_json(root / f"data/{kind}.json", pairs)


def write_vsr(root: Path) -> None:
    """random/test.jsonl: two true and two false statements about two photos."""
    rows = []
    for number, colour in ((1, "red"), (2, "green")):
        photo(root / f"data/images/{number:012}.jpg", colour)
        for label, relation in ((1, "on"), (0, "under")):
            caption = f"The cat is {relation} the mat of {number}."
            more = {"image_link": "http://images.cocodataset.org/x", "relation": relation, "annotator_id": 5}
            votes = {"vote_true_validator_id": [2, 6], "vote_false_validator_id": []}
            rows.append({"image": f"{number:012}.jpg", "caption": caption, "label": label} | more | votes)
    (root / "data/splits/random").mkdir(parents=True)
    (root / "data/splits/random/test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def write_lvis(root: Path) -> None:
    """lvis_v1_val.json: images without file_name, frequencies, ids of negative classes."""
    photo(root / "train2017/000000000001.jpg", "red")
    photo(root / "val2017/000000000002.jpg", "green")
    images = [
        {
            "id": number,
            "coco_url": f"http://images.cocodataset.org/{folder}/{number:012}.jpg",
            "width": WIDTH,
            "height": HEIGHT,
            "neg_category_ids": [3],
            "not_exhaustive_category_ids": [1],
        }
        for number, folder in ((1, "train2017"), (2, "val2017"))
    ]
    categories = [
        {"id": 1, "name": "aerosol_can", "frequency": "c", "synset": "aerosol.n.02", "synonyms": ["spray_can"]},
        {"id": 2, "name": "mouse_(computer_equipment)", "frequency": "f", "synset": "mouse.n.04", "synonyms": []},
        {"id": 3, "name": "zebra", "frequency": "r", "synset": "zebra.n.01", "synonyms": []},
    ]
    annotations = [
        annotation(1, 1, 1, [1.5, 2, 10, 10], area=88.0),
        annotation(2, 1, 2, [20, 0, 20, 20], area=390.0),
        annotation(3, 2, 3, [0, 0, 40, 20], area=1024.0),
    ]
    write_json(root / "lvis_v1_val.json", {"images": images, "annotations": annotations, "categories": categories})


def write_fg_ovd(root: Path) -> None:
    """1_attributes.json: captions as categories, each box with the ids of its hard negatives."""
    photo(root / "coco/train2017/000000000001.jpg", "red")
    categories = [
        {"id": 33, "name": "A light brown dog.", "synset": "", "frequency": "f"},
        {"id": 34, "name": "A black dog.", "synset": "", "frequency": "f"},
        {"id": 35, "name": "A white dog.", "synset": "", "frequency": "f"},
    ]
    image = coco_image(1, "train2017/000000000001.jpg") | {"neg_category_ids": [34, 35]}
    annotations = [
        annotation(1, 1, 33, [0, 0, 20, 20], neg_category_ids=[34, 35], area=400),
        annotation(2, 1, 34, [20, 0, 20, 20], neg_category_ids=[33], area=400),
        annotation(3, 1, 34, [20, 0, 20, 20], neg_category_ids=[], area=400),
    ]
    content = {"images": [image], "annotations": annotations, "categories": categories}
    write_json(root / "benchmarks/1_attributes.json", content)


def write_karpathy(root: Path, name: str) -> None:
    """dataset_coco.json or dataset_flickr30k.json of one test and one training image each."""
    folder = "val2014/" if name == "coco" else "flickr30k-images/"
    images = []
    for number, (split, colour) in enumerate((("test", "red"), ("test", "green"), ("train", "blue"))):
        file_name = f"COCO_val2014_{number:012}.jpg" if name == "coco" else f"{1000 + number}.jpg"
        photo(root / folder / file_name, colour)
        sentences = [{"raw": f"A {colour} photo, said {i}.", "tokens": [], "sentid": i} for i in range(5)]
        entry: dict[str, Any] = {"filename": file_name, "split": split, "imgid": number, "sentences": sentences}
        images.append(entry | ({"filepath": "val2014", "cocoid": number} if name == "coco" else {}))
    write_json(root / f"dataset_{name}.json", {"images": images, "dataset": name})


def write_imagenet(root: Path, folders: dict[str, str]) -> None:
    """One photo in each class folder: {class folder: colour}."""
    for name, colour in folders.items():
        photo(root / name / f"ILSVRC2012_val_{len(name):08}.JPEG", colour)


def refs() -> list[dict[str, Any]]:
    def ref(number: int, image: int, split: str, sentences: list[str]) -> dict[str, Any]:
        return {
            "ref_id": number,
            "ann_id": 10 * image + number % 2,
            "category_id": 1,
            "file_name": f"COCO_train2014_{image:012}_{number}.jpg",
            "image_id": image,
            "sent_ids": list(range(len(sentences))),
            "sentences": [
                {"raw": text.title(), "sent": text, "sent_id": i, "tokens": text.split()}
                for i, text in enumerate(sentences)
            ],
            "split": split,
        }

    return [
        ref(0, 1, "val", ["left half", "the dark one"]),
        ref(1, 1, "val", ["right half"]),
        ref(2, 2, "testA", ["whole picture"]),
    ]


def write_refer(root: Path, name: str = "refcoco", by: str = "unc") -> None:
    """refs(unc).p as Python 2 would pickle it, and instances.json."""
    for number, colour in ((1, "red"), (2, "green")):
        photo(root / f"images/mscoco/images/train2014/COCO_train2014_{number:012}.jpg", colour)
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    text = pickle.dumps(refs(), protocol=0)
    python2 = re.sub(rb"^([(.\w]*?)V(.*)$", rb"\1S'\2'", text, flags=re.MULTILINE)  # byte strings, as `str` was then
    (folder / f"refs({by}).p").write_bytes(python2)
    images = [coco_image(number, f"COCO_train2014_{number:012}.jpg") for number in (1, 2)]
    annotations = [
        annotation(10, 1, 1, [0, 0, 20, 20], area=400, iscrowd=0),
        annotation(11, 1, 1, [20, 0, 20, 20], area=400, iscrowd=0),
        annotation(20, 2, 1, [0, 0, 40, 20], area=800, iscrowd=0),
    ]
    write_json(folder / "instances.json", {"images": images, "annotations": annotations, "categories": []})


def write_mdetr(root: Path, name: str = "refcoco", split: str = "val") -> None:
    """finetune_refcoco_val.json: every expression is an image of its own."""
    photo(root / "train2014/COCO_train2014_000000000001.jpg", "red")
    queries = [("left half", [0, 0, 20, 20]), ("the dark one", [0, 0, 20, 20]), ("right half", [20, 0, 20, 20])]
    images = [
        coco_image(500 + i, "COCO_train2014_000000000001.jpg")
        | {"original_id": 1, "caption": text, "dataset_name": name, "tokens_negative": [[0, 4]]}
        for i, (text, _) in enumerate(queries)
    ]
    annotations = [
        annotation(i, 500 + i, 1, box, area=400, iscrowd=0, original_id=10, tokens_positive=[[0, 4]])
        for i, (_, box) in enumerate(queries)
    ]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": []}
    write_json(root / f"finetune_{name}_{split}.json", content)


ENTITIES_XML = """<annotation>
  <filename>{key}.jpg</filename>
  <size><width>40</width><height>20</height><depth>3</depth></size>
  <object><name>1</name><name>5</name>
    <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>
  <object><name>1</name>
    <bndbox><xmin>31</xmin><ymin>11</ymin><xmax>40</xmax><ymax>20</ymax></bndbox></object>
  <object><name>2</name><scene>1</scene><nobndbox>1</nobndbox></object>
</annotation>"""
ENTITIES_TEXT = """[/EN#1/people Two young guys] with [/EN#5/bodyparts/people shaggy hair] in [/EN#2/scene the yard] .
[/EN#0/notvisual It] shows [/EN#1/people Two men] .
"""


def write_entities(root: Path) -> None:
    """Flickr30k Entities with one test image."""
    key = "36979"
    photo(root / f"flickr30k-images/{key}.jpg", "red")
    for name, content in (
        (f"Annotations/{key}.xml", ENTITIES_XML.format(key=key)),
        (f"Sentences/{key}.txt", ENTITIES_TEXT),
        ("test.txt", f"{key}\n"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def grit_row(key: str) -> dict[str, Any]:
    caption = "a dog with a red ball"
    return {
        "key": key,
        "caption": caption,
        "url": f"http://example.com/{key}.jpg",
        "noun_chunks": [[0, 5, 0.0, 0.0, 0.5, 1.0, 0.98], [11, 21, 0.5, 0.25, 1.00001, 0.75, 0.71]],
        "ref_exps": [[0, 21, 0.0, 0.0, 0.5, 1.0, 0.98]],
        "clip_similarity_vitb32": 0.3,
    }


def write_grit(root: Path, *, parquet: bool, spans: Sequence[Any] | None = None) -> None:
    """00000.tar of img2dataset with two images; annotations in 00000.parquet or the tar's JSON (with other spans)."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "00000.tar", "w") as archive:
        for number, colour in enumerate(("red", "green")):
            key, buffer = f"{number:09}", io.BytesIO()
            Image.new("RGB", (WIDTH, HEIGHT), COLOURS[colour]).save(buffer, "JPEG")
            row = grit_row(key) | {"width": WIDTH, "height": HEIGHT, "status": "success"}
            row |= {} if spans is None else {"noun_chunks": spans}
            parts = {"jpg": buffer.getvalue(), "json": json.dumps(row).encode(), "txt": row["caption"].encode()}
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    if parquet:
        rows = [grit_row(f"{number:09}") for number in range(3)]  # the third image could not be downloaded
        pq.write_table(pa.Table.from_pylist(rows), root / "00000.parquet")
