import math

import numpy as np
import pytest

from jaxllm.evaluate.validation import validation
from jaxllm.metrics import Ratio

BYTES_V = np.array([0, 1, 2])
SOURCES = {"chat": [[1, 2]], "text": [[2, 2], [1, 1]]}  # targets of each batch


def batches(name):
    return lambda: iter([{"targets_BT": np.array([t]), "mask_BT": np.ones((1, 2), bool)} for t in SOURCES[name]])


def evaluate(params, found, **frozen):
    """Nats that tell the sources, the parameters and what is frozen apart."""
    targets = np.concatenate([batch["targets_BT"] for batch in found])
    total = float(params * targets.sum())
    return {"nll": Ratio(total, targets.size)} | ({"jsd": Ratio(total, 10)} if frozen else {})


def test_sources_are_measured_together_and_each_alone_and_bytes_are_those_of_the_targets():
    row = validation(evaluate, 2.0, {name: batches(name) for name in SOURCES}, BYTES_V)
    assert row["validation_loss/chat"] == 6 / 2 and row["validation_loss/text"] == 12 / 4
    assert row["validation_loss"] == 18 / 6 and row["validation_perplexity"] == pytest.approx(math.exp(3))
    assert row["validation_bits_per_byte/chat"] == pytest.approx(6 / math.log(2) / 3)
    assert row["validation_bits_per_byte"] == pytest.approx(18 / math.log(2) / (3 + 6))


def test_a_single_source_is_not_named_and_further_metrics_are_means():
    row = validation(evaluate, 1.0, {"text": batches("text")}, BYTES_V, teacher_params=0)
    assert row.keys() == {f"validation_{name}" for name in ("loss", "perplexity", "bits_per_byte", "jsd")}
    assert row["validation_jsd"] == pytest.approx(0.6)
