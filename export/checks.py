"""What is refused before the first network is exported: everything that the runtime or a later stage would refuse."""

from __future__ import annotations

from typing import Any

from engines.errors import ExportError, ParameterError
from export.families import Sides, Text
from export.foreign import reading
from export.loading import Components, Source, check_weights
from export.single_file import check_prediction
from runtime.sampling.schedulers import schedule_from_config, substitute

LONGEST = 10_000  # tokens; where tokenizer_config.json says nothing, transformers makes it 10³⁰


def check(source: Source, known: Components, sides: Sides) -> None:
    """ExportError with the first thing that stands in the way. Cheap checks come first; none loads weights."""
    refused = source.family.refused(known)
    if refused:
        raise ExportError(f"{source.checkpoint or source.folder} cannot be exported: {refused}")
    for text in source.family.texts:
        if getattr(known, text.tokenizer, None) is not None:
            _check_text(source, known, text)
    _check_scheduler(source, known, sides)
    check_weights(source)


def text_config(config: Any) -> Any:
    """The part of a config that says how texts are read; models that also see images keep it apart."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _check_text(source: Source, known: Components, text: Text) -> None:
    """A tokenizer fits its encoder, and the encoder reads ids alone, as the networks give it them."""
    tokenizer, name = getattr(known, text.tokenizer), text.tokenizer
    encoder_name = name.replace("tokenizer", "text_encoder")
    config = text_config(getattr(known, encoder_name).config)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ExportError(f"{source.refusal}: {name} is no fast tokenizer: the `tokenizers` library cannot run it")
    positions = getattr(config, "max_position_embeddings", None)
    tokens = text.tokens(tokenizer)
    if tokens > LONGEST:
        raise ExportError(
            f"{source.refusal}: {name}/tokenizer_config.json has no model_max_length, the number of tokens that "
            f"{encoder_name} reads; write it there" + (f", as {positions}" if positions else "")
        )
    if positions is not None and tokens > positions:
        raise ExportError(
            f"{source.refusal}: {name} gives {tokens} tokens (model_max_length), and {encoder_name} has {positions} "
            "positions (max_position_embeddings)"
        )
    with reading(f"{source.refusal}: {name}"):
        largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ExportError(
            f"{source.refusal}: {name} has ids up to {largest}, and {encoder_name}'s vocab_size is {config.vocab_size}"
        )
    if text.template is not None:
        with reading(f"{source.refusal}: {name}"):
            text.template(tokenizer)
    if getattr(config, "use_attention_mask", False):
        raise ExportError(
            f"{source.refusal}: {encoder_name} says use_attention_mask: masks of padded prompts are not exported"
        )


def _check_scheduler(source: Source, known: Components, sides: Sides) -> None:
    """The runtime can play the model's own scheduler, or one that is known to fit in its place."""
    family = source.family
    config = {**known.scheduler.config, **family.scheduler}
    token = family.patch and family.patch * family.latents(known).factor
    try:
        schedule_from_config(
            config, alphas_of(known.scheduler), int(family.defaults["num_inference_steps"]),
            scheduler=substitute(config), even_sigmas=family.even_sigmas,
            image_seq_len=(sides.default // token) ** 2 if token else None,
        )  # fmt: skip
    except ParameterError as error:
        raise ExportError(f"{source.folder} cannot be exported: scheduler/scheduler_config.json: {error}") from error
    if source.checkpoint is not None:
        check_prediction(source.checkpoint, known.scheduler, source.folder)


def alphas_of(scheduler: Any) -> tuple[float, ...]:
    """ᾱ per training timestep; empty where a scheduler has none."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    return () if alphas is None else tuple(alphas.tolist())
