"""Text from a model: of a prompt, of a conversation, of every line of a file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.schemas.errors import ConfigError, DataError
from headrace.schemas.fingerprint import derive_seed
from headrace.trainer.architecture.config_limits import (
    read_model_config,
    refuse_scored,
    transformers_reads,
)
from headrace.trainer.architecture.weight_index import stored_tensors
from headrace.trainer.quiet import quiet_libraries

GENERATION_LIMITS: dict[str, tuple[float, float]] = {  # of generation_config.json
    "max_length": (0, 1 << 31),
    "max_new_tokens": (0, 1 << 31),
    "min_length": (0, 1 << 20),
    "min_new_tokens": (0, 1 << 20),
    "num_beams": (1, 64),
    "num_return_sequences": (1, 1),
    "no_repeat_ngram_size": (0, 1024),
    "top_k": (0, 1 << 20),
    "top_p": (0, 1),
    "temperature": (0, 100),
    "repetition_penalty": (0.01, 100),
}
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of the answers."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0 takes the likeliest token each time
    seed: int = 0
    top_p: float | None = None  # share of the likeliest that is drawn from; None: the model's own


def config_below(model: Path, adapter: Path | None) -> Any:
    """Return a model's config as the adapter on it wants it."""
    from transformers import AutoConfig

    from headrace.trainer.adapters.peft_settings import read_overrides
    from headrace.trainer.architecture.overrides import with_overrides

    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    if adapter is None:
        return config
    overrides = read_overrides(adapter).model_copy(update={"new_tokens": []})
    return type(config).from_dict(with_overrides(config.to_dict(), overrides, str(model)))


def resize(network: Any, model: Path, adapter: Path) -> None:
    """Give a model rows for the new tokens of an adapter, which holds their values."""
    from headrace.trainer.adapters.peft_settings import read_overrides
    from headrace.trainer.architecture.overrides import with_overrides

    text = network.config.get_text_config().to_dict()
    rows = with_overrides(text, read_overrides(adapter), str(model))["vocab_size"]
    if rows > network.get_input_embeddings().weight.shape[0]:
        network.resize_token_embeddings(rows, mean_resizing=False)


class Sampler:
    """A model, and an adapter that can be left out.

    Args:
        adapter: PEFT adapter directory to put on the model, or None.
        render: what makes a text of messages, as `headrace.jobs.serve.chat_prompt` does.
        pictures: the model is to see pictures, with its vision tower.

    Raises:
        ConfigError: no model or adapter there, or one that cannot be used.
        DataError: an adapter that does not belong to the model.
    """

    def __init__(
        self,
        model: Path,
        adapter: Path | None,
        render: Callable[[Messages], str] | None = None,
        *,
        pictures: bool = False,
    ) -> None:
        for directory, name in ((model, "config.json"), (adapter, "adapter_config.json")):
            if directory is not None and not (directory / name).is_file():
                raise ConfigError(f"{directory}: no {name}; is the path right?")
        read_model_config(model)
        refuse_scored(model)
        if adapter is not None:
            refuse_scored(adapter, "adapter_config.json")
        stored_tensors(model)
        quiet_libraries()

        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

        from headrace.trainer import devices

        self.directory = model
        self.render = render
        self.device = devices.device_type()
        local = {"local_files_only": True, "trust_remote_code": False}
        with tokenizer_errors(model), transformers_reads(model):
            grown = adapter is not None and (adapter / "tokenizer.json").is_file()
            self.tokenizer = AutoTokenizer.from_pretrained(adapter if grown else model, **local)
        with transformers_reads(model):
            kind: Any = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
            network = kind.from_pretrained(
                model,
                config=config_below(model, adapter),
                dtype="auto",
                use_safetensors=True,
                **local,
            )
        check_generation(network.generation_config, model)
        if adapter is not None:
            from headrace.trainer.export.applied_adapter import apply_adapter

            resize(network, model, adapter)
            network = apply_adapter(network, adapter)
        self.network: Any = network.to(self.device).eval()
        self.has_adapter = adapter is not None

    def encode(self, prompt: str | Messages) -> list[int]:
        """Return token ids: of a text as it stands, of messages as `render` writes them."""
        if not isinstance(prompt, str):
            assert self.render is not None, "messages, and nothing that renders them"
            prompt = self.render(prompt)
        with tokenizer_errors(self.directory):
            ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def answer(
        self, prompts: Sequence[str | Messages], sampling: Sampling, *, adapter: bool = True
    ) -> list[str]:
        """Generate the answer to each prompt, without the prompt.

        Args:
            adapter: with the adapter, if there is one.
        """
        import torch

        rows = [self.encode(prompt) for prompt in prompts]
        width = max(map(len, rows))
        padding = self.tokenizer.pad_token_id
        padding = self.tokenizer.eos_token_id if padding is None else padding
        ids = torch.tensor([[padding or 0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        output = self._generate(ids, mask, sampling, padding, adapter)
        texts: list[str] = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return texts

    def generate(
        self, ids: Sequence[int], sampling: Sampling, *, adapter: bool = True, **watching: Any
    ) -> None:
        """Continue one prompt of token ids, for whoever watches the tokens.

        Args:
            adapter: with the adapter, if there is one.
            watching: `streamer` and `stopping_criteria`, as transformers' `generate` takes them.
        """
        import torch

        row = torch.tensor([list(ids)])
        padding = self.tokenizer.eos_token_id
        self._generate(row, torch.ones_like(row), sampling, padding, adapter, **watching)

    @property
    def positions(self) -> int | None:
        """Return the most tokens that the model was made for, where its config says so."""
        config = self.network.config.get_text_config()
        found = getattr(config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def _generate(
        self,
        ids: Any,
        mask: Any,
        sampling: Sampling,
        padding: int | None,
        adapter: bool,
        **watching: Any,
    ) -> Any:
        import torch

        drawn = {"do_sample": True, "temperature": sampling.temperature}
        drawn |= {} if sampling.top_p is None else {"top_p": sampling.top_p}
        how = drawn if sampling.temperature > 0 else {"do_sample": False}
        torch.manual_seed(sampling.seed)
        with torch.no_grad(), self._without_adapter(not adapter):
            return self.network.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=padding,
                **how,
                **watching,
            )

    def _without_adapter(self, wanted: bool) -> AbstractContextManager[Any]:
        if wanted and self.has_adapter:
            disabled: AbstractContextManager[Any] = self.network.disable_adapter()
            return disabled
        return nullcontext()


@contextmanager
def tokenizer_errors(directory: Path) -> Iterator[None]:
    """Turn a panic of the tokenizer's engine, which is no Exception, into one line.

    Raises:
        DataError: naming the model, and the first line of the reason.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise DataError(
            f"{directory / 'tokenizer.json'}: its expressions fail on this text ({reason[:200]}); "
            "use another tokenizer"
        ) from None


def check_generation(settings: Any, model: Path) -> None:
    """Check what generation_config.json asks for against what a sample may take.

    Raises:
        ConfigError: naming the setting.
    """
    for key, (low, high) in GENERATION_LIMITS.items():
        value = getattr(settings, key, None)
        if value is None:
            continue
        if isinstance(value, str) or not low <= value <= high:
            raise ConfigError(
                f"{model / 'generation_config.json'}: {key} = {value!r:.40}, not from {low:g} to "
                f"{high:g}; correct it"
            )


def as_messages(prompt: str, system: str | None) -> Messages:
    """A user's turn, after a system text if there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def batches(
    sampler: Sampler,
    prompts: Sequence[str | Messages],
    start: int,
    size: int,
    sampling: Sampling,
    compare: bool,
) -> Iterator[list[dict[str, str]]]:
    """Answers from prompt `start` on, a multiple of `size`; each batch draws by its own number."""
    for first in range(start, len(prompts), size):
        part = prompts[first : first + size]
        seed = derive_seed(sampling.seed, "sample", first)
        drawn = Sampling(sampling.max_new_tokens, sampling.temperature, seed)
        answers = [{"response": text} for text in sampler.answer(part, drawn)]
        if compare:
            plain = sampler.answer(part, drawn, adapter=False)
            answers = [
                both | {"response_without_adapter": text}
                for both, text in zip(answers, plain, strict=True)
            ]
        yield answers
