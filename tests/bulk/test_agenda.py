import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvblend_rag.bulk.agenda import Agenda


def hashes(*values):
    return np.array(values, dtype=np.uint64)


def test_of_several_rows_with_one_id_the_last_counts():
    ids, digests = hashes(1, 2, 1, 3, 1), hashes(10, 20, 11, 30, 12)
    agenda = Agenda.of(ids, digests, hashes())
    assert agenda.wanted(ids, digests).tolist() == [False, True, False, True, True]
    assert (agenda.total, agenda.superseded, agenda.settled) == (3, 2, 0)


def test_what_is_done_is_left_out_and_what_was_done_before_an_update_is_not_mistaken_for_it():
    ids, digests = hashes(1, 2, 1), hashes(10, 20, 11)
    agenda = Agenda.of(ids, digests, hashes(20, 10, 20, 99))
    assert agenda.wanted(ids, digests).tolist() == [False, False, True]
    assert (agenda.total, agenda.superseded, agenda.settled) == (1, 1, 1)


def test_nothing_to_do():
    agenda = Agenda.of(hashes(), hashes(), hashes(5))
    assert (agenda.total, agenda.superseded, agenda.settled) == (0, 0, 0)
    assert agenda.wanted(hashes(), hashes()).tolist() == []


rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=30)


@given(rows, st.lists(st.integers(0, 63)), st.integers(1, 7))
def test_as_a_plain_loop_would_and_in_any_batches(rows, done, size):
    ids = hashes(*(each for each, _ in rows))
    digests = hashes(*(8 * each + text for each, text in rows))
    agenda = Agenda.of(ids, digests, hashes(*done))
    last = dict(zip(ids.tolist(), digests.tolist(), strict=True))
    expected = [last[i] == d and d not in done for i, d in zip(ids.tolist(), digests.tolist(), strict=True)]
    found = [
        flag
        for start in range(0, len(ids), size)
        for flag in agenda.wanted(ids[start : start + size], digests[start : start + size]).tolist()
    ]
    assert found == expected
    assert agenda.total == sum(expected)
    assert agenda.total + agenda.superseded + agenda.settled == len(ids)
