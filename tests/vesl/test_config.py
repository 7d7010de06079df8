"""What labels are made by: values, what of them decides the labels, and the manifest that holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opencloc.config import from_json, to_json
from opencloc.vesl.captioners import CaptionConfig
from opencloc.vesl.config import LabelConfig, config_hash, write_manifests
from opencloc.vesl.filters import FilterConfig
from opencloc.vesl.label import Shard


def configure(**changes: Any) -> LabelConfig:
    return LabelConfig(**{"data": ("tars",), "detector": "owl", **changes})


def test_a_configuration_survives_json_and_unknown_fields_are_refused(tmp_path: Path) -> None:
    config = configure(filters=FilterConfig(nms_iou=0.3), captions=CaptionConfig(existing_text="alt-text"))
    assert from_json(LabelConfig, to_json(config), "x.json") == config
    content = json.loads(to_json(config))
    for place in (content, content["filters"], content["captions"]):
        place["typo"] = 1
        with pytest.raises(ValueError, match="typo"):
            from_json(LabelConfig, json.dumps(content), "x.json")
        del place["typo"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ()}, "data must name"),
        ({"name": "a/b"}, "plain word"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_phrases": 0}, "max_phrases"),
        ({"resolution": 2000}, "image_px must be at least"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(**change)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"batch_size": 3, "device": "cuda:1"}, True),
        ({"captions": CaptionConfig(concurrency=3, timeout_s=1)}, True),
        ({"detector": "other"}, False),
        ({"filters": FilterConfig(score=0.2)}, False),
        ({"phrases": "n-grams"}, False),
        ({"captions": CaptionConfig(prompt="What?")}, False),
        ({"precision": "fp32"}, False),
    ],
)
def test_only_what_decides_the_labels_is_hashed(change: dict, same: bool) -> None:
    assert (config_hash(configure()) == config_hash(configure(**change))) is same


def test_a_caption_servers_address_is_not_hashed_where_the_model_is_named(tmp_path: Path) -> None:
    def hash_of(**captions) -> str:
        return config_hash(configure(captions=CaptionConfig(**captions)))

    assert hash_of(captioner="http://a/v1", server_model="m") == hash_of(captioner="http://b/v1", server_model="m")
    assert hash_of(captioner="http://a/v1", server_model="m") != hash_of(captioner="http://a/v1", server_model="n")
    assert hash_of(captioner="http://a/v1") != hash_of(captioner="http://b/v1")


def test_the_manifest_refuses_labels_of_another_recipe_and_says_what_differs(tmp_path: Path) -> None:
    config = configure()
    write_manifests(config, [str(tmp_path)])
    manifest = json.loads((tmp_path / "vesl_manifest.json").read_text())
    assert from_json(LabelConfig, json.dumps(manifest["config"]), "manifest") == config
    assert set(manifest["versions"]) >= {"opencloc", "torch", "transformers"}
    write_manifests(configure(batch_size=2), [str(tmp_path)])
    write_manifests(configure(name="other", precision="fp32"), [str(tmp_path)])
    with pytest.raises(ValueError, match=r"another configuration") as caught:
        write_manifests(configure(filters=FilterConfig(score=0.3), precision="fp32"), [str(tmp_path)])
    assert "precision: 'auto' there, 'fp32' now" in str(caught.value)
    assert "filters.score: 0.1 there, 0.3 now" in str(caught.value)


def test_no_password_or_key_of_an_address_is_written_down(tmp_path: Path) -> None:
    config = configure(
        data=("https://user:PASSWORD@host/0.tar?X-Amz-Signature=PASSWORD",),
        detector="FILE.py:factory?api_key=PASSWORD",
    )
    write_manifests(config, [str(tmp_path)])
    assert "PASSWORD" not in (tmp_path / "vesl_manifest.json").read_text()
    assert "PASSWORD" not in Shard(source=config.data[0], sidecar="x").label
