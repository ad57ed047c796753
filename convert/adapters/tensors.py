"""Whether an adapter's tensors are what its `adapter_config.json` and the model call for: every difference, both ways, and its kind."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Literal

import safetensors

from convert.adapters.config import AdapterConfig, Target
from convert.adapters.file import are_equal, is_finite
from convert.adapters.whole import Whole, saveable
from convert.files.names import VOCABULARY, Names, is_saved
from convert.files.names import Target as Key
from qlora_jax.base.errors import shown
from qlora_jax.base.reading import reading
from qlora_jax.model.architecture import Architecture

DAMAGED, DAMAGED_FIX = "a damaged safetensors file", "save the adapter again"

Shape = tuple[int, ...]
Kind = Literal[
    "empty", "missing", "unknown", "named by state_dict", "not a target", "too deep", "vocabulary", "rank", "not gathered", "shape",
    "dtype", "not finite", "copies", "tied", "tie lost", "peft only", "no target", "token",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a tensor or a setting, and of which kind that is, from which follows what to do."""

    kind: Kind
    text: str
    number: int | None = None
    """Of kind `vocabulary`: the rows that there are; of kind `shape`: the inputs of a decoder layer, where they can be told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What an adapter is to hold: names in its file → shapes."""

    required: Mapping[str, Shape]
    optional: Mapping[str, Shape]
    copies: tuple[tuple[str, str], ...]
    """Pairs of names that must hold the same values if both are there."""
    tied: tuple[tuple[str, str], ...]
    """The same of the embedding's adapter and the head's, the second transposed."""
    ignored: frozenset[str]


def tensor_problems(
    path: Path,
    settings: AdapterConfig,
    targets: Mapping[Key, Target],
    wholes: Mapping[str, Whole],
    config: Architecture,
) -> list[Problem]:
    """What is wrong with a safetensors file's tensors; some rows of one tensor at a time are read.

    Args:
        targets: every weight that the adapter must have a pair for.
        wholes: the tensors that it must or may store whole.

    Raises:
        InputError: the file cannot be read.
    """
    with reading(path, DAMAGED, fix=DAMAGED_FIX), safetensors.safe_open(path, framework="numpy") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
        found = {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
        del views
    if not found:
        return [Problem(kind="empty", text="no adapter tensors")]
    expected = _expected(settings, targets, wholes, config)
    problems = list(_setting_problems(settings, targets, config))
    problems += [
        Problem(kind="missing", text=f"{name} is missing, expected {shape}")
        for name, shape in expected.required.items()
        if name not in found
    ]
    shapes = {**expected.optional, **expected.required}
    strangers = sorted(found.keys() - shapes.keys() - expected.ignored)
    problems += [_unknown(name, config) for name in strangers]
    for name in sorted(found.keys() & shapes.keys()):
        problems += _tensor_problems(path, name, *found[name], shapes[name], config)
    return problems or [
        *_beyond_the_layers(targets, settings, config),
        *_disagreeing(path, expected, shapes, found.keys()),
        *_untied(path, wholes, found.keys(), settings, config),
    ]


def _expected(
    settings: AdapterConfig, targets: Mapping[Key, Target], wholes: Mapping[str, Whole], config: Architecture
) -> Expected:
    names, shapes, of_saveable = Names.of(config), _matrix_shapes(config), saveable(config)
    required: dict[str, Shape] = {}
    for (layer, name), target in targets.items():
        out_features, in_features = shapes[name] if name != "embed_tokens" else shapes[name][::-1]
        required[names.adapter(layer, name, "lora_a")] = (target.rank, in_features)
        required[names.adapter(layer, name, "lora_b")] = (out_features, target.rank)
        if settings.use_dora:
            required[names.magnitude(layer, name)] = (out_features,)
    tokens = settings.token_ids(names)
    for tensor, token_ids in tokens.items():
        required[names.token_rows(tensor)] = (len(token_ids), config.hidden_size)
    required |= {whole.key: of_saveable[tensor] for tensor, whole in wholes.items() if whole.is_required}
    optional = {key: of_saveable[tensor] for tensor, whole in wholes.items() for key in whole.keys}
    copies = [(whole.key, copy) for whole in wholes.values() for copy in whole.copies]
    tied = []
    if config.tie_word_embeddings and settings.ties and (embedding := targets.get((None, "embed_tokens"))) is not None:
        optional[names.adapter(None, "lm_head", "lora_a")] = (embedding.rank, config.hidden_size)
        optional[names.adapter(None, "lm_head", "lora_b")] = (config.vocab_size, embedding.rank)
        tied = [
            (names.adapter(None, "embed_tokens", one), names.adapter(None, "lm_head", other))
            for one, other in (("lora_a", "lora_b"), ("lora_b", "lora_a"))
        ]
    rows, copy = names.token_rows(names.embedding), names.token_rows(names.lm_head)
    if (
        config.tie_word_embeddings
        and rows in required
        and tokens.get(names.lm_head, ids := tokens[names.embedding]) == ids
    ):
        optional[copy] = required.pop(copy, required[rows])
        copies.append((rows, copy))
    ignored = (
        frozenset(names.velora(*key) for key in targets) if settings.settings.get("velora_config") else frozenset()
    )
    return Expected(required=required, optional=optional, copies=tuple(copies), tied=tuple(tied), ignored=ignored)


def _matrix_shapes(config: Architecture) -> dict[str, tuple[int, int]]:
    """(out, in) of everything that an adapter may change, by our names."""
    return config.linear_shapes() | dict.fromkeys(VOCABULARY, (config.vocab_size, config.hidden_size))


def _unknown(name: str, config: Architecture) -> Problem:
    parsed = Names.of(config).parse_adapter(name)
    if parsed is None:
        written = ".default" in name or not is_saved(name)
        return Problem(kind="named by state_dict" if written else "unknown", text=f"unknown tensor {shown(name)[1:-1]}")
    layer, linear, _ = parsed
    if layer >= config.num_hidden_layers:
        layers = f"the model has {config.num_hidden_layers} layers"
        return Problem(kind="too deep", text=f"layer {layer} of {linear}: {layers} ({name})")
    return Problem(kind="not a target", text=f"unknown tensor {name}: target_modules does not name this linear")


def _tensor_problems(
    path: Path, name: str, shape: Shape, dtype: str, expected: Shape, config: Architecture
) -> Iterator[Problem]:
    if shape != expected:
        text = f"{name} is of shape {shown(shape)}, expected {expected}"
        apart = [axis for axis, (here, there) in enumerate(zip(shape, expected, strict=False)) if here != there]
        kind: Kind = "shape"
        number = None
        if 0 in shape or len(shape) < len(expected):
            kind = "not gathered"
        elif len(shape) == len(expected) and len(apart) == 1:
            (axis,) = apart
            rank_axis = {"lora_A.weight": 0, "lora_embedding_A": 0, "lora_B.weight": 1, "lora_embedding_B": 1}
            is_rank = any(name.endswith(part) and axis == its for part, its in rank_axis.items())
            is_rows = expected[axis] == config.vocab_size and any(f".{module}." in name for module in VOCABULARY)
            kind = "rank" if is_rank else "vocabulary" if is_rows else "shape"
            inputs = tuple(f"{linear.name}.lora_A.weight" for linear in config.attention_inputs)
            of_layer = name.endswith(inputs)
            number = shape[axis] if is_rows or of_layer else None
        yield Problem(kind=kind, text=text, number=number)
    elif dtype not in ("F32", "F16", "BF16", "F64"):
        yield Problem(kind="dtype", text=f"{name} is of dtype {dtype}, expected a float")
    elif not is_finite(path, name, shape):
        yield Problem(kind="not finite", text=f"{name} holds values that are not finite")


def _setting_problems(
    settings: AdapterConfig, targets: Mapping[Key, Target], config: Architecture
) -> Iterator[Problem]:
    """Settings that no such model can have."""
    if not targets:
        yield Problem(kind="no target", text="target_modules match no linear of this model")
    names = Names.of(config)
    if (bias := settings.settings.get("bias")) not in (None, "none") and (names.biased or "bias" in names.norm_parts):
        yield Problem(kind="peft only", text=f"bias is {shown(bias)}: it trained biases of the base's too")
    asked, tokens = settings.settings.get("trainable_token_indices"), settings.token_ids(names)
    if isinstance(asked, dict):
        served = [name for name in asked if any(t.removesuffix(".weight").endswith(name) for t in tokens)]
        for name in asked.keys() - served:
            yield Problem(
                kind="peft only", text=f"trainable_token_indices names {shown(name)}, neither embed_tokens nor lm_head"
            )
    for tensor, token_ids in tokens.items():
        _, name = names.parse_target(tensor) or (None, tensor)
        if (None, name) in targets or settings.saved(names.in_modules(tensor)):
            yield Problem(
                kind="token", text=f"trainable_token_indices trains rows of {name}, which is trained otherwise as well"
            )
        if token_ids and max(token_ids) >= config.vocab_size:
            text = f"trainable_token_indices names token {max(token_ids)} of {name}, which has {config.vocab_size} rows"
            yield Problem(kind="vocabulary", text=text)


def _beyond_the_layers(targets: Iterable[Key], settings: AdapterConfig, config: Architecture) -> Iterator[Problem]:
    """What PEFT can do to an embedding or a head, and we cannot."""
    for name in [name for layer, name in targets if layer is None]:
        if config.tie_word_embeddings and not (settings.ties and name == "embed_tokens"):
            text = f"{name} is adapted, but the model's head is its embedding (tie_word_embeddings), which would change with it"
            yield Problem(kind="tied", text=text)
        elif name == "embed_tokens" and settings.use_dora:
            yield Problem(kind="peft only", text="embed_tokens is adapted with DoRA, which is supported for linears")


def _disagreeing(path: Path, expected: Expected, shapes: Mapping[str, Shape], found: Set[str]) -> Iterator[Problem]:
    for one, other in expected.copies:
        if one in found and other in found and not are_equal(path, one, other, shapes[one]):
            yield Problem(kind="copies", text=f"{other} is to hold what {one} holds, and its values are others")
    for one, other in expected.tied:
        if one in found and other in found and not are_equal(path, one, other, shapes[one], transposed=True):
            text = f"{other} is to be {one} transposed (ensure_weight_tying), and its values are others"
            yield Problem(kind="tie lost", text=text)


def _untied(
    path: Path, wholes: Mapping[str, Whole], found: Set[str], settings: AdapterConfig, config: Architecture
) -> Iterator[Problem]:
    """A model whose head is its embedding stays one model only if both get the same values, as PEFT's does then."""
    if not config.tie_word_embeddings:
        return
    names, tied = Names.of(config), "the model's head is its embedding (tie_word_embeddings)"
    embedding, head = wholes[names.embedding].key, wholes[names.lm_head].key
    shape = saveable(config)[names.embedding]
    if head in found:
        if embedding not in found or not are_equal(path, head, embedding, shape):
            yield Problem(kind="tied", text=f"{head}: {tied}, and the adapter stores another head")
    elif settings.saved(names.in_modules(names.embedding)) and not settings.ties:
        text = f"{embedding}: {tied}, and the adapter changes one of them only (trained without ensure_weight_tying)"
        yield Problem(kind="tied", text=text)
    tokens = settings.token_ids(names)
    if tokens.get(names.lm_head, tokens.get(names.embedding)) != tokens.get(names.embedding):
        yield Problem(
            kind="tied",
            text=f"trainable_token_indices: {tied}, and other rows of the one are trained than of the other",
        )
