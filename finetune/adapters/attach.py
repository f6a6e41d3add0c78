"""An adapter of any kind onto a model: a new one to train (`attach_adapter`), or one that was read (`install`)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...base.model.attention import Attention
from ...base.model.norm import RMSNorm
from ...base.model.transformer import Transformer
from .adapter import EMBEDDING, HEAD, Adapter
from .bottleneck import AFTER, Bottleneck, fresh_tensors
from .config import DEFAULT, LoraConfig
from .dora import DoRA
from .lora import LoRALinear, LowRank, adapted_layers, attach_lora, linears, replace_module, width, wrapped
from .own_weights import AdaptedModule, OwnModule, TokenRows, own_places
from .prefix import SLOT, PrefixKeys, PrefixSlot, split_embeddings
from .selection import choosing, registry_of


def attach_adapter(
    model: Transformer, config: LoraConfig, *, seed: int = 0, name: str = DEFAULT, shapes_only: bool = False
) -> None:
    """Freeze the model and give it a new adapter of the config's kind, which is the default from now on and alone trains.

    It changes nothing before its first step, but for a prefix. `shapes_only`: for a model whose tensors have no values. Raises
    ValueError for what the config names and the model hasn't, and for a name that is taken.
    """
    if config.adapter_kind == "lora":
        check_own_weights(model, config)
        attach_lora(model, config, seed=seed, name=name, shapes_only=shapes_only)
        attach_own_weights(model, config, name)
        return
    if any(name in layer.updates for _, layer in adapted_layers(model)):
        raise ValueError(f"the model has an adapter {name!r} already; choose another name, or remove_adapter first")
    model.requires_grad_(False)
    if config.adapter_kind == "prefix":
        check_prefix(model)
        start = _zeros(model, config) if shapes_only else activations(model, config.prefix_tokens, seed)
        install_prefix(model, name, start, trained=True)
    else:
        generator = torch.Generator().manual_seed(seed)
        device = model.model.embed_tokens.weight.device
        for path, linear in bottleneck_places(model):
            tensors = fresh_tensors(width(linear, "out_features"), config.bottleneck_size, generator, device)
            wrapped(model, path).add(name, Bottleneck(tensors, dropout=config.dropout, trained=True))
    registry_of(model).default = name


def install(model: Transformer, name: str, adapter: Adapter) -> None:
    """Put an adapter that fits (files.check_fits) onto the model, frozen, in the base's dtype; it acts where it is chosen."""
    weight = model.model.embed_tokens.weight
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    for path, (a, b, scale) in adapter.layers.items():
        layer, a, b = wrapped(model, path), a.to(**place), b.to(**place)
        magnitude = adapter.magnitudes.get(path)
        if magnitude is None:
            layer.add(name, LowRank(a, b, scale, trained=False))
        else:
            layer.add(name, DoRA(layer.base, a, b, scale, magnitude.to(weight.device).float(), trained=False))
    for path, tensors in adapter.modules.items():
        put(model, path, name, OwnModule, {key: tensor.to(**place) for key, tensor in tensors.items()}, trained=False)
    if adapter.shares_head(model.config.tie_embeddings):
        put(model, HEAD, name, OwnModule, own_update(model, EMBEDDING, name)._parameters, trained=False)
    for path, (ids, rows) in adapter.token_rows.items():
        put(model, path, name, TokenRows, torch.tensor(ids, device=weight.device), rows.to(**place), trained=False)
    if model.config.tie_embeddings and {*adapter.token_rows} == {EMBEDDING}:
        share_rows(model, name)
    for path, tensors in adapter.bottlenecks.items():
        moved = {key: tensor.to(**place) for key, tensor in tensors.items()}
        wrapped(model, path).add(name, Bottleneck(moved, trained=False))
    if adapter.prefix is not None:
        install_prefix(model, name, split_embeddings(adapter.prefix.to(weight.device), model.config), trained=False)


# --- weights of its own --------------------------------------------------------------------------------------------


def saved_paths(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The modules that modules_to_save means: those whose paths end in one of the names (PEFT's rule).

    Raises ValueError for a name that no module has, and for one of several parts.
    """
    places = [path for path, _ in own_places(model)]
    for name in names:
        if any(path.endswith(name) for path in places):
            continue
        if any(path.endswith(name) for path, _ in model.named_modules()):
            raise ValueError(
                f"modules_to_save names {name}, no embedding, linear or norm; name those, such as {places[-1]}"
            )
        known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in places))
        raise ValueError(f"modules_to_save names {name!r}, which this model hasn't; it has {known}")
    return [path for path in places if any(path.endswith(name) for name in names)]


def check_own_weights(model: Transformer, config: LoraConfig) -> None:
    """Raise ValueError for modules and token ids that the model hasn't, or whose training would not be what it seems."""
    paths, ids, tied = (
        saved_paths(model, config.modules_to_save),
        config.trainable_token_indices,
        model.config.tie_embeddings,
    )
    bare = dict(own_places(model))
    for path in paths:
        weight = getattr(bare[path], "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ValueError(
                f"modules_to_save names {path}, which is held in 4 bits and can't train; leave it out, or use lora"
            )
    if ids and max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"trainable_token_indices holds {max(ids)}; the model's ids are 0 to {model.config.vocab_size - 1}"
        )
    if ids and (EMBEDDING in paths or (tied and HEAD in paths)):
        raise ValueError(
            "modules_to_save trains the embedding in full, trainable_token_indices rows of it; choose one of them"
        )
    one_of_two = (EMBEDDING in paths) != (HEAD in paths)
    if tied and one_of_two and not (config.ensure_weight_tying and EMBEDDING in paths):
        raise ValueError(
            "the base ties lm_head to embed_tokens, and modules_to_save names one of them, so that they would come apart; name "
            "embed_tokens and set ensure_weight_tying=true, or name both to train two copies"
        )


def attach_own_weights(model: Transformer, config: LoraConfig, name: str) -> None:
    """Add the modules that train in full and the embedding's rows to a new adapter, as float32 copies of the base's."""
    paths, bare, tied = saved_paths(model, config.modules_to_save), dict(own_places(model)), model.config.tie_embeddings
    for path in paths:
        if path == HEAD and tied and config.ensure_weight_tying:
            continue
        copies = {key: tensor.detach().float().clone() for key, tensor in bare[path].named_parameters(recurse=False)}
        put(model, path, name, OwnModule, copies, trained=True)
    if tied and config.ensure_weight_tying and EMBEDDING in paths:
        put(model, HEAD, name, OwnModule, own_update(model, EMBEDDING, name)._parameters, trained=True)
    if config.trainable_token_indices:
        ids = torch.tensor(config.trainable_token_indices, device=model.model.embed_tokens.weight.device)
        rows = model.model.embed_tokens.weight.detach()[ids].float()
        put(model, EMBEDDING, name, TokenRows, ids, rows, trained=True)
        if tied:
            share_rows(model, name)


def share_rows(model: Transformer, name: str) -> None:
    """The head of a tied model takes the embedding's own rows too: one parameter, two uses."""
    rows = own_update(model, EMBEDDING, name)
    put(model, HEAD, name, TokenRows, rows.ids, rows.rows, trained=rows.rows.requires_grad)


def put(
    model: Transformer, path: str, name: str, kind: type[OwnModule | TokenRows], *made_of: Any, trained: bool
) -> None:
    """Give the module at `path` an update of that kind, wrapping the module if it is bare."""
    module = model.get_submodule(path)
    if isinstance(module, LoRALinear) or hasattr(module, "in_features"):
        layer = wrapped(model, path)
        add = layer.add
    else:
        layer = (
            module
            if isinstance(module, AdaptedModule)
            else AdaptedModule(module, registry_of(model)).train(module.training)
        )
        replace_module(model, path, layer)
        add = layer.add_update
        if isinstance(layer.base, RMSNorm):
            model.fused_decoding = False
    if name in layer.updates:
        raise ValueError(
            f"{path} would be adapted in two ways by {name!r}; leave it out of one of them (exclude_modules)"
        )
    add(name, kind(layer.base, *made_of, trained=trained) if kind is OwnModule else kind(*made_of, trained=trained))


def own_update(model: nn.Module, path: str, name: str) -> Any:
    """The update of that name of the layer at `path`."""
    layer: Any = model.get_submodule(path)
    return layer.updates[name]


# --- prefix and bottleneck -----------------------------------------------------------------------------------------


def bottleneck_places(model: Transformer) -> list[tuple[str, nn.Module]]:
    """(path, linear) of every linear whose output a bottleneck changes. Raises ValueError for mixtures of experts."""
    if model.config.n_experts:
        raise ValueError(
            "adapter_kind=bottleneck is not covered for mixtures of experts; use adapter_kind=lora or prefix"
        )
    if model.config.n_linear_layers:
        raise ValueError("adapter_kind=bottleneck is not covered for linear attention layers; use adapter_kind=lora")
    return [(path, linear) for path, linear in linears(model) if path.rpartition(".")[2] in AFTER]


def check_prefix(model: Transformer) -> None:
    """Raise ValueError for a model whose layers don't see every earlier token: a prefix would slide out of their window."""
    if any(model.config.layer(i).window is not None for i in range(model.config.n_layers)):
        raise ValueError(
            "adapter_kind=prefix is not covered for layers with a sliding window; use adapter_kind=lora or bottleneck"
        )
    if model.config.n_linear_layers:
        raise ValueError(
            "adapter_kind=prefix is not covered for linear attention layers, which have no keys; use adapter_kind=lora"
        )
    if model.config.d_latent is not None:
        raise ValueError(
            "adapter_kind=prefix is not covered for latent attention, which keeps no keys; use adapter_kind=lora or bottleneck"
        )


def install_prefix(model: Transformer, name: str, layers: Sequence[tuple[Tensor, Tensor]], *, trained: bool) -> None:
    """Give each layer's attention its keys and values (P, K, Dh) under a name."""
    for layer, (keys, values) in zip(model.model.layers, layers, strict=True):
        attention = layer.self_attn
        if attention.prefix is None:
            setattr(attention, SLOT, PrefixSlot(registry_of(model), model.config))
        assert isinstance(attention.prefix, PrefixSlot)
        attention.prefix.add_update(
            name, PrefixKeys(keys, values, model.config, rotates=attention.spec.rotates, trained=trained)
        )


@torch.no_grad()
def activations(model: Transformer, n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values (P, K, Dh) float32 at `n` ids drawn at random: prefixes that start from what the base knows
    train faster and better than random ones (Li & Liang, section 7.4)."""
    ids = torch.randint(model.config.vocab_size, (1, n), generator=torch.Generator().manual_seed(seed))
    found: list[list[Tensor]] = []
    handles = []
    for layer in model.model.layers:
        pair: list[Tensor] = []
        found.append(pair)
        attention = layer.self_attn
        assert isinstance(attention, Attention)  # check_prefix
        for linear in (attention.k_proj, attention.v_proj):
            handles.append(linear.register_forward_hook(_keep(pair)))
    try:
        with choosing(registry_of(model), None):
            model.hidden_states(ids.to(model.model.embed_tokens.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    shape = (n, model.config.n_kv_heads, model.config.d_head)
    layers = []
    for layer, (keys, values) in zip(model.model.layers, found, strict=True):
        if model.config.qk_norm:
            assert isinstance(layer.self_attn, Attention)
            keys = layer.self_attn.k_norm(keys if model.config.qk_norm_joint else keys.view(shape)).view(shape)
        layers.append((keys.float().reshape(shape).clone(), values.float().reshape(shape).clone()))
    return layers


def _keep(outputs: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    """A forward hook that keeps the first row of a module's output."""
    return lambda module, inputs, out: outputs.append(out[0])


def _zeros(model: Transformer, config: LoraConfig) -> list[tuple[Tensor, Tensor]]:
    shape = (config.prefix_tokens, model.config.n_kv_heads, model.config.d_head)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.config.n_layers)]
