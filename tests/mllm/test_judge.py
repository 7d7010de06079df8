"""Ferret-Bench: its forms, and a judge behind a real server on this machine, which also misbehaves."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opencloc.boxes import Letterbox
from opencloc.chat_server import ServerError
from opencloc.cli import main
from opencloc.errors import BadSample
from opencloc.eval.sets.ferret_bench import CATEGORIES, ferret_bench
from opencloc.mllm.boxes_text import box_text
from opencloc.mllm.evaluate import MllmEvalConfig, interview
from opencloc.mllm.judge import (
    Case,
    Judge,
    JudgeConfig,
    answer_for_judge,
    answers_file,
    default_instruction,
    ferret_answer,
    instructions,
    judged_text,
    pointed_question,
    read_points,
)
from opencloc.model.prompts import Box
from tests.mllm.speakers import Parrot, tiny_model

Say = Callable[[dict[str, Any]], "tuple[int, Any]"]


class Server(ThreadingHTTPServer):
    """Answers each question as `say` does: (status, text of the answer or JSON)."""

    def __init__(self, say: Say) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.say = say
        self.questions: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "judge-1"}]})

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.questions.append(question)
        status, said = self.server.say(question)
        body = {"choices": [{"message": {"role": "assistant", "content": said}}]} if isinstance(said, str) else said
        self._send(status, body)

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Say], Server]]:
    started: list[tuple[Server, threading.Thread]] = []

    def start(say: Say) -> Server:
        server = Server(say)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join()


def case(number: int = 1, **fields: Any) -> Case:
    known = {
        "question_id": number,
        "category": "refer_reason",
        "image": "photos/1.jpg",
        "question": "What is it?",
        "context": "Objects: a dog.",
        "reference": "A dog.",
        "answer": f"Answer {number} at [1, 2, 3, 4].",
    }
    return Case(**known | fields)


def judge_at(server: Server, **settings: Any) -> Judge:
    return Judge(JudgeConfig(judge=server.url, judge_retries=0, **settings))


# -- forms -------------------------------------------------------------------------------------------------------------


def test_boxes_of_a_question_become_regions() -> None:
    text, boxes = pointed_question("What are [0.1, 0.2, 0.300, 1.002] and [0.5, 0.5, 0.6, 0.7]? Not [1, 2] or [x].")
    assert text == "What are {region:0} and {region:1}? Not [1, 2] or [x]."
    assert boxes == (Box(0.1, 0.2, 0.3, 1.0), Box(0.5, 0.5, 0.6, 0.7))


@pytest.mark.parametrize("size", [(640, 480), (300, 500), (400, 400)])
def test_boxes_of_an_answer_move_from_the_square_to_ferrets_numbers_of_the_image(size: tuple[int, int]) -> None:
    letterbox = Letterbox(width_px=size[0], height_px=size[1])
    box = np.array([0.25, 0.1, 0.75, 0.9])
    said = f"The dog {box_text(letterbox.to_square(box).tolist())} runs [1, 2]."
    text = ferret_answer(said, letterbox)
    assert text.startswith("The dog [")
    assert text.endswith("] runs [1, 2].")
    numbers = [int(n) for n in text[text.index("[") + 1 : text.index("]")].split(",")]
    assert np.allclose(numbers, 1000 * box, atol=2.5)  # both forms are of whole numbers


def test_the_judge_sees_places_only_where_places_are_asked_for() -> None:
    said = "A dog [100, 200, 300, 1000] and [7]."
    assert answer_for_judge(said, "refer_reason") == "A dog and."
    assert answer_for_judge(said, "refer_caption") == "A dog and."
    assert answer_for_judge(said, "ground_conv") == "A dog [0.100, 0.200, 0.300, 1.000] and."


@pytest.mark.parametrize(
    ("said", "points"),
    [
        ("8 7\nBoth are good.", (8, 7)),
        ("8.5, 10", (8.5, 10)),
        ("  9   1  \nwhy", (9, 1)),
        ("Assistant 1: 8, Assistant 2: 7", None),
        ("8", None),
        ("8 7 6", None),
        ("0 11", None),
        ("", None),
    ],
)
def test_points_are_two_numbers_on_the_first_line_and_nothing_else(said: str, points: Any) -> None:
    assert read_points(said) == points


def test_answers_are_written_as_ferrets_own_evaluation_reads_them() -> None:
    rows = [json.loads(line) for line in answers_file([case(1), case(2)]).splitlines()]
    assert rows[1] == {
        "question_id": 2,
        "image_path": "1.jpg",
        "prompt": "What is it?",
        "text": "Answer 2 at [1, 2, 3, 4].",
    }


def test_the_sets_own_rules_are_used_where_they_lie(tmp_path: Path) -> None:
    assert instructions(str(tmp_path)) == {c: default_instruction(c) for c in CATEGORIES}
    rules = {
        name: {"role": "Assistant", "prompt": f"rule of {name}"}
        for name in ("refer_desc", "refer_reason", "ground_conv")
    }
    (tmp_path / "rule.json").write_text(json.dumps(rules))
    assert instructions(str(tmp_path))["refer_caption"] == "rule of refer_desc"
    (tmp_path / "rule.json").write_text("{}")
    with pytest.raises(ValueError, match=r"rule\.json: not Ferret-Bench's rules"):
        instructions(str(tmp_path))


# -- the judge ---------------------------------------------------------------------------------------------------------


def test_each_case_gets_the_points_of_its_own_answer(serve: Callable[[Say], Server]) -> None:
    server = serve(lambda q: (200, f"10 {q['messages'][1]['content'].split('Answer ')[1][0]}\nbecause"))
    judge = judge_at(server, judge_concurrency=4)
    assert judge.name == "judge-1"
    assert judge.points([case(i) for i in range(1, 8)], ["Rate them."] * 7) == [(10, i) for i in range(1, 8)]
    asked = next(q for q in server.questions if "Answer 3" in q["messages"][1]["content"])
    assert asked["messages"][1]["content"] == judged_text(case(3), "Rate them.")
    assert asked["temperature"] == 0
    judge.close()


def test_what_the_judge_does_not_answer_is_counted_and_what_fails_for_all_ends_the_run(
    serve: Callable[[Say], Server],
) -> None:
    def say(question: dict[str, Any]) -> tuple[int, Any]:
        number = question["messages"][1]["content"].split("Answer ")[1][0]
        return {"1": (200, "I like both."), "2": (400, {"error": "too long"}), "3": (500, {})}.get(number, (200, "5 5"))

    judge = judge_at(serve(say))
    found = judge.points([case(i) for i in range(1, 5)], [""] * 4)
    reasons = [one.reason if isinstance(one, BadSample) else one for one in found]
    assert reasons == ["judge gave no points", "judge refused the question", "judge failed", (5, 5)]
    judge.close()
    locked = judge_at(serve(lambda _: (401, {"error": "no key"})))
    with pytest.raises(ServerError, match=r"judge http.*the key is read from \$OPENAI_API_KEY"):
        locked.points([case()], [""])
    locked.close()


# -- from files to scores ----------------------------------------------------------------------------------------------


def bench(folder: Path) -> str:
    """Two photos with three questions of each category, in the set's own files."""
    (folder / "images").mkdir()
    for i, size in enumerate([(60, 40), (40, 60)]):
        Image.new("RGB", size, (40 * i, 90, 10)).save(folder / f"images/{i}.jpg")
    for category in CATEGORIES:
        rows = [
            {
                "question_id": n,
                "image": f"{n % 2}.jpg",
                "category": category,
                "text": f"What is [0.1, 0.2, 0.5, 0.{n}]?",
            }
            for n in (5, 6, 7)
        ]
        for name, text in (("question", None), ("answer", "A reference."), ("context", "Objects: a dog.")):
            lines = [json.dumps(row | ({"text": text} if text else {})) for row in rows]
            (folder / category).mkdir(exist_ok=True)
            (folder / category / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_the_ratio_is_of_sums_and_unjudged_answers_are_counted(serve: Callable[[Say], Server], tmp_path: Path) -> None:
    server = serve(
        lambda q: (
            200,
            {"0.5]": "10 5", "0.6]": "5 5", "0.7]": "?"}[
                q["messages"][1]["content"].split("[Question]")[1].split(", ")[3][:4]
            ],
        )
    )
    data = ferret_bench(bench(tmp_path), category="ground_conv")
    config = MllmEvalConfig(
        model=("m",), data=("d",), tasks=("ferret-bench",), judge=server.url, out=str(tmp_path / "out"), resamples=50
    )
    judge = Judge(config)
    answer = "It is a dog [0, 0, 999, 999]."
    (result,), answers = interview(
        Parrot(lambda _: answer),
        "p/1",
        data,
        ["ferret-bench"],
        names={},
        config=config,
        judge=judge,
        location=str(tmp_path),
    )
    judge.close()
    values = {key: score.value for key, score in result.scores.items()}
    assert values == pytest.approx({"ratio": 10 / 15, "points": 0.5, "reference_points": 0.75})
    assert result.skipped == {"texts": {"judge gave no points": 1}}
    assert "judged by judge-1, by our wording" in result.rules
    assert sorted(row["question_id"] for row in answers if "points" in row) == [5, 6]
    written = [
        json.loads(line) for line in (tmp_path / "out/ferret-bench/p-1/ground_conv.jsonl").read_text().splitlines()
    ]
    assert {row["question_id"] for row in written} == {5, 6, 7}
    assert all(row["text"] == "It is a dog [0, 0, 1000, 1000]." for row in written)


def test_the_verb_judges_all_categories_with_the_sets_own_rules(
    serve: Callable[[Say], Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda _: (200, "8 4"))
    location = bench(tmp_path)
    rules = {name: {"prompt": f"rule of {name}"} for name in ("refer_desc", "refer_reason", "ground_conv")}
    (tmp_path / "rule.json").write_text(json.dumps(rules))
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "run/model")
    processor.save_pretrained(tmp_path / "run/model")
    places = [f"ferret-bench={location}?category={category}" for category in CATEGORIES]
    command = ["mllm", "eval", "ferret-bench", "--model", str(tmp_path / "run/model"), "--data", *places]
    more = ["--judge", server.url, "--caption-tokens", "4", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*command, *more]) == 0
    assert "judged by judge-1, by its own rules" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())["run"]
    assert {metrics[f"ferret-bench {category} ratio"] for category in CATEGORIES} == {0.5}
    told = {q["messages"][1]["content"].split("[System]\n")[1].strip() for q in server.questions}
    assert told == {f"rule of {name}" for name in rules}
    assert len(server.questions) == 9
    assert sorted(path.name for path in (tmp_path / "out/ferret-bench/run").iterdir()) == [
        "ground_conv.jsonl",
        "refer_caption.jsonl",
        "refer_reason.jsonl",
    ]


def test_without_a_judge_the_answers_are_written_and_nothing_is_scored(tmp_path: Path) -> None:
    seen: list[Any] = []
    config = MllmEvalConfig(model=("m",), data=("d",), tasks=("ferret-bench",), out=str(tmp_path / "out"))
    data = ferret_bench(bench(tmp_path), category="refer_reason")
    (result,), _ = interview(
        Parrot(lambda c: seen.append(c.prompts) or "hm"), "p", data, ["ferret-bench"], names={}, config=config
    )
    assert result.scores == {}
    assert result.images == 2
    assert (Box(0.1, 0.2, 0.5, 0.7),) in seen
    assert (tmp_path / "out/ferret-bench/p/refer_reason.jsonl").is_file()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("question", "{", "line 1: not JSON"),
        ("question", "[]", "line 1: expected an object"),
        ("question", "", "no questions"),
        ("question", '{"question_id": 1, "image": "0.jpg", "text": "?"}', "question 1 is without an answer"),
        ("question", '{"question_id": 5, "image": "9.jpg", "text": "?"}', "without a context of 9.jpg"),
        ("answer", '{"question_id": "5", "text": "?"}', "question_id must be int"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(file: str, text: str, message: str, tmp_path: Path) -> None:
    location = bench(tmp_path)
    path = tmp_path / f"refer_reason/{file}.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        ferret_bench(location)
    assert str(path) in str(caught.value)
