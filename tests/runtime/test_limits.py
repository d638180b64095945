"""Limits of the system are recognised in whatever form a library reports them."""

from __future__ import annotations

import errno
import resource

import pytest

from attnseg.runtime import limits
from attnseg.runtime.errors import AttnsegError, ResourceError
from attnseg.runtime.limits import check_address_space, limit_reached, unforeseen


@pytest.mark.parametrize(
    ("error", "cause", "limit"),
    [
        (MemoryError(), "not enough memory", "ulimit -v"),
        (RuntimeError("std::bad_alloc"), "not enough memory", "ulimit -v"),
        (RuntimeError("Failed to allocate 62914560 bytes of memory"), "not enough", "ulimit -v"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough", "ulimit -v"),
        (ImportError("x.so: failed to map segment from shared object"), "not enough", "ulimit -v"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory", "ulimit -v"),
        (RuntimeError("can't start new thread"), "no further thread", "ulimit -u"),
        (RuntimeError("Resource temporarily unavailable"), "no further thread", "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "fork"), "no further thread", "ulimit -u"),
        (OSError(errno.EMFILE, "x"), "too many open files", "ulimit -n"),
        (OSError(errno.ENFILE, "x"), "too many open files", "ulimit -n"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_the_limit_and_how_to_raise_it_are_named(error: Exception, cause: str, limit: str) -> None:
    found = limit_reached(error)
    assert found is not None and cause in found.cause and limit in found.mend


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.ENOSPC, "full"), KeyError()])
def test_other_errors_are_of_no_limit(error: Exception) -> None:
    assert limit_reached(error) is None


def test_a_limit_is_found_behind_the_exception_that_it_caused() -> None:
    def wrapped() -> Exception:
        try:
            try:
                raise MemoryError
            except MemoryError as inner:
                raise ValueError("cannot serialise") from inner
        except ValueError as error:
            return error

    assert isinstance(limit_reached(wrapped()), ResourceError)


def test_an_unforeseen_error_names_type_and_place_and_keeps_the_exception() -> None:
    error = KeyError("x")
    found = unforeseen(error, "scan: ")
    assert type(found) is AttnsegError
    assert (str(found), found.__cause__) == ("scan: unexpected KeyError ('x')", error)
    assert str(unforeseen(MemoryError(), "scan: ")).startswith("scan: not enough memory; close")


@pytest.mark.parametrize(
    ("limit", "refused"),
    [(resource.RLIM_INFINITY, False), (2_000_000_000, False), (1_999_999_999, True)],
)
def test_an_address_space_below_the_least_is_refused_with_both_numbers(
    limit: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (limit, limit))
    if not refused:
        check_address_space(2_000_000_000, "it")
        return
    with pytest.raises(ResourceError) as caught:
        check_address_space(2_000_000_000, "it")
    assert str(caught.value) == (
        "it needs 2.0 GB of address space, the limit of this process is 2.00 GB; raise it with "
        "ulimit -v 1953125 or more"
    )


def test_where_the_system_has_no_limits_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "resource", None)
    check_address_space(1 << 60, "it")
