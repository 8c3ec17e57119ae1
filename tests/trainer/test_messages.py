"""What ranks tell each other arrives as it was, and nothing else can arrive."""

import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from headrace.schemas.train.run_state import QuarantineRecord
from headrace.trainer.messages import pack, unpack
from headrace.trainer.objectives.row_loss import PairLoss, RowLoss
from headrace.trainer.order.position import Position
from headrace.trainer.shards.packed_rows import PackedRow


@pytest.mark.parametrize(
    "value",
    [
        None,
        [True, 1, -(2**63), 2**70, "ä\udc80", ""],
        [0.1, 1e-320, math.inf, -0.0],
        {1: "one", "1": (2, [3]), (4, 5): {}},
        Position(7, (1, 2)),
        [PackedRow("books", 2**64 - 1, 3)] * 2,
        RowLoss("web", 0.3, 5, pair=PairLoss(0.1, 0.2, 0.3, 0.4)),
        QuarantineRecord(
            file="a",
            row_group=1,
            first_row=2,
            rows=3,
            problem="crc",
            substitute_file="b",
            substitute_row_group=4,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_and_records_arrive_as_they_were(value):
    arrived = unpack(pack(value))
    assert arrived == value
    assert repr(arrived) == repr(value)


def test_what_is_not_a_number_arrives_so():
    assert math.isnan(unpack(pack(math.nan)))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(3, 5), (0, 2), ()])
def test_arrays_arrive_bit_by_bit(dtype, shape):
    array = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    turned = array.unsqueeze(0).transpose(0, -1)
    first, second = unpack(pack([turned, {"again": array}]))
    for sent, arrived in ((turned, first), (array, second["again"])):
        assert (arrived.dtype, arrived.shape) == (sent.dtype, sent.shape)
        assert torch.equal(arrived.float(), sent.float())


def test_numpy_arrays_stay_numpy_arrays():
    array = np.array([[1.5, np.nan]], np.float32)
    np.testing.assert_array_equal(unpack(pack(array)), array, strict=True)


def test_only_records_of_the_project_are_sent_and_built():
    with pytest.raises(TypeError, match="Fraction'> is not sent between ranks"):
        pack(Fraction(1, 2))
    names = json.dumps(["os:system"]).encode()
    head = len(names).to_bytes(8, "little") + (0).to_bytes(8, "little") + names
    message = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    with pytest.raises(AssertionError, match="os:system"):
        unpack(message)


def test_a_step_of_many_documents_makes_a_small_message():
    rows = [[[PackedRow("books", number, 512) for number in range(16)]] for _ in range(128)]
    assert unpack(pack(rows)) == rows
    assert len(pack(rows)) < 2 * len(pickle.dumps(rows))
