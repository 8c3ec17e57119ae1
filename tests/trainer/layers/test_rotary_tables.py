"""Rotary tables of text are those of positions that are the same in all axes."""

import torch
from torch import nn

from headrace.trainer.layers.rotary_tables import rotary_tables


class OlderRotary(nn.Module):
    """Rotary positions as transformers 5.17 computed them, for all three axes."""

    mrope_section = (2, 1, 1)

    def forward(self, hidden, positions):
        assert positions.shape[0] == 3 and positions.ndim == 3
        angles = positions.float().sum(0)
        return angles.cos(), angles.sin()


def test_a_module_that_asks_for_three_axes_is_given_them():
    positions = torch.arange(5).view(1, 5)
    (table,) = rotary_tables(OlderRotary(), [None], torch.zeros(1, 5, 4), positions, None).values()
    assert torch.equal(table[0], (3.0 * positions).cos())
