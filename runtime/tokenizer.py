"""Prompts to token ids, with the `tokenizers` library alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray

from engines.manifest import Tokenizer
from engines.store import Bundle

log = logging.getLogger(__name__)


class PromptTokenizer:
    """The model's tokenizers; prompts are cut where diffusers cuts them, with a warning that names what is lost."""

    def __init__(self, bundle: Bundle) -> None:
        self._tokenizers: list[tuple[Tokenizer, tokenizers.Tokenizer]] = []
        for spec in bundle.manifest.tokenizers:
            tokenizer = tokenizers.Tokenizer.from_str(bundle.tokenizer(spec).decode())
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._tokenizers.append((spec, tokenizer))

    def __call__(self, prompts: Sequence[str]) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
        """Ids by the text encoder's inputs, each (prompts, max_length), and a warning for every part that was cut."""
        found, warnings = {}, []
        for spec, tokenizer in self._tokenizers:
            rows = np.full((len(prompts), spec.max_length), spec.pad_token_id, np.int64)
            for row, prompt in zip(rows, prompts, strict=True):
                ids = tokenizer.encode(prompt).ids
                if len(ids) > spec.max_length:
                    cut = tokenizer.decode(ids[spec.max_length - 1 : -1]).replace("</w>", " ").strip()
                    warnings.append(
                        f"a prompt is longer than {spec.max_length} tokens; this part of it was cut: {cut!r}"
                    )
                    ids = [*ids[: spec.max_length - 1], spec.eos_token_id]
                row[: len(ids)] = ids
            found[spec.input] = rows
        several = list(dict.fromkeys(warnings))  # two encoders with the same words cut the same
        for warning in several:
            log.warning("%s", warning)
        return found, several
