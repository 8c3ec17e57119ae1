"""`headrace serve` as OpenAI's own client meets it."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
import uvicorn
from saved_parts import adapter_of

from headrace.jobs.serve.answers import Answerer, before_stop
from headrace.jobs.serve.app import Served, build_app
from headrace.jobs.serve.commands import parts_of
from headrace.schemas.errors import ConfigError
from headrace.trainer.export.sample import Sampler, Sampling


def render(messages):
    return "".join(f"[{m['role']}] {m['content']} " for m in messages) + "[assistant] "


class Running:
    """A server on a free port, in a thread."""

    def __init__(self, app):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()

    def stop(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def sampler(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "adapter"
    adapter = adapter_of(tiny_model, folder, std=1.0, target_modules="all-linear")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small for more
    yield Sampler(tiny_model, adapter, render)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def url(sampler):
    answerer = Answerer(sampler, sampler.positions)
    running = Running(build_app(Served(answerer, {"tuned": True, "base": False})))
    yield f"http://127.0.0.1:{running.port}"
    running.stop()
    answerer.close()


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


ASKED = [{"role": "user", "content": "def push("}]


def test_a_chat_is_answered_as_sample_answers_it(client, sampler):
    names = {"tuned": True, "base": False}
    # before the server's thread is at it, which leaves the adapter out for a moment too
    answers = {n: sampler.answer([ASKED], Sampling(5), adapter=a)[0] for n, a in names.items()}
    for name, expected in answers.items():
        got = client.chat.completions.create(
            model=name, messages=ASKED, max_tokens=5, temperature=0
        )
        assert got.choices[0].message.content == expected
        assert got.model == name
        assert got.usage is not None
        assert got.usage.prompt_tokens == len(sampler.encode(ASKED))
        assert got.usage.completion_tokens <= 5


def test_a_stream_has_the_same_text_in_pieces_and_ends_with_its_reason(client):
    asked = {"model": "tuned", "messages": ASKED, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (
        whole.choices[0].message.content
    )
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_an_answer_ends_before_a_stop_text(client):
    asked = {"model": "base", "prompt": "import", "max_tokens": 12, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[len(text) // 2 :][:2]
    got = client.completions.create(**asked, stop=[stop, "never there"]).choices[0]
    assert got.text == text[: text.index(stop)]
    assert got.finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stop_text_is_found_however_the_pieces_are_cut(size):
    text = "one two END three"
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    found = []
    parts = before_stop(iter(pieces), ("END", "nowhere"), lambda: found.append(True))
    assert "".join(parts) == "one two "
    assert found == [True]
    assert "".join(before_stop(iter(pieces), ("ENDS",), found.clear)) == text


def test_the_same_seed_draws_the_same_answer(client):
    asked = {"model": "base", "messages": ASKED, "max_tokens": 6, "temperature": 1.5, "top_p": 0.9}
    texts = [
        client.chat.completions.create(**asked, seed=seed).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1]


def test_mistakes_are_openai_errors_that_name_the_reason(client):
    base = {"model": "base", "messages": ASKED}
    for more, reason in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1 << 20}, "more than the"),
        ({"n": 2}, "n: "),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "other types"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason):
            client.chat.completions.create(**(base | more))
    with pytest.raises(openai.NotFoundError, match="'other' is not served; tuned, base is"):
        client.chat.completions.create(model="other", messages=ASKED)


def test_models_are_listed_and_generate_answers(client, url, sampler):
    assert [model.id for model in client.models.list()] == ["tuned", "base"]
    body = {"prompt": "import", "max_tokens": 4, "temperature": 0}
    got = httpx.post(f"{url}/generate", json=body).json()
    assert got == {"text": sampler.answer(["import"], Sampling(4))}


def test_no_other_host_name_and_no_broken_body_is_answered(url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/health", headers={"Host": "evil.example"}).status_code == 400
    broken = httpx.post(f"{url}/v1/completions", content=b"[" * 100_000)
    assert broken.status_code == 400
    assert "no JSON" in broken.json()["error"]["message"]
    large = httpx.post(f"{url}/v1/completions", content=b" " * (9 << 20))
    assert "more than 8,388,608 bytes" in large.json()["error"]["message"]


def test_of_many_requests_at_once_none_is_lost(url, sampler):
    def ask(number: int) -> str:
        body = {"prompt": f"x{number % 5} =", "max_tokens": 2, "temperature": 0, "model": "base"}
        got = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        return got.json()["choices"][0]["text"]

    expected = [sampler.answer([f"x{n} ="], Sampling(2), adapter=False)[0] for n in range(5)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(60))) == [expected[n % 5] for n in range(60)]


def test_a_client_that_leaves_frees_the_model(url):
    body = {"prompt": "x", "max_tokens": 100, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    short = {"prompt": "x", "max_tokens": 1, "temperature": 0}
    assert httpx.post(f"{url}/v1/completions", json=short, timeout=120).status_code == 200


def test_a_run_is_served_with_its_adapter_over_the_model_it_names(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert parts_of(run, None) == (run, None, "run")
    (run / "train.json").write_text(json.dumps({"config": {"model": "models/base"}}))
    with pytest.raises(ConfigError, match="has the run come to its end"):
        parts_of(run, None)
    (run / "adapter").mkdir()
    assert parts_of(run, None)[1] == run / "adapter"
    (run / "model").mkdir()
    assert parts_of(run, None)[0] == run / "model"
