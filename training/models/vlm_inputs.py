"""Texts and pictures as a vision-language backbone wants them: image tokens, padding, pixel tensors, chunks.

A row is a query and its targets (the positive first, then hard negatives), each
a text, a picture, or both. MMEB marks a picture's place by `<|image_1|>`; here
it becomes what the backbone's own processor expects. Long texts are cut before
the picture's tokens are put in, so that these are never cut.

Each side of a chunk shows at least one picture: where no row does, a blank row
is added whose embedding nobody reads. Otherwise one rank would run the vision
tower and another would not, and ZeRO-3 would wait for ever. Its gradient is
exactly zero.

Pictures go in whole and with their aspect, at most `longest` pixels long where
the recipe says so. That is done here, to every picture that comes, so that a
model is trained, graded, searched and taken away with one and the same tensors.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from curation.errors import UserError, one_line
from training.data.images import fit
from training.data.rows import IMAGE, Item, Row

QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
PLACES = {"qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN, "phi3_v": IMAGE}
"""What stands for a picture where it is more than the processor's image token."""

ALONE = ("phi3_v",)
"""Processors that read one text at a time, and mark a picture by ids below 0 instead of a token of its own."""
SENSES = ("image", "video", "audio")
"""What a processor may have tokens for."""
OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")

REFUSED = {"paligemma": "it reads no text without a picture, so targets that are texts have no embedding"}
"""Why a backbone cannot be one."""


BLANK = Image.new("RGB", (32, 32))


def instruct(task: str, query: str = "", image: bool = False) -> str:
    """`[IMAGE] Instruct: {task} Query: {query}` (VLM2Vec, arXiv 2410.05160, section 3.2)."""
    return f"{IMAGE + ' ' if image else ''}Instruct: {task} Query: {query}".rstrip()


class Inputs:
    """The tensors of rows, through the backbone's own processor."""

    def __init__(
        self, processor: Any, config: Any, *, max_tokens: int, negatives: int = 0, longest: int | None = None
    ) -> None:
        """
        Args:
            processor: `AutoProcessor` of the backbone · config: the backbone's.
            max_tokens: of a text, without its picture's · negatives: hard negatives that each row has room for.
            longest: pixels of a picture's longest side, above which it is scaled down; None: it is left as it is.

        Raises:
            UserError: a backbone that cannot be one, without pad or image token, or whose processor has another or
                takes no texts beside pictures.
        """
        if (why := REFUSED.get(config.model_type)) is not None:
            raise UserError(f"vlm2vec: {config.model_type} cannot embed here: {why}; take another backbone")
        tokenizer, name = getattr(processor, "tokenizer", None), type(processor).__name__
        if tokenizer is None or getattr(processor, "image_processor", None) is None:
            raise UserError(f"vlm2vec: {name} has no tokenizer or no image processor; take an image-text-to-text model")
        if tokenizer.pad_token_id is None:
            raise UserError("vlm2vec: the backbone's tokenizer has no pad token; set `pad_token` in its folder")
        self.processor, self.tokenizer, self.max_tokens, self.negatives = processor, tokenizer, max_tokens, negatives
        self.longest = longest
        self.alone = config.model_type in ALONE
        if self.alone:
            self.place = PLACES[config.model_type]
            self._forbid(r"<\|image_(?!1\|>)\d+\|>")
            return
        token = getattr(processor, "image_token", None)
        if token is None or tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise UserError("vlm2vec: the backbone's tokenizer has no image token; take a model with one")
        wanted = getattr(config, "image_token_id", None)
        shown = [tokenizer.convert_tokens_to_ids(token), *processor.image_token_ids]  # Gemma3 writes it by another
        if wanted not in shown:
            raise UserError(
                f"vlm2vec: the backbone's image_token_id {wanted} is not {token} ({shown[0]}) of its tokenizer; "
                "take the two from one folder"
            )
        self.place = PLACES.get(config.model_type, token)
        ids = [i for sense in SENSES for i in getattr(processor, f"{sense}_token_ids", ())]
        named = [getattr(processor, f"{sense}_token", None) for sense in SENSES]
        named += [tokenizer.convert_ids_to_tokens(i) for i in {wanted, *ids} - {None, tokenizer.unk_token_id}]
        self.special = {word for word in named if word}
        self._forbid("|".join(re.escape(word) for word in sorted(self.special)))
        try:  # here, and not in a loader's thread; Mllama's reads no text beside pictures
            self.side([Item(text="a"), Item(image=BLANK), Item(image=BLANK)])
        except Exception as error:  # processors raise almost anything
            raise UserError(
                f"vlm2vec: {name} makes no chunk of a text and two pictures ({one_line(error, 120)}); "
                "take another backbone"
            ) from None

    def _forbid(self, words: str) -> None:
        """words: a pattern of what no text may bring by itself, since it stands for a picture, a film or a sound."""
        self._forged, self._marked = re.compile(words), re.compile(f"{words}|{re.escape(IMAGE)}")

    def text(self, item: Item) -> str:
        """The text as the processor wants it: cut to `max_tokens`, and with one image token just where a picture is."""
        before, mark, after = _without(self._forged, item.text).partition(IMAGE)
        if item.image is None:
            plain, _ = self._cut(_without(self._marked, before + after), self.max_tokens)
            return plain.strip() or "."  # a side without a token has no last one
        before, left = self._cut(before, self.max_tokens)
        after, _ = self._cut(_without(self._marked, after), left)
        return f"{before}{self.place}{after}" if mark else f"{self.place} {before}".rstrip()

    def _cut(self, text: str, budget: int) -> tuple[str, int]:
        """The longest beginning of the text that fits, and what is left of the budget."""
        if not text:
            return "", budget
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(found) <= budget:
            return text, budget - len(found)
        return (text[: found[budget][0]] if budget else ""), 0

    def side(self, items: Sequence[Item], *, picture: bool = True) -> dict[str, torch.Tensor]:
        """What the processor makes of these items: ids and masks [n, T], and the pictures' tensors.

        picture: see that there is one, by a blank row at the end (n is one more then).
        """
        items = list(items)
        if picture and all(item.image is None for item in items):
            items.append(Item(image=BLANK))
        # RGB first, as training decodes: a palette could not be scaled smoothly.
        rows = [[] if item.image is None else [fit(item.image.convert("RGB"), self.longest)] for item in items]
        if self.alone:
            return self._one_by_one([self.text(item) for item in items], rows)
        found = self.processor(
            text=[self.text(item) for item in items],
            images=rows if any(rows) else None,  # by text: one list many would take for the pictures of one text
            padding=True,
            return_tensors="pt",
        )
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def _one_by_one(self, texts: Sequence[str], pictures: Sequence[list[Any]]) -> dict[str, torch.Tensor]:
        """As the processor makes each alone, padded on the tokenizer's side; pictures' tensors one after the other."""
        made = [self.processor(text=t, images=row or None, return_tensors="pt") for t, row in zip(texts, pictures)]
        longest = max(one["input_ids"].shape[1] for one in made)
        found: dict[str, list[torch.Tensor]] = {}
        for one in made:
            short = longest - one["input_ids"].shape[1]
            sides = (short, 0) if self.tokenizer.padding_side == "left" else (0, short)
            for name, x in one.items():
                if name in OF_TOKENS:
                    x = F.pad(x, sides, value=self.tokenizer.pad_token_id if name == "input_ids" else 0)
                found.setdefault(name, []).append(x)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def collate(self, rows: Sequence[Row | None]) -> dict[str, torch.Tensor]:
        """A chunk; None is a hole without weight, and so becomes a row with a picture that the processor refuses alone.

        Returns:
            valid bool [c] · right_valid bool [c, m], m = 1 + negatives · query.* · target.*: tensors of `side`, the
            targets that there are, flat · target.rows int64 [n]: the place of each in [c * m].
        """
        try:
            return self._collated(rows)
        except Exception:  # processors raise almost anything: Qwen's, of pictures 200 times as long as wide
            whole = [row if row and self._seen(row) else None for row in rows]
            if whole == list(rows):
                raise
            return self._collated(whole)

    def _seen(self, row: Row) -> bool:
        """Whether the processor takes each picture of the row alone."""
        for item in (row.query, row.positive, *row.negatives[: self.negatives]):
            try:
                self.side([Item(image=item.image)], picture=False)
            except MemoryError:  # of the machine, not of the picture
                raise
            except Exception:
                return False
        return True

    def _collated(self, rows: Sequence[Row | None]) -> dict[str, torch.Tensor]:
        width = 1 + self.negatives
        queries, targets, places = [], [], []
        right_valid = torch.zeros(len(rows), width, dtype=torch.bool)
        for number, row in enumerate(rows):
            queries.append(row.query if row else Item())
            for slot, item in enumerate([row.positive, *row.negatives][:width] if row else []):
                targets.append(item)
                places.append(number * width + slot)
                right_valid[number, slot] = True
        sides = {"query": self.side(queries), "target": self.side(targets)}
        return {
            "valid": torch.tensor([row is not None for row in rows]),
            "right_valid": right_valid,
            "target.rows": torch.tensor(places, dtype=torch.long),
            **{f"{side}.{name}": value for side, found in sides.items() for name, value in found.items()},
        }


def _without(words: re.Pattern[str], text: str) -> str:
    """Anew until nothing changes: what is taken out of a word may leave another."""
    while (left := words.sub("", text)) != text:
        text = left
    return text


def of_side(chunk: Mapping[str, torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """The backbone's arguments of one side of a chunk."""
    start = f"{side}."
    return {
        name.removeprefix(start): x for name, x in chunk.items() if name.startswith(start) and name != "target.rows"
    }
