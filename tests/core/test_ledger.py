"""The account of a load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplug.errors import LoadError
from quantplug.ledger import Ledger


def test_a_tensor_is_claimed_by_one_owner_only() -> None:
    ledger = Ledger()
    ledger.claim("a.qweight", "a")
    ledger.claim("a.qweight", "a")
    with pytest.raises(LoadError, match=r"a\.qweight: claimed by b and by a; expected exactly one module") as raised:
        ledger.claim("a.qweight", "b")
    assert raised.value.code == "QP-LOAD-CLAIM"


def test_a_parameter_that_is_partly_written_is_reported_with_its_open_elements() -> None:
    ledger = Ledger()
    ledger.expect("a.qweight", (4, 6))
    ledger.write("a.qweight", ((0, 2), (0, 6)))
    with pytest.raises(LoadError, match=r"a\.qweight \(12 of 24 elements\)") as raised:
        ledger.close("a")
    assert raised.value.code == "QP-LOAD-UNFILLED"
    ledger.write("a.qweight", ((2, 4), (0, 6)))
    ledger.close("a")
    ledger.close()


def test_writing_an_element_twice_is_an_error_that_names_both_boxes() -> None:
    ledger = Ledger()
    ledger.expect("a.qweight", (4, 6))
    ledger.write("a.qweight", ((0, 2), (0, 6)))
    with pytest.raises(LoadError, match=r"\[1:3, 0:3\] was written over \[0:2, 0:6\]") as raised:
        ledger.write("a.qweight", ((1, 3), (0, 3)))
    assert raised.value.code == "QP-LOAD-OVERLAP"


@pytest.mark.parametrize("box", [((0, 5),), ((-1, 2), (0, 6)), ((0, 4), (0, 7)), ((3, 2), (0, 6))])
def test_writing_outside_a_parameter_is_an_error(box: tuple[tuple[int, int], ...]) -> None:
    ledger = Ledger()
    ledger.expect("a", (4, 6))
    with pytest.raises(LoadError, match="inside"):
        ledger.write("a", box)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.randoms())
def test_any_order_of_disjoint_slices_fills_a_parameter_exactly(sizes: list[int], random: object) -> None:
    """One-dimensional writes take the neighbour shortcut; all permutations are accepted, no overlap is."""
    ledger = Ledger()
    ledger.expect("p", (sum(sizes),))
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    boxes = [((start, start + size),) for start, size in zip(starts, sizes, strict=True)]
    random.shuffle(boxes)  # type: ignore[attr-defined]
    for box in boxes:
        with pytest.raises(LoadError, match="never written"):
            ledger.close()
        ledger.write("p", box)
    ledger.close()
    for box in boxes:
        with pytest.raises(LoadError, match="written over"):
            ledger.write("p", box)
