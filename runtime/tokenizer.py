"""Prompts to token ids, with the `tokenizers` library alone.

What diffusers' pipelines do between a text and its ids, and where it is done here:

- `maybe_convert_prompt` (Stable Diffusion 1 and 2, XL, Flux, latent consistency): a token of several vectors becomes
  all of them, in negative prompts, too: `_Vectors`. Stable Diffusion 3 loads no such tokens.
- chat templates: what stands before and after the prompt, found by the export. Such texts get no other special tokens,
  and cutting takes their end away, as it does in diffusers.
- lower-casing, cleaning of white space, templates with begin and end: in the tokenizer's own file.
- padding and cutting to `max_length` with the pad and end tokens of the tokenizer: `PromptTokenizer`. T5's
  `max_sequence_length` is that of the pipeline's default (SD 3 256, Flux 512), fixed by the export.
- attention masks of padded prompts (`use_attention_mask`): refused by the export.
- `prompt_2` and `prompt_3`: one prompt goes to every encoder; other arguments are refused by name.
- `force_zeros_for_empty_prompt`: `runtime.conditioning`.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray

from engines.manifest import Tokenizer
from engines.store import Bundle

log = logging.getLogger(__name__)


class _Vectors:
    """Tokens of a textual inversion that stand for several: `<cat>` for `<cat> <cat>_1 <cat>_2`, where those exist."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self._several: dict[str, str] = {}
        for token in added:
            count = next(n for n in itertools.count(1) if f"{token}_{n}" not in added)
            if count > 1:
                self._several[token] = " ".join([token, *(f"{token}_{n}" for n in range(1, count))])

    def __call__(self, prompt: str) -> str:
        """The prompt with all vectors of its tokens, as `TextualInversionLoaderMixin.maybe_convert_prompt` has it."""
        if self._several:
            for token in sorted(set(self._tokenizer.encode(prompt, add_special_tokens=False).tokens)):
                prompt = prompt.replace(token, self._several.get(token, token))
        return prompt


def _cut(spec: Tokenizer, tokenizer: tokenizers.Tokenizer, prompt: str) -> tuple[list[int], list[int]]:
    """A prompt's ids, within the length that the encoder takes, and those of it that were cut off."""
    before, after = spec.template or ("", "")
    ids: list[int] = tokenizer.encode(f"{before}{prompt}{after}", add_special_tokens=spec.template is None).ids
    if len(ids) <= spec.max_length:
        return ids, []
    if spec.template is not None:
        return ids[: spec.max_length], ids[spec.max_length :]
    return [*ids[: spec.max_length - 1], spec.eos_token_id], ids[spec.max_length - 1 : -1]


class PromptTokenizer:
    """The model's tokenizers; prompts are cut where diffusers cuts them, with a warning that names what is lost.

    Another warning names words that were in no caption of the training, of a model that lists its words.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._words = frozenset(bundle.manifest.words)
        self._tokenizers: list[tuple[Tokenizer, tokenizers.Tokenizer, _Vectors]] = []
        for spec in bundle.manifest.tokenizers:
            tokenizer = tokenizers.Tokenizer.from_str(bundle.tokenizer(spec).decode())
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._tokenizers.append((spec, tokenizer, _Vectors(tokenizer)))

    def __call__(self, prompts: Sequence[str]) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
        """Ids by the text encoder's inputs, each (prompts, max_length), and a warning for every part that was cut."""
        found, warnings = {}, []
        for spec, tokenizer, vectors in self._tokenizers:
            rows = np.full((len(prompts), spec.max_length), spec.pad_token_id, np.int64)
            for row, prompt in zip(rows, prompts, strict=True):
                ids, cut = _cut(spec, tokenizer, vectors(prompt))
                if cut:
                    lost = tokenizer.decode(cut).replace("</w>", " ").strip()
                    warnings.append(
                        f"a prompt is longer than {spec.max_length} tokens; this part of it was cut: {lost!r}"
                    )
                row[spec.max_length - len(ids) if spec.pad_left else 0 :][: len(ids)] = ids
            found[spec.input] = rows
        warnings += self._unknown(prompts)
        several = list(dict.fromkeys(warnings))  # two encoders with the same words cut the same
        for warning in several:
            log.warning("%s", warning)
        return found, several

    def _unknown(self, prompts: Sequence[str]) -> list[str]:
        said = dict.fromkeys(word for prompt in prompts for word in re.findall(r"\w+", prompt.lower()))
        unknown = [word for word in said if self._words and word not in self._words]
        if not unknown:
            return []
        known = ", ".join(sorted(self._words))
        return [f"the model was trained without {', '.join(unknown)} and draws something else; its words are {known}"]
