"""MM-GEM stage 2: regions are embedded and described by a model that stays as it is (arXiv 2405.19333, section 3).

    V_R      = sum_n w_n V_n                   PoolAggregator of stage 2: RoIAlign of a box, mean of a mask
    region   = unit(h4(h1(V_R)))               retrieval: h4, the identity at the start, alone trains
    L_gen    = CE(LLM(h3(h1(V_R)) [CAP_1 .. CAP_64] phrase) -> phrase </s>)
                                               captioning: h3 and the soft prompts alone train

Neither touches what whole pictures and texts are embedded by, so the global
alignment keeps its bits. One model may have both parts: each is trained from a
checkpoint of the other.

Captioning has no coupled loss, so there is nothing to embed in the step's first
pass. In retrieval the texts' side is constant; it runs without a graph, since
nothing before h4 asks for a gradient.
"""

from typing import Any

import torch

from curation.errors import UserError
from training.models.scalars import read_scalars, unsaid
from training.partitioned import lasting_sources

TRAINED = {"captioning": ("h3.weight", "h3.bias", "prompts"), "retrieval": ("h4.weight", "h4.bias")}
"""What each part of stage 2 trains; all else is frozen."""


def begin_stage(model: Any, stage2: str) -> None:
    """Make ready to train a part of stage 2.

    Raises:
        UserError: the model lacks what is to train.
    """
    parameters = dict(model.named_parameters())
    if missing := [name for name in TRAINED[stage2] if name not in parameters]:
        mend = "mmgem.prompts: 64" if stage2 == "captioning" else "mmgem.h4: true"
        raise UserError(f"mmgem.stage2: {stage2} trains {missing[0]}, which the model lacks; write {mend}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in TRAINED[stage2])
    model.stage2 = stage2
    model.separable = ("generate",) if stage2 == "captioning" else ()


def outputs(model: Any, chunk: Any, separable: bool) -> dict[str, Any]:
    """`MMGem.forward` in stage 2: one region and its phrase a row."""
    if model.stage2 == "captioning" and not separable:
        return {}
    pooled = model.pooled_region(model.feature_map(chunk["pixel_values"]), chunk["regions"])
    tokens = model.llm.get_input_embeddings()(chunk["input_ids"])  # [B, T, H]
    if model.stage2 == "retrieval":
        hidden = model.llm.base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state
        text = model.at_emb(hidden, chunk["length"])
        return {"left": model.region_embedding(pooled), "right": text, "scalars": read_scalars(model)}
    prompt = model.caption_prompt(pooled)  # [B, 1 + P, H]
    inputs = torch.cat([prompt, tokens[:, :-1]], 1)
    hidden = model.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    labels = torch.where(chunk["valid"][:, None], chunk["labels"], -100)
    counted = labels >= 0
    total = model.llm.get_output_embeddings()(hidden[:, prompt.shape[1] - 1 :][counted], labels[counted])
    return {"sums": {"generate": total}}


def begin_from(model: Any, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a checkpoint's weights; new soft prompts begin as copies of [CAP], h4 as the identity, and the temperature
    where the recipe says, if it does.

    Raises:
        UserError: `source` is of another model.
    """
    own = model.state_dict()
    new = {name for name in own if name == "prompts" or name.startswith("h4.")} - state.keys()
    for name in sorted((own.keys() | state.keys()) - new):
        shapes = [tuple(side[name].shape) if name in side else "nothing" for side in (state, own)]
        if shapes[0] != shapes[1]:
            raise UserError(f"mmgem.init: {source} is of another model: {name} is {shapes[0]} there, {shapes[1]} here")
    with lasting_sources():
        model.load_state_dict(unsaid(model.config.objective, state), strict=False)
    if "prompts" in new:
        with torch.no_grad():  # as the LLM embeds it: Gemma's kind scales what its table says
            model.prompts.copy_(model.llm.get_input_embeddings()(torch.tensor(model.config.cap_token_id)))
