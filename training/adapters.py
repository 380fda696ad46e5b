"""Adapters by recipe, for every family: LoRA, DoRA, VeRA, QLoRA and prompt tuning, through peft.

peft's layers are put into the named module in place, so a family's code does
not change, and parameter names stay those of the model (ZeRO, checkpoints and
`optim.groups` see no wrapper). All of that module is frozen but the adapter and
`modules_to_save`; the rest of the model trains as the recipe says.

A prompt is prepended by hooks on the module's text decoder, and its states are
cut off again: positions of tokens are the same before and after, so pooling and
losses do not know of it. Positions come from the attention mask, so that left
padding does not move a text away from the prompt.

The exported adapter is peft's own folder: `PeftModel.from_pretrained` opens it
around the bare module. `backbone.json` in it knows the weights that it was
trained around. `trained.safetensors` beside it holds every tensor that trained,
so the run's recipe and its backbone make the whole model again.
"""

import inspect
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from curation.errors import UserError, one_line
from curation.hashing import config_hash, hash64
from training.config import AdapterConfig, GroupConfig
from training.models import dropout
from training.models.head import Head
from training.models.kind import check_whole, json_of

BLOCK = 64  # weights that share a scale, as in QLoRA
FOLDER, TRAINED, BACKBONE = "adapter", "trained.safetensors", "backbone.json"
PREFIX = "base_model.model."
"""What peft writes before the names of a wrapped module's parameters."""


def apply(model: nn.Module, config: AdapterConfig) -> None:
    """Freeze the module that the recipe names and put its adapter in.

    Raises:
        UserError: no such module, nothing in it that matches, no bitsandbytes, or `init_from` of another backbone.
    """
    module = _module(model, config)
    if config.kind == "prompt":
        _put_prompt(module, config)
    else:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        if config.kind == "qlora":
            _quantise(module, config)
        settings = _peft_config(module, config)
        try:
            # The tuner works in place. (`inject_adapter_in_model` does just this, but refuses VeRA.)
            PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type](module, settings, adapter_name="default")
        except ValueError as error:
            raise UserError(f"adapter.target_modules: {one_line(error)}") from None
        if name := next((n for n, x in _unreached(module).items() if not isinstance(x, nn.Linear)), None):
            raise UserError(
                f"adapter.target_modules: {name} is part of torch's attention, which passes an adapter by; leave it out"
            )
        heads = [name for name, x in module.named_modules() if isinstance(getattr(x, "base_layer", None), Head)]
        if heads:
            raise UserError(
                f"adapter.target_modules: {heads[0]} gives a loss, to which an adapter could add nothing; leave it out"
            )
        dropout.put_in(module)
    if config.init_from is not None:
        load(module, Path(config.init_from))


def _module(model: nn.Module, config: AdapterConfig) -> Any:
    try:
        return model.get_submodule(config.module)
    except AttributeError:
        named = ", ".join(name for name, _ in model.named_children())
        raise UserError(f"adapter.module: the model has no {config.module!r}; it has {named}") from None


def round_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring VeRA's frozen matrices to the type of the vectors that peft multiplies them with: they are buffers, and the
    engine rounds parameters alone."""
    for name, buffer in model.named_buffers():
        if {"vera_A", "vera_B"} & {*name.split(".")}:
            buffer.data = buffer.data.to(dtype)


def check_groups(model: nn.Module, config: AdapterConfig, groups: Sequence[GroupConfig]) -> None:
    """
    Raises:
        UserError: `optim.groups` freezes the adapter, too.
    """
    for name, parameter in _module(model, config).named_parameters(prefix=config.module):
        rule = next((group for group in groups if re.search(group.pattern, name)), None)
        if parameter.requires_grad and rule is not None and rule.frozen:
            raise UserError(
                f"optim.groups: the pattern {rule.pattern!r} freezes the adapter in {config.module} as well; leave "
                f"{config.module} out of it: all but the adapter is frozen there"
            )


def _origin(module: nn.Module) -> dict[str, Any]:
    """What peft writes of the module that an adapter belongs to."""
    return {
        "base_model_name_or_path": getattr(module, "name_or_path", None) or None,
        "auto_mapping": {"base_model_class": type(module).__name__, "parent_library": type(module).__module__},
    }


def _peft_config(module: Any, config: AdapterConfig) -> Any:
    import peft

    targets: Any = config.target_modules
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    spared = [*_unreached(module).values(), *(x for x in module.modules() if isinstance(x, Head) and x is not head)]
    if targets == "all-linear" and (spared or head is None):
        # peft spares the output head of transformers' models alone: not ours, which give a loss, to which nothing can
        # be added, nor what torch's attention passes by.
        left_out = {id(head), *map(id, spared)}
        targets = [n for n, x in module.named_modules() if isinstance(x, nn.Linear) and id(x) not in left_out]
    shared: dict[str, Any] = {
        **_origin(module),
        "target_modules": targets,
        "modules_to_save": config.modules_to_save or None,
        "r": config.r,
    }
    if config.kind == "vera":
        return peft.VeraConfig(vera_dropout=config.dropout, **shared)
    return peft.LoraConfig(
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_dora=config.kind == "dora",
        **shared,
    )


def _unreached(module: nn.Module) -> dict[str, Any]:
    """By name: the linear layers whose weights torch's own attention reads, past whatever is put around them."""
    found = ((name, x) for name, x in module.named_modules() if isinstance(x, nn.MultiheadAttention))
    return {f"{name}.out_proj": x.out_proj for name, x in found}


def _quantise(module: Any, config: AdapterConfig) -> None:
    """Linear layers of the module become NF4 with double quantisation (Dettmers 2023); the output head stays, and what
    has rows of no whole blocks, which bitsandbytes' AVX-512 kernel unpacks to other weights (seen in 0.50.2)."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise UserError(
            "adapter.kind: qlora needs bitsandbytes, which is not installed; install it, or take kind: lora"
        ) from None
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, layer in list(module.named_modules()):
        saved = any(part in config.modules_to_save for part in name.split("."))
        if type(layer) is not nn.Linear or layer is head or saved or layer.in_features % BLOCK:
            continue
        sizes = (layer.in_features, layer.out_features)
        packed: Any = bnb.nn.Linear4bit(*sizes, bias=layer.bias is not None, quant_type="nf4", device="meta")
        packed.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", blocksize=BLOCK)
        packed.bias = layer.bias
        try:
            packed.to(device)
        except Exception as error:  # whatever a build without this device raises
            raise UserError(
                f"adapter.kind: bitsandbytes cannot pack weights on this {device.type} "
                f"({one_line(error, 120)}); "
                "take kind: lora"
            ) from None
        packed.register_load_state_dict_pre_hook(_keep_packed)
        packed.register_load_state_dict_post_hook(_not_missing)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, packed)
    for block in module.modules():
        if hasattr(block, "get_weight_dtype"):  # open_clip's, which casts texts to the type of a layer packed above
            block.get_weight_dtype = MethodType(_type_of_numbers, block)


def _type_of_numbers(block: nn.Module) -> torch.dtype:
    return next(p.dtype for p in block.parameters() if p.is_floating_point())


def _keep_packed(module: Any, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Packed weights are made from the backbone again, bit for bit; those in a state are left aside."""
    module.left_aside = prefix + "weight"
    for name in [name for name in state if name.startswith(module.left_aside)]:
        del state[name]


def _not_missing(module: Any, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name != module.left_aside]


def _put_prompt(module: Any, config: AdapterConfig) -> None:
    from peft import PromptEmbedding, PromptTuningConfig

    decoder = module.get_decoder() if hasattr(module, "get_decoder") else None
    if decoder is None or "inputs_embeds" not in inspect.signature(decoder.forward).parameters:
        raise UserError(f"adapter.module: a prompt needs a transformers language model; {config.module!r} is none")
    ready = UserError(
        f"adapter.kind: {type(module).__name__} hands its decoder masks that are made already, without room for a "
        "prompt; take lora"
    )
    if decoder is not module.base_model and hasattr(module, "create_masks_for_generate"):  # Gemma3's kind
        raise ready
    sizes = decoder.config.get_text_config()
    settings = PromptTuningConfig(
        **_origin(module),
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=config.tokens,
        num_transformer_submodules=1,
        token_dim=sizes.hidden_size,
        num_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        prompt_tuning_init="SAMPLE_VOCAB",  # type: ignore[arg-type]
    )
    module.requires_grad_(False)
    decoder.prompt_encoder = PromptEmbedding(settings, decoder.get_input_embeddings())
    module.peft_config = {"default": settings}
    tokens = config.tokens

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = args[0] if args else kwargs.pop("input_ids", None)
        words = kwargs.get("inputs_embeds")
        words = decoder.get_input_embeddings()(ids) if words is None else words  # [B, T, H]
        mask, places, past = (kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
        first = past is None or past.get_seq_length() == 0
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
                raise ready
            mask = torch.cat([mask.new_ones(len(mask), tokens), mask], 1)
        if places is not None:
            places = places + tokens
        if first:
            prompt = decoder.prompt_encoder(torch.arange(tokens, device=words.device))
            words = torch.cat([prompt.to(words.dtype).expand(len(words), -1, -1), words], 1)
            if (seen := kwargs.get("visual_pos_masks")) is not None:  # [B, T]: where Qwen3-VL adds to the states
                kwargs["visual_pos_masks"] = torch.cat([seen.new_zeros(len(seen), tokens), seen], 1)
            if places is not None:
                own = torch.arange(tokens, device=words.device).expand(*places.shape[:-1], -1)
                places = torch.cat([own, places], -1)
            elif mask is not None:
                places = (mask.cumsum(1) - 1).clamp(min=0)
        decoder.prompted = first
        kwargs.update(inputs_embeds=words, attention_mask=mask, position_ids=places)
        return (), kwargs

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if decoder.prompted:
            out.last_hidden_state = out.last_hidden_state[:, tokens:]
            if out.get("hidden_states") is not None:
                out.hidden_states = tuple(state[:, tokens:] for state in out.hidden_states)
        return out

    decoder.register_forward_pre_hook(before, with_kwargs=True)
    decoder.register_forward_hook(after, with_kwargs=True)


def _adapter_state(module: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names that peft saves them under."""
    from peft.utils import get_peft_model_state_dict

    if module.peft_config["default"].is_prompt_learning:
        return {"prompt_embeddings": module.get_decoder().prompt_encoder.embedding.weight.detach()}
    state = module.state_dict()
    for shared in ("vera_A", "vera_B"):  # VeRA's frozen matrices are one for all layers
        name = next((name for name in state if name.endswith(f".{shared}.default")), None)
        if name is not None:
            state[f"base_model.{shared}.default"] = state[name]
    found = get_peft_model_state_dict(module, state_dict=state, save_embedding_layers=False)
    return {name if name.startswith("base_model.") else PREFIX + name: tensor for name, tensor in found.items()}


def export(model: nn.Module, config: AdapterConfig, folder: Path) -> None:
    """Write FOLDER as peft's `save_pretrained` does, BACKBONE in it, and TRAINED: all that the recipe cannot make
    again."""
    module = _module(model, config)
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.contiguous().clone() for n, t in _adapter_state(module).items()}, target / "adapter_model.safetensors"
    )
    settings = module.peft_config["default"]
    training, settings.inference_mode = settings.inference_mode, True
    settings.save_pretrained(str(target))
    settings.inference_mode = training
    (target / BACKBONE).write_text(json.dumps(_fingerprint(module), indent=1))
    trained = {name: p.detach().contiguous().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / TRAINED)


def _fingerprint(module: nn.Module, names: Collection[str] | None = None) -> dict[str, str]:
    """{name in the bare module: hash of 64 of its values}, of these frozen tensors, or of 32 drawn by their names.

    Values count as bf16, in which a checkpoint may hold them; packed ones (QLoRA's) do not.
    """
    frozen = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter.detach().flatten()
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and not parameter.requires_grad
    }
    if names is None:
        names = sorted(frozen, key=lambda name: hash64("backbone", name))[:32]
    parts = {n: frozen[n][:: max(1, frozen[n].numel() // 64)][:64].bfloat16().float() for n in names if n in frozen}
    return {name: config_hash(values.tolist()) for name, values in parts.items()}


def _same_backbone(module: Any, folder: Path, field: str) -> None:
    """
    Raises:
        UserError: the adapter in this folder was trained around other weights of the same shapes.
    """
    if not (folder / BACKBONE).exists():
        return  # peft's own
    written = json_of(folder / BACKBONE, field)
    found = _fingerprint(module, written)
    if name := next((name for name in sorted(found) if found[name] != written[name]), None):
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise UserError(
            f"{field}: {folder} is of another backbone: {name} has other values here; "
            f"take {base or 'the backbone'} that it was trained with"
        )


def read_export(model: nn.Module, config: AdapterConfig, folder: Path) -> dict[str, torch.Tensor]:
    """The whole state of a model whose recipe made it again, with what trained as `export` wrote it.

    Raises:
        UserError: the tensors are not those of this model, or its backbone is not what they were trained with.
    """
    trained, state = load_file(folder / TRAINED), model.state_dict()
    _fits(trained, {n: p for n, p in model.named_parameters() if p.requires_grad}, folder / TRAINED)
    _same_backbone(_module(model, config), folder / FOLDER, "adapter")
    return {**state, **trained}


def load(module: Any, folder: Path) -> None:
    """Give a module's adapter the values in a peft folder.

    Raises:
        UserError: no adapter there, one that is cut short, or one of another kind, rank or backbone.
    """
    check_whole(folder, "adapter.init_from")
    try:
        written = json_of(folder / "adapter_config.json", "adapter.init_from")
        tensors = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"adapter.init_from: {folder} holds no {Path(error.filename or str(error)).name}") from None
    kind, own = written["peft_type"], module.peft_config["default"].peft_type.value
    if kind != own:
        raise UserError(f"adapter.init_from: {folder} is a {kind} adapter, the recipe's is {own}; make them one")
    base = (written.get("auto_mapping") or {}).get("base_model_class", type(module).__name__)
    if base != type(module).__name__:
        raise UserError(
            f"adapter.init_from: {folder} is of another backbone: it belongs to a {base}, not to a "
            f"{type(module).__name__}; take the backbone that it was trained with"
        )
    wanted = _adapter_state(module)
    _fits(tensors, wanted, folder)
    _same_backbone(module, folder, "adapter.init_from")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def _fits(found: dict[str, torch.Tensor], wanted: dict[str, Any], where: Path) -> None:
    for name in sorted({*found, *wanted}):
        shapes = [tuple(side[name].shape) if name in side else "nothing" for side in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"adapter: {where} is of another backbone: {name} is {shapes[0]} there and {shapes[1]} here; "
                "take the recipe and backbone that it was trained with"
            )


def merge(model: nn.Module, config: AdapterConfig) -> None:
    """Add the adapter into the weights and take peft's layers out again, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    module = _module(model, config)
    for name, layer in list(module.named_modules()):
        plain = None
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            plain = layer.get_base_layer()
        elif isinstance(layer, ModulesToSaveWrapper):
            plain = layer.modules_to_save["default"]
        if plain is not None:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, plain)
    del module.peft_config
