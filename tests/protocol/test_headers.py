"""A call's identity in headers: any name survives, no hint can do harm."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol.strategies import identities

from maestro_agents.protocol import CallIdentity

GOLDEN = Path(__file__).parent / "golden" / "headers.json"
HEADER_SAFE = set(string.ascii_letters + string.digits + "/@:._-~%")
NAMES = ("run", "workflow", "stage", "instance", "conversation")


def test_the_headers_are_the_committed_ones() -> None:
    identity = CallIdentity(
        run="0197-run",
        workflow="research-team@0123456789ab",
        stage="forschung/Prüfer 1",
        instance=3,
        conversation="thread:42",
    )
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert identity.headers() == golden
    assert CallIdentity.from_headers(golden) == (identity, ())


@given(identities)
def test_an_identity_survives_its_headers(identity: CallIdentity) -> None:
    headers = identity.headers()
    assert all(set(value) <= HEADER_SAFE for value in headers.values())
    assert CallIdentity.from_headers(headers) == (identity, ())


def test_no_identity_makes_no_headers() -> None:
    assert CallIdentity().headers() == {}
    assert CallIdentity.from_headers({"content-type": "x"}) == (CallIdentity(), ())


@given(st.dictionaries(st.sampled_from([f"x-maestro-{n}" for n in NAMES]), st.text(max_size=300)))
def test_no_header_can_fail_a_request(headers: dict[str, str]) -> None:
    identity, bad = CallIdentity.from_headers(headers)
    assert set(bad) <= set(headers)
    assert CallIdentity.from_headers(identity.headers())[1] == ()


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("run", ""),
        ("run", "r" * 257),
        ("stage", "%20" * 257),
        ("instance", "-1"),
        ("instance", "1.5"),
        ("instance", "²"),
        ("instance", "9" * 10),
    ],
)
def test_a_bad_hint_counts_as_missing_and_is_named(header: str, value: str) -> None:
    good: dict[str, Any] = {"x-maestro-conversation": "c"}
    identity, bad = CallIdentity.from_headers({**good, f"x-maestro-{header}": value})
    assert identity == CallIdentity(conversation="c")
    assert set(bad) == {f"x-maestro-{header}"}
