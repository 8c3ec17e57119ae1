"""Stages of one pipeline in threads of this process, for what they do without DeepSpeed."""

import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from headrace.trainer.pipeline.generation import Generator

SECONDS = 60  # before a stage that waits in vain gives up


@dataclass(frozen=True)
class QueueLinks:
    """`PipelineLinks` over queues."""

    stage: int
    stages: int
    states: list[queue.Queue]  # [stage] of what it receives
    tokens: list[queue.Queue]

    def send_states(self, states):
        self.states[self.stage + 1].put(states)

    def receive_states(self, shape, dtype):
        states = self.states[self.stage].get(timeout=SECONDS)
        assert (tuple(states.shape), states.dtype) == (shape, dtype)
        return states

    def publish_tokens(self, tokens):
        for waiting in self.tokens[:-1]:
            waiting.put(tokens)

    def await_tokens(self, count):
        tokens = self.tokens[self.stage].get(timeout=SECONDS)
        assert tokens.shape == (count,)
        return tokens

    def finish(self):
        assert self.states[self.stage].empty()
        assert self.tokens[self.stage].empty()


def generate(built, prompts, settings, stop_tokens):
    """What all stages agree on."""
    stages = len(built)
    states, tokens = ([queue.Queue() for _ in built] for _ in range(2))
    size = built[0].architecture.stream.width

    def run(number):
        torch.set_num_threads(1)
        links = QueueLinks(number, stages, states, tokens)
        stage, device = built[number].stage, torch.device("cpu")
        generator = Generator(stage, links, device, size, settings, frozenset(stop_tokens))
        return generator.generate(prompts)

    with ThreadPoolExecutor(stages) as pool:
        first, *others = pool.map(run, range(stages))
    assert all(other == first for other in others)
    return first
