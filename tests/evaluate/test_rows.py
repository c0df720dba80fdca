import numpy as np
import pytest

from jaxllm.evaluate.rows import by_length, packed
from jaxllm.text.special_tokens import PAD_ID


def test_every_sequence_comes_once_in_a_row_of_few_widths():
    draw = np.random.default_rng(0)
    sequences = [draw.integers(5, 90, length).tolist() for length in (3, 40, 16, 17, 1, 33, 20)]
    seen = []
    for rows in by_length(sequences, 3):
        assert rows.tokens_BT.shape[0] == 3 and rows.tokens_BT.shape[1] in (16, 32, 64)
        for row, number in enumerate(rows.numbers):
            length = rows.lengths_B[row]
            assert rows.tokens_BT[row, :length].tolist() == sequences[number]
            assert np.all(rows.tokens_BT[row, length:] == PAD_ID)
        assert np.all(rows.tokens_BT[len(rows.numbers) :] == PAD_ID) and np.all(
            rows.lengths_B[len(rows.numbers) :] == 1
        )
        assert rows.tokens_BT.shape[1] < 2 * max(16, rows.lengths_B.max())
        seen += rows.numbers
    assert sorted(seen) == list(range(7)) and [len(sequences[number]) for number in seen] == sorted(map(len, sequences))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_packed_sequences_lie_side_by_side_with_positions_of_their_own(batch_size):
    draw = np.random.default_rng(0)
    sequences = [draw.integers(5, 90, length).tolist() for length in (3, 12, 9, 2, 16, 2, 7, 5)]
    seen, rows_of = [], {}
    for index, batch in enumerate(packed(sequences, batch_size, length=16)):
        assert all(array.shape == (batch_size, 16) for array in batch[1:])
        taken = np.zeros((batch_size, 16), int)
        for number, row, start in batch.places:
            end = start + len(sequences[number]) - 1
            assert batch.tokens_BT[row, start:end].tolist() == sequences[number][:-1]
            assert batch.targets_BT[row, start:end].tolist() == sequences[number][1:]
            assert batch.positions_BT[row, start:end].tolist() == list(range(end - start))
            assert len(set(batch.segments_BT[row, start:end])) == 1 and batch.segments_BT[row, start] > 0
            taken[row, start:end] += 1
            rows_of.setdefault((index, row), []).append(number)
        assert taken.max() == 1 and np.array_equal(taken > 0, batch.segments_BT > 0)
        for row in range(batch_size):
            segments = [batch.segments_BT[row, start] for _, where, start in batch.places if where == row]
            assert len(set(segments)) == len(segments)
        seen += [number for number, _, _ in batch.places]
    assert sorted(seen) == list(range(8)) and len(rows_of) == 4  # 48 pairs in rows of 16 where whole sequences stay
    assert sorted(map(sorted, rows_of.values())) == sorted(map(sorted, [[4], [1], [2, 6], [7, 0, 3, 5]]))


def test_rows_are_no_wider_than_is_worth_it():
    (batch,) = packed([[1, 2, 3]] * 3, 2, length=4096)
    assert batch.tokens_BT.shape == (2, 16)


@pytest.mark.parametrize("sequence", [[1], list(range(18))])
def test_a_sequence_that_fits_no_row_is_refused(sequence):
    with pytest.raises(ValueError, match=f"a sequence of {len(sequence)} tokens has no place in rows of 16"):
        list(packed([sequence], 2, length=16))
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        list(packed([[1, 2]], 0, length=16))
