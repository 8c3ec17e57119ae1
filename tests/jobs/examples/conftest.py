"""The model that examples are tried on."""

import pytest
from tiny_llama import write_tiny_llama

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    directory = write_tiny_llama(
        tmp_path_factory.mktemp("model") / "tiny", intermediate_size=96, tie_word_embeddings=False
    )
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory
