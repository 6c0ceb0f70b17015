"""The node's account of bytes: it never promises what is not there, and says what would fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from maestro_backend.node._ledger import Expected, Ledger
from maestro_backend.scheduler import DeviceInfo, Residency, WorkerInfo, WorkerState
from maestro_backend.workers import Account, DoesNotFitError, Memory

GIB = 1024**3
CPU = "cpu"
MODELS = st.sampled_from("abcd")
SIZES = st.integers(0, 60)


def ledger(capacity: int = GIB, host: int = 0, *workers: WorkerInfo) -> Ledger:
    return Ledger((DeviceInfo(CPU, capacity),), host, lambda: workers)


def worker(model: str, **changes: object) -> WorkerInfo:
    settled = {"state": WorkerState.READY, "residency": Residency.DEVICE, "device": CPU}
    return WorkerInfo(worker=model, node="here", model=model, **{**settled, **changes})  # type: ignore[arg-type]


class Bookkeeping(RuleBasedStateMachine):
    """Random holds and releases against a plain model of what each of them should hold."""

    devices = (DeviceInfo("cuda:0", 100), DeviceInfo("cuda:1", 70))
    host = 80

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.devices, self.host)
        self.held: dict[str, tuple[str, int]] = {}
        self.copies: dict[str, int] = {}

    @rule(model=MODELS, device=st.sampled_from(devices), parts=st.tuples(SIZES, SIZES, SIZES))
    def hold(self, model: str, device: DeviceInfo, parts: tuple[int, int, int]) -> None:
        others = sum(n for m, (d, n) in self.held.items() if d == device.device and m != model)
        fits = others + sum(parts) <= device.capacity_bytes
        if fits:
            self.ledger.hold(model, device.device, Memory(*parts))
            self.held[model] = device.device, sum(parts)
        else:
            with pytest.raises(DoesNotFitError):
                self.ledger.hold(model, device.device, Memory(*parts))

    @rule(model=MODELS, size=SIZES)
    def hold_host(self, model: str, size: int) -> None:
        others = sum(n for m, n in self.copies.items() if m != model)
        if others + size <= self.host:
            self.ledger.hold_host(model, size)
            self.copies[model] = size
        else:
            with pytest.raises(DoesNotFitError):
                self.ledger.hold_host(model, size)

    @rule(model=MODELS)
    def release(self, model: str) -> None:
        self.ledger.release(model)
        self.held.pop(model, None)
        self.copies.pop(model, None)

    @invariant()
    def adds_up(self) -> None:
        for device in self.devices:
            held = sum(n for d, n in self.held.values() if d == device.device)
            assert held <= device.capacity_bytes
            assert self.ledger.free_bytes(device.device) == device.capacity_bytes - held
        for model in "abcd":
            others = sum(n for m, n in self.copies.items() if m != model)
            assert self.ledger.host_room(model) == self.host - others >= 0


TestBookkeeping = Bookkeeping.TestCase


def test_it_is_the_account_of_the_workers() -> None:
    account: Account = ledger()
    account.release("nobody")


@given(first=SIZES, second=SIZES)
def test_a_claim_replaces_the_one_before(first: int, second: int) -> None:
    books = ledger(60)
    for size in (first, second):
        books.hold("a", CPU, Memory(size, 0, 0))
        assert books.free_bytes(CPU) == 60 - size


def test_a_refusal_changes_nothing() -> None:
    books = ledger(100, 10)
    books.hold("a", CPU, Memory(40, 0, 0))
    books.hold("b", CPU, Memory(30, 0, 0))
    books.hold_host("a", 7)
    with pytest.raises(DoesNotFitError):
        books.hold("b", CPU, Memory(61, 0, 0))
    with pytest.raises(DoesNotFitError):
        books.hold_host("b", 4)
    assert books.free_bytes(CPU) == 30
    assert (books.host_room("b"), books.host_room("a")) == (3, 10)


def test_what_is_measured_counts_where_it_is_more_than_what_was_promised() -> None:
    books = ledger(100)
    books.hold("a", CPU, Memory(30, 0, 10))
    books.measured("a", books.held["a"], 20)
    assert books.free_bytes(CPU) == 60
    books.measured("a", books.held["a"], 55)
    assert books.free_bytes(CPU) == 45
    with pytest.raises(DoesNotFitError, match="measured"):
        books.hold("b", CPU, Memory(50, 0, 0))
    books.hold("b", CPU, Memory(45, 0, 0))


def test_a_measurement_from_before_a_change_does_not_count() -> None:
    """A suspend has freed the weights: what was measured with them says nothing any more."""
    books = ledger(100)
    books.hold("a", CPU, Memory(60, 0, 10))
    before = books.held["a"]
    books.measured("a", before, 75)
    books.hold("a", CPU, Memory(0, 0, 10))
    assert books.free_bytes(CPU) == 90
    books.measured("a", before, 75)  # it was under way
    assert books.free_bytes(CPU) == 90
    books.release("a")
    books.measured("a", before, 75)
    assert books.free_bytes(CPU) == 100


def test_a_claim_may_always_shrink() -> None:
    """Even on a device of which more is taken than there is."""
    books = ledger(100)
    books.hold("a", CPU, Memory(40, 0, 0))
    books.hold("b", CPU, Memory(40, 10, 10))
    books.measured("a", books.held["a"], 70)
    assert books.free_bytes(CPU) == -30
    books.hold("b", CPU, Memory(40, 0, 10))
    with pytest.raises(DoesNotFitError):
        books.hold("b", CPU, Memory(40, 10, 10))


def test_what_others_take_of_a_device_is_not_given_away() -> None:
    books = ledger(100)
    books.measured_outside(CPU, 30)
    with pytest.raises(DoesNotFitError, match="other programs"):
        books.hold("a", CPU, Memory(71, 0, 0))
    books.measured_outside(CPU, 0)
    books.hold("a", CPU, Memory(71, 0, 0))


def test_who_has_not_told_yet_counts_as_his_most_for_all_but_those_who_tell() -> None:
    """Until it is supervised, what it takes is measured as an outsider's."""
    books = ledger(100, 10)
    books.expect("a", Expected(CPU, 40, 6))
    books.expect("b", Expected(CPU, 50, 5))
    books.measured_outside(CPU, 88)
    assert (books.free_bytes(CPU), books.host_room("new")) == (10, 0)
    with pytest.raises(DoesNotFitError, match=r"a 0\.00 GiB, b 0\.00 GiB"):
        books.hold("new", CPU, Memory(11, 0, 0))
    books.hold("a", CPU, Memory(20, 0, 10))
    books.hold_host("a", 10)
    books.hold("b", CPU, Memory(70, 0, 0))
    books.measured_outside(CPU, 0)
    assert books.free_bytes(CPU) == 100 - 40 - 70
    books.known("a")
    assert books.free_bytes(CPU) == 100 - 30 - 70
    books.known("b")
    books.known("b")
    assert (books.free_bytes(CPU), books.host_room("new")) == (0, 0)


def refusal(books: Ledger, memory: Memory, model: str = "new") -> str:
    with pytest.raises(DoesNotFitError) as raised:
        books.hold(model, CPU, memory)
    return str(raised.value)


def test_a_refusal_has_the_numbers() -> None:
    books = ledger(4 * GIB)
    books.hold("a", CPU, Memory(2 * GIB, GIB, 0))
    text = refusal(books, Memory(GIB, GIB // 2, GIB // 4))
    assert text.startswith("does not fit yet: new needs 1.75 GiB")
    for words in ("KV 0.50 GiB", "residual 0.25 GiB", "1.00 GiB free of 4.00 GiB", "a 3.00 GiB"):
        assert words in text


def test_a_refusal_names_what_would_do() -> None:
    both = {"weights_bytes": 2 * GIB, "kv_limit_bytes": GIB, "kv_floor_bytes": GIB // 2}
    everywhere = (Residency.DEVICE, Residency.HOST, Residency.PARKED)
    books = ledger(
        8 * GIB,
        0,
        worker("big", **both, elastic=True, tiers=everywhere),
        worker("small", weights_bytes=GIB, kv_limit_bytes=GIB),
        worker("elsewhere", weights_bytes=8 * GIB, device="cuda:0"),
        worker("new", state=WorkerState.STOPPED),
    )
    books.hold("big", CPU, Memory(2 * GIB, GIB, GIB))
    books.hold("small", CPU, Memory(GIB, GIB, GIB))
    short_of_little = refusal(books, Memory(GIB, GIB, GIB // 4))  # 1 GiB is free
    assert "shrink" not in short_of_little
    assert "suspend big" in short_of_little
    assert "stop big" in short_of_little
    assert "kv_memory" not in short_of_little
    with_less_kv = refusal(books, Memory(GIB // 4, GIB, GIB // 4))  # short of half a GiB
    assert "shrink the KV limit of big" in with_less_kv
    assert "a kv_memory of at most 0.50 GiB" in with_less_kv
    short_of_much = refusal(books, Memory(5 * GIB, GIB, GIB))
    assert "suspend" not in short_of_much
    assert "stop big and small" in short_of_much
    hopeless = refusal(books, Memory(20 * GIB, GIB, GIB))
    assert "stop" not in hopeless and "raise the memory of the node" in hopeless


def test_a_suspended_model_is_not_told_to_be_suspended() -> None:
    tiers = (Residency.DEVICE, Residency.HOST)
    suspended = worker("a", state=WorkerState.SUSPENDED, weights_bytes=GIB, tiers=tiers)
    books = ledger(2 * GIB, 0, suspended)
    books.hold("a", CPU, Memory(0, GIB, GIB))
    assert "suspend" not in refusal(books, Memory(GIB, 0, 0))


def test_a_refusal_of_the_host_budget_names_who_has_it() -> None:
    books = ledger(GIB, 3 * GIB)
    books.hold_host("a", 2 * GIB)
    with pytest.raises(DoesNotFitError) as raised:
        books.hold_host("b", 2 * GIB)
    for words in ("copy of b", "1.00 GiB free of 3.00 GiB", "a 2.00 GiB", "host_memory"):
        assert words in str(raised.value)


@pytest.mark.parametrize("elastic", [True, False])
def test_the_kv_cache_counts_among_what_a_suspend_frees(elastic: bool) -> None:
    everywhere = (Residency.DEVICE, Residency.HOST, Residency.PARKED)
    sizes = {"weights_bytes": GIB, "kv_limit_bytes": 2 * GIB, "tiers": everywhere}
    books = ledger(4 * GIB, 0, worker("a", **sizes, kv_floor_bytes=2 * GIB, elastic=elastic))
    books.hold("a", CPU, Memory(GIB, 2 * GIB, 0))
    assert "suspend a" in refusal(books, Memory(3 * GIB, 0, 0))


def test_what_a_suspended_model_holds_cannot_be_shrunk() -> None:
    """It may be less than the floor, or more: either way it is in use."""
    for held in (0, GIB // 2, 2 * GIB):
        sizes = {"elastic": True, "kv_floor_bytes": GIB, "kv_limit_bytes": held}
        aside = worker("aside", state=WorkerState.SUSPENDED, residency=Residency.HOST, **sizes)
        here = worker("here", **{**sizes, "kv_limit_bytes": 2 * GIB})
        books = ledger(4 * GIB, 0, aside, here)
        books.hold("aside", CPU, Memory(0, held, 0))
        books.hold("here", CPU, Memory(0, 2 * GIB, 0))
        free = 2 * GIB - held
        assert "shrink the KV limit of here;" in refusal(books, Memory(free + GIB, 0, 0))
        assert "shrink" not in refusal(books, Memory(free + GIB + 1, 0, 0))
