"""Frames of prompts, and which ids of a text are real: quick, without an export."""

from __future__ import annotations

import numpy as np
import pytest

from export.families.templates import chat, frame, user
from runtime.sampling.step_rules import shift_by_steps


def test_a_frame_is_what_stands_around_a_prompt() -> None:
    assert frame("before {} after".format, "it") == ("before ", " after")
    assert frame(str, "it") == ("", "")
    for change in (str.strip, str.upper, lambda prompt: "nothing", lambda prompt: f"<{prompt or 'none'}>"):
        with pytest.raises(ValueError, match="it changes prompts beyond"):
            frame(change, "it")


def test_a_chat_template_is_rendered_as_transformers_renders_it() -> None:
    from tests.tiny_transformers import qwen_tokenizer

    tokenizer = qwen_tokenizer()
    before, after = chat(user, add_generation_prompt=True, enable_thinking=False)(tokenizer)
    prompt = " a\n<|im_end|> {star} "
    whole = tokenizer.apply_chat_template(
        user(prompt), tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert f"{before}{prompt}{after}" == whole and "<think>" in after
    tokenizer.chat_template = "{{ messages[0].content | trim }}"
    with pytest.raises(ValueError, match="its chat template changes prompts"):
        chat(user)(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        chat(user)(tokenizer)


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_the_run_at_one_end_alone(left: bool) -> None:
    import torch

    from export.networks.language_models import ragged, real

    pad, tokens = 3, 9
    for _ in range(50):
        ids = ragged(8, pad, left=left)((4, tokens))
        assert int(ids.max()) < 8
        inside = ids != pad
        assert torch.equal(real(ids, pad, left=left), inside), "drawn ids are never those of padding"
        ids[:, tokens // 2] = pad
        for row, mask in zip(ids.tolist(), real(ids, pad, left=left).tolist(), strict=True):
            words = [number for number, one in enumerate(row) if one != pad]
            wanted = range(words[0], tokens) if left and words else range(words[-1] + 1) if words else ()
            assert [number for number, there in enumerate(mask) if there] == list(wanted)


def test_the_shift_of_flux2_is_that_of_diffusers() -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    for count in (1, 77, 1024, 4096, 4300, 4301, 16384):
        for steps in (1, 4, 10, 28, 50, 200):
            assert np.isclose(shift_by_steps(count, steps), compute_empirical_mu(count, steps), rtol=1e-12)
