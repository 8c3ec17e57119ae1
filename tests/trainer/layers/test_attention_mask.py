"""A mask is made where documents share a row, and nowhere else."""

import torch

from headrace.trainer.layers.attention_mask import attention_masks

CPU = torch.device("cpu")


def test_rows_of_a_single_document_need_no_mask():
    assert attention_masks([[8], [8]], [None], CPU) == {None: None}


def test_tokens_see_earlier_ones_of_their_own_document_only():
    mask = attention_masks([[2, 3], [5]], [None], CPU)[None]
    assert mask.shape == (2, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert torch.equal(mask[1, 0], torch.ones(5, 5, dtype=torch.bool).tril())


def test_a_window_reaches_so_many_tokens_back_and_only_where_it_is_shorter_than_a_document():
    masks = attention_masks([[4, 2]], [2, 9], CPU)
    assert masks[2][0, 0, 3].int().tolist() == [0, 0, 1, 1, 0, 0]
    assert masks[9][0, 0, 3].int().tolist() == [1, 1, 1, 1, 0, 0]
