"""Broken inputs from sound ones: bytes, JSON and single odd values, all drawn from a seeded `random.Random`."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

DEEP = "\0deep"  # a place in JSON that becomes 100,000 nested lists
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, -1e308, 10**12, 2**31, 2**63, -(2**63), 10**400,
    float("nan"), float("inf"), float("-inf"), "", " ", "0", "nan", "\0", "\ud800", "a\udfffb", "é\u0301\u202e",
    "../../../etc/passwd", "/", ".", "x" * 5000, "::", "a\nb", "<script>", [], {}, [[]], [None], [1, 2], {"a": 1},
    [[0, 0, 1, 1]], "<end>", DEEP,
]  # fmt: skip


def broken_bytes(data: bytes, rng: Random) -> bytes:
    """The bytes after one to three faults: bits flipped, parts cut out, doubled, emptied, or of another file."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = rng.randrange(len(data) + 1)
        length = rng.choice((1, 2, 4, 8, 64, 512, len(data)))
        part = data[start : start + length]
        new = rng.choice(
            (
                bytes(byte ^ 1 << rng.randrange(8) for byte in part),
                b"",
                part * rng.choice((2, 3, 50)),
                bytes(len(part)),
                b"\xff" * len(part),
                rng.randbytes(len(part)),
                part + rng.randbytes(min(length, 512)),
            )
        )
        data = data[:start] + new + data[start + length :]
        if rng.random() < 0.15:
            data = data[: rng.randrange(len(data) + 1)]
    return data


def broken_json(value: Any, rng: Random) -> bytes:
    """JSON of a value after one to three faults: odd values, missing, doubled and swapped parts, broken text."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _places(value)
        if not places:
            break
        parent, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(parent[key]))
            case 1:
                parent[f"{key}2"] = parent[key]
            case 2:
                parent[key] = [parent[key]]
            case 3:
                parent[key] = str(parent[key])
            case 4:
                other, place = rng.choice(places)
                parent[key] = copy.deepcopy(other[place])
            case 5 if type(parent[key]) in (int, float):
                parent[key] *= rng.choice((-1, 0, 2, 0.5, 1e6, 1e300))
            case _:
                parent[key] = copy.deepcopy(rng.choice(ODD))
    if rng.random() < 0.03:
        value = rng.choice((None, [], {}, 3, "text", [value], {"a": value}))
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7).replace('"\\u0000deep"', "[" * 100_000 + "]" * 100_000)
    data = text.encode(errors="surrogatepass")
    return broken_bytes(data, rng) if rng.random() < 0.15 else data


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]
