"""The documents say what the code does."""

import re
import tomllib
from pathlib import Path

import pytest

from headrace.jobs.tools.config_reference import PREPARE_EXAMPLE, TRAIN_EXAMPLE, configuration_page
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.train.train_config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_configuration_page_is_generated_from_the_models():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run `make docs`"


def test_the_example_configs_are_valid():
    PrepareConfig.model_validate(tomllib.loads(PREPARE_EXAMPLE))
    TrainConfig.model_validate(tomllib.loads(TRAIN_EXAMPLE))


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_between_pages_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readme_and_ci_run_the_same_test_command():
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-2:] == ["make lint", "make test"]
