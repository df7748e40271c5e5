# SPDX-License-Identifier: Apache-2.0
"""The language side of models that see: with a picture and without one."""

from typing import Any

import pytest
import torch

import fastpref
from fastpref.architectures.configurations import VOCABULARY
from tests.integrations.causal_lm.models import batch, check_call, refusals

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
PICTURE = 5  # the id that stands for one of its tokens


def llava() -> Any:
    return transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **SIGHT},
        image_token_id=PICTURE,
    )


def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "final_logit_softcapping": 2.0},
        vision_config=SIGHT,
        image_token_id=PICTURE,
        mm_tokens_per_image=4,
    )


@pytest.mark.parametrize("picture", [False, True])
@pytest.mark.parametrize("config", [llava, gemma3], ids=["llava", "gemma3"])
def test_as_full_logits(config: Any, picture: bool) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config(), dtype=torch.float32)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    fastpref.fuse_lm_head(model.train())
    inputs = batch()
    if picture:
        inputs["input_ids"][:, :4] = PICTURE
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
        if config is gemma3:
            inputs["token_type_ids"] = (inputs["input_ids"] == PICTURE).long()
    elif config is gemma3:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    check_call(model, inputs)
    assert refusals(model) == ()
