import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from opencloc.cli import main
from opencloc.data.scenes.scenes import SceneConfig, write_scenes
from tests.search.conftest import save_photos


def test_the_command_line_from_photos_to_an_answer(model: str, tmp_path: Path, capsys) -> None:
    photos = tmp_path / "<b>photos & more</b>"
    first, *_ = save_photos(photos, 3)
    out, html = str(tmp_path / "index"), str(tmp_path / "sheet.html")
    assert main(["index", str(photos), "--out", out, "--model", model, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == out
    assert lines[1].startswith("3 photos with ")
    asked = ["search", out, "a red dog", "pizza", "--minus", "snow", "--top", "2", "--html", html, "--device", "cpu"]
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == html
    assert "“a red dog” + “pizza” − “snow”" in shown
    sheet = Path(html).read_text()
    assert "&lt;b&gt;photos &amp; more" in sheet
    assert "<b>photos" not in sheet
    assert sheet.count("data:image/jpeg;base64,") == 2
    region = ["--image", str(first), "--box", "5", "6", "30", "31", "--json", "--device", "cpu"]
    assert main(["search", out, *region]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["query"] == "the region"
    assert len(answer["rows"]) == 3
    assert set(answer["rows"][0]) >= {"photo", "box_px", "score"}
    assert main(["search", out, "--image", str(first), "--box", "5", "6", "300", "31", "--device", "cpu"]) == 1
    assert "outside" in capsys.readouterr().err
    assert main(["search", out, "--device", "cpu"]) == 1
    assert "query is empty" in capsys.readouterr().err
    assert main(["search", out, "dog", "--after", "yesterday", "--device", "cpu"]) == 1
    assert "not a day" in capsys.readouterr().err


def test_nothing_found_is_said_with_the_best_score(index: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("opencloc.search.query.FOUND", 1.0)
    assert main(["search", index, "a red dog", "--device", "cpu"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("Nothing found for “a red dog” in 8 photos: the best score is ")


def test_embeddings_as_parquet_equal_the_predictors(model: str, tmp_path: Path, capsys) -> None:
    from opencloc.data.sources.spec import open_source
    from opencloc.model.predictor import load

    write_scenes(SceneConfig(mode="easy"), 3, str(tmp_path / "scenes"), 3)
    out = str(tmp_path / "e.parquet")
    assert main(["embed", str(tmp_path / "scenes"), "--out", out, "--model", model, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == out
    table = pq.read_table(out)
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[24]"
    rows = table.to_pylist()
    predictor, source = load(model), open_source(str(tmp_path / "scenes"))
    assert [row["key"] for row in rows if row["region"] == -1] == [source[i].key for i in range(3)]
    for number in range(3):
        sample = source[number]
        encoded = predictor.encode(sample.image)
        own = [row for row in rows if row["key"] == sample.key]
        assert own[0]["embedding"] == pytest.approx(encoded.features.embedding[0].tolist(), abs=1e-5)
        assert [row["text"] for row in own] == [None, *sample.texts]
        width, height = sample.image.size
        expected = predictor.embed(encoded, boxes_px=sample.boxes * [width, height, width, height]).tolist()
        for row, vector, box in zip(own[1:], expected, sample.boxes.tolist(), strict=True):
            assert row["embedding"] == pytest.approx(vector, abs=1e-4)
            assert row["box"] == pytest.approx(box)


def test_a_failed_embedding_leaves_the_file_that_was_there(model: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no image")
    out = tmp_path / "e.parquet"
    out.write_bytes(b"earlier")
    arguments = ["embed", str(tmp_path / "photos"), "--out", str(out), "--model", model, "--device", "cpu"]
    assert main(arguments) == 1
    assert "no image can be used" in capsys.readouterr().err
    assert out.read_bytes() == b"earlier"
    half = [*arguments, "--dtype", "float16", "--regions", "grid"]
    save_photos(tmp_path / "photos", 1)
    assert main(half) == 0
    assert "skipped: broken image (1)" in capsys.readouterr().out
    assert pq.read_table(out).schema.field("embedding").type.value_type == "halffloat"
