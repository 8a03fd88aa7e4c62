"""The error tree: three parts in every message, and a built-in base wherever callers already catch one."""

from __future__ import annotations

import pickle

import pytest

from septet import errors

SUBCLASSES = [getattr(errors, name) for name in errors.__all__ if name != "SeptetError"]


@pytest.mark.parametrize("kind", [errors.SeptetError, *SUBCLASSES])
def test_message_has_requirement_got_and_hint(kind: type[errors.SeptetError]) -> None:
    error = kind("slices must be multiples of 128 inputs", 96, "use 4 ranks")
    assert str(error) == "slices must be multiples of 128 inputs, got 96; use 4 ranks"
    assert (error.requirement, error.got, error.hint) == ("slices must be multiples of 128 inputs", 96, "use 4 ranks")


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_every_error_is_a_septet_error_and_survives_pickling(kind: type[errors.SeptetError]) -> None:
    assert issubclass(kind, errors.SeptetError)
    copy = pickle.loads(pickle.dumps(kind("a", "b", "c")))
    assert type(copy) is kind
    assert str(copy) == "a, got b; c"


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ShapeError, ValueError),
        (errors.CodeRangeError, ValueError),
        (errors.CheckpointError, ValueError),
        (errors.OptionError, ValueError),
        (errors.BackendUnavailableError, RuntimeError),
    ],
)
def test_builtin_bases(kind: type[errors.SeptetError], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)


@pytest.mark.parametrize("kind", [errors.SpecVersionError, errors.UnsupportedModelError])
def test_the_other_errors_are_no_value_errors(kind: type[errors.SeptetError]) -> None:
    assert not issubclass(kind, ValueError | RuntimeError)


def test_docstring_draws_the_whole_tree() -> None:
    drawn = [line for line in errors.__doc__.splitlines() if "──" in line]
    names = {line.split("── ")[1].split()[0] for line in drawn}
    assert names == {kind.__name__ for kind in SUBCLASSES}
    for line in drawn:
        kind = getattr(errors, line.split("── ")[1].split()[0])
        for builtin in (ValueError, RuntimeError):
            assert (f"({builtin.__name__})" in line) == issubclass(kind, builtin), line
