"""What answers say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencloc.mllm.verdicts import bare_name, named, says_yes


@pytest.mark.parametrize(
    ("answer", "names", "expected"),
    [
        ("It is a dog.", ("dog", "cat"), [0]),
        ("a cat", ("dog", "cat"), [1]),
        ("a DOG and a cat", ("dog", "cat"), [0, 1]),
        ("two dogs, three glasses", ("dog", "glass"), [0, 1]),
        ("a hot dog", ("dog", "hot dog"), [1]),  # the longest name takes its place
        ("a hot dog and a dog", ("dog", "hot dog"), [0, 1]),
        ("doghouse, bulldog", ("dog",), []),  # whole words
        ("traffic  light", ("traffic light",), [0]),
        ("an é", ("É",), [0]),
        ("c++ (new)", ("c++",), [0]),
        ("a dog", (), []),
        ("a dog", ("",), []),
    ],
)
def test_names_in_an_answer(answer: str, names: tuple[str, ...], expected: list[int]) -> None:
    assert named(answer, names) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", True),
        ("Yes, there is a dog.", True),
        ("No.", False),
        ("There is not one.", False),
        ("no, not one", False),
        ("yes and no", None),
        ("There is a dog", None),
        ("There is a dog. Yes", None),  # the first sentence counts
        ("yesterday, nothing", None),
        ("", None),
    ],
)
def test_yes_or_no(answer: str, expected: bool | None) -> None:
    assert says_yes(answer) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("A Dog.", "dog"), ("the  dog", "dog"), ("an apple [1, 2, 3, 4]", "apple"), ("theatre", "theatre"), ("", "")],
)
def test_a_name_is_bare_without_article_full_stop_and_box(answer: str, expected: str) -> None:
    assert bare_name(answer) == expected


@given(st.text(), st.lists(st.text(max_size=8), max_size=4))
def test_any_text_can_be_read(answer: str, names: list[str]) -> None:
    found = named(answer, names)
    assert found == sorted(set(found))
    assert says_yes(answer) in (True, False, None)
    assert bare_name(answer) == bare_name(f" {answer}.")
