"""Prompts to token ids, with the `tokenizers` library alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray

from engines.store import Bundle

log = logging.getLogger(__name__)


class PromptTokenizer:
    """The model's tokenizer; prompts are cut where diffusers cuts them, with a warning that names what is lost."""

    def __init__(self, bundle: Bundle) -> None:
        self._spec = bundle.manifest.tokenizer
        self._tokenizer = tokenizers.Tokenizer.from_str(bundle.tokenizer().decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, prompts: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
        """Ids of shape (prompts, max_length), and one warning for every prompt that was cut."""
        limit, warnings = self._spec.max_length, []
        rows = np.full((len(prompts), limit), self._spec.pad_token_id, np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            ids = self._tokenizer.encode(prompt).ids
            if len(ids) > limit:
                cut = self._tokenizer.decode(ids[limit - 1 : -1]).replace("</w>", " ").strip()
                warnings.append(f"a prompt is longer than {limit} tokens; this part of it was cut: {cut!r}")
                log.warning("%s", warnings[-1])
                ids = [*ids[: limit - 1], self._spec.eos_token_id]
            row[: len(ids)] = ids
        return rows, warnings
