"""Documents of packed rows, each run alone and put back."""

import pytest
import torch
from torch.nn import functional

from headrace.trainer.layers.documents import GAP, find_documents

CPU = torch.device("cpu")


def recurrence(hidden):
    """A state that sums up all that went before, which shows any leak."""
    return hidden.cumsum(1)


def alone(hidden, document_lengths, row_lengths):
    rows = torch.zeros_like(hidden)
    for row, (lengths, tokens) in enumerate(zip(document_lengths, row_lengths, strict=True)):
        start = 0
        for length in lengths:
            if start < tokens:
                rows[row, start : start + length] = hidden[row, start : start + length].cumsum(0)
            start += length
    return rows


@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [
        ([[3, 4, 1], [4, 4]], [8, 8]),
        ([[8], [2, 6]], [8, 2]),
        ([[8], [8]], [8, 8]),
        ([[5, 3]], [5]),
        ([[8], [3, 5]], [8, 0]),
        ([[4, 4]], [0]),
    ],
)
def test_no_document_sees_another_and_padding_is_zero(lengths, tokens):
    documents = find_documents(lengths, tokens, CPU)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(lengths), 8, 5, generator=generator, dtype=torch.float64)
    assert torch.equal(documents.apply(recurrence, hidden), alone(hidden, lengths, tokens))


@pytest.mark.parametrize(
    ("lengths", "tokens"), [([[3, 4, 1], [4, 4]], [8, 8]), ([[8], [2, 6]], [8, 2]), ([[8]], [0])]
)
def test_in_one_row_a_kernel_restarts_at_bounds(lengths, tokens):
    documents = find_documents(lengths, tokens, CPU)
    hidden = torch.randn(len(lengths), 8, 5, dtype=torch.float64)

    def kernel(row):
        parts = row.split(documents.bounds.diff().tolist(), 1)
        return torch.cat([part.cumsum(1) for part in parts], 1)

    found = documents.apply_in_one_row(kernel, hidden)
    assert torch.equal(found, alone(hidden, lengths, tokens))


def test_in_one_row_a_convolution_sees_no_other_document():
    documents = find_documents([[3, 5], [1, 1, 6]], [8, 2], CPU)
    hidden = torch.randn(2, 8, 2, dtype=torch.float64)

    def convolve(row):
        padded = functional.pad(row, (0, 0, GAP, 0))
        return sum(padded[:, GAP - back : padded.shape[1] - back] for back in range(GAP + 1))

    expected = documents.apply(convolve, hidden)
    assert torch.allclose(documents.apply_in_one_row(convolve, hidden), expected, rtol=1e-12)


def test_gradients_stay_in_their_document():
    documents = find_documents([[3, 5]], [8], CPU)
    hidden = torch.ones(1, 8, 2, requires_grad=True)
    documents.apply(recurrence, hidden)[0, 6].sum().backward()
    assert hidden.grad[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 0]


def test_documents_of_one_length_run_together():
    calls = []
    documents = find_documents([[2, 3, 2], [3, 2, 2]], [7, 5], CPU)

    def mix(hidden):
        calls.append(tuple(hidden.shape[:2]))
        return hidden

    documents.apply(mix, torch.zeros(2, 7, 1))
    assert calls == [(3, 2), (2, 3)]


def test_rows_of_single_documents_are_taken_as_they_are():
    hidden = torch.zeros(2, 8, 1)
    found = []
    find_documents([[8], [8]], [8, 8], CPU).apply(lambda x: found.append(x) or x, hidden)
    assert found[0] is hidden
    assert not find_documents([[8], [8]], [8, 0], CPU).whole
