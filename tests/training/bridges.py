"""Two backbones as their libraries write them, and the words of a recipe that maps between them; shared by tests."""

import json
from pathlib import Path

import torch

from training.config import ObjectiveConfig, TrainConfig
from training.models.clip import Clip, export
from training.tokenizer import train_bpe
from training.train import parse

COLOURS = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "pink": (1, 0, 1), "black": (0, 0, 0),
}  # fmt: skip
CAPTIONS = [f"a {colour} thing beside another {colour} thing" for colour in COLOURS]
MAPPINGS = {
    "limber": {"kind": "linear"},
    "mapl": {"kind": "transformer", "tokens": 3, "width": 16, "layers": 2, "heads": 2},
}


def write_backbones(folder: Path) -> Path:
    """FOLDER/clip, a CLIP's export, and FOLDER/lm, a causal LM that knows `CAPTIONS` but no pictures."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    clip = Clip({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, ObjectiveConfig())
    export(clip, clip.state_dict(), {"size": [32, 32]}, folder / "clip")
    tokenizer = train_bpe(CAPTIONS, 300)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    special = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    ids = [[*special[0], *tokenizer(text, add_special_tokens=False)["input_ids"], *special[1]] for text in CAPTIONS]
    steps = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    for _ in range(150):
        lm(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
        steps.step()
        steps.zero_grad()
    lm.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(str(folder / "lm"))
    return folder


def arguments(backbones: Path, name: str) -> list[str]:
    """The words of `gemsmith train` for one of `MAPPINGS` between the two."""
    words = ["--config", f"recipes/train/tiny_{name}.yaml", "--mmgem.mapping", json.dumps(MAPPINGS[name])]
    words += ["--mmgem.vision.arch", f"local-dir:{backbones / 'clip'}"]
    for section in ("language", "tokenizer"):
        words += [f"--mmgem.{section}.name_or_path", str(backbones / "lm")]
    return words


def bridge_config(backbones: Path, name: str, *overrides: str) -> TrainConfig:
    return parse([*arguments(backbones, name), "--data", ".", "--out", ".", *overrides])[0]
