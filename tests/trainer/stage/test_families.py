"""Every family in stages gives transformers' losses and gradients, each document read alone."""

from pathlib import Path

import pytest
from family_modes import MODES, TOLERANCE
from tiny_families import (
    FAMILIES,
    save_tiny,
)

from headrace.trainer.architecture.families import FAMILIES as KNOWN

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model directories, made when first asked for."""
    directory, made = tmp_path_factory.mktemp("families"), {}

    def get(family):
        if family not in made:
            made[family] = save_tiny(family, directory / family)
        return made[family]

    return get


# the rest is `make exhaustive`, which also covers one stage
SHORT = {("full", 2), ("LoRA", 3), ("NF4", 2), ("HQQ", 3)}
SHORT_FAMILIES = {
    "NF4": {"falcon", "gemma3_text", "gpt_neox", "llama", "phi3", "qwen2_moe"},
    "HQQ": {"gemma2", "mixtral", "qwen2"},
}


def cells():
    for family in FAMILIES:
        for mode in MODES:
            for stages in (1, 2, 3):
                short = (mode, stages) in SHORT and family in SHORT_FAMILIES.get(mode, FAMILIES)
                marks = [] if short else [pytest.mark.exhaustive]
                yield pytest.param(family, mode, stages, marks=marks)


@pytest.mark.parametrize(("family", "mode", "stages"), list(cells()))
def test_losses_and_gradients_are_transformers_own(models, family, mode, stages):
    loss, gradient = MODES[mode](models(family), stages)
    assert loss <= TOLERANCE
    assert gradient <= TOLERANCE


@pytest.mark.parametrize("mode", ["full", "LoRA"])
def test_one_stage_is_transformers_own_as_well(models, mode):
    loss, gradient = MODES[mode](models("gemma2"), 1)
    assert loss <= TOLERANCE
    assert gradient <= TOLERANCE


def test_the_table_in_the_docs_names_every_family():
    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
    assert sorted(FAMILIES) == sorted(KNOWN)
    for family in FAMILIES:
        assert f"| {family} |" in page, "run tests/support/families_table.py"
