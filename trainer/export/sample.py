"""Text from a model, to look at what training did."""

from pathlib import Path

from headrace.schemas.errors import ConfigError
from headrace.trainer.quiet import quiet_libraries


def sample(
    model: Path,
    adapter: Path | None,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Continue a prompt.

    Args:
        adapter: PEFT adapter directory to put on the model, or None.
        temperature: 0 takes the likeliest token each time.

    Returns:
        The continuation, without the prompt.
    """
    for directory, name in ((model, "config.json"), (adapter, "adapter_config.json")):
        if directory is not None and not (directory / name).is_file():
            raise ConfigError(f"{directory}: no {name}; is the path right?")

    quiet_libraries()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True)
    if adapter is not None:
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, str(adapter))
    network.to(device).eval()
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(device)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    with torch.no_grad():
        output = network.generate(
            **inputs,
            **sampling,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text
