"""The model that is served."""

import pytest
from tiny_llama import write_tiny_llama


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
