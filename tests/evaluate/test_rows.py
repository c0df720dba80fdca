import numpy as np

from jaxllm.evaluate.rows import by_length
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
