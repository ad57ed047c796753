"""Reading of every family's `config.json`: against the config classes, parameters and rotary embeddings of transformers."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest

from qlora_jax.base.errors import InputError
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.config_keys import NEUTRAL
from qlora_jax.model.families import read_architecture
from qlora_jax.model.family_rows import FAMILIES
from qlora_jax.model.rope import METHODS
from qlora_jax.model.rope_config import FULL, SLIDING
from qlora_jax.model.unsupported import UNSUPPORTED, WRAPPERS
from tests.helpers import families
from tests.helpers.families import CASES, LLAMA3, LONG, YARN, as_saved, case

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

every_case = pytest.mark.parametrize("name", CASES)
every_family = pytest.mark.parametrize("model_type", FAMILIES)
ULP = float(np.finfo(np.float32).eps)
NEEDS_HEAD_DIM = {"head_dim": 16}
"""What some families' files always have; 16 is hidden_size / num_attention_heads of the cases."""


def model_of(keys: dict[str, Any]) -> Any:
    """A model of transformers' of two or more layers, on the host, as buffers have no values elsewhere."""
    config = CONFIG_MAPPING[keys["model_type"]].from_dict(copy.deepcopy(keys))
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def frequencies_of(model: Any) -> dict[str, tuple[np.ndarray, float]]:
    """Frequencies and factor of transformers' rotary embedding, by layer type; "" where all layers have one."""
    rotary, found = model.model.rotary_emb, {}
    for prefix in ("", f"{FULL}_", f"{SLIDING}_"):
        if (values := getattr(rotary, f"{prefix}inv_freq", None)) is not None:
            found[prefix[:-1]] = (values.numpy(), float(getattr(rotary, f"{prefix}attention_scaling")))
    return found


def types_of(config: Any) -> list[str]:
    window = getattr(config, "sliding_window", None)
    return getattr(config, "layer_types", None) or [SLIDING if window else FULL] * config.num_hidden_layers


def shapes_of(read: Architecture) -> dict[str, tuple[int, ...]]:
    """A decoder layer's parameters."""
    found: dict[str, tuple[int, ...]] = {}
    for linear in read.linears.values():
        found[f"{linear.path}.weight"] = linear.shape
        if linear.bias:
            found[f"{linear.path}.bias"] = linear.shape[:1]
    for norm in read.norms.names:
        found[f"{norm}.weight"] = (read.hidden_size,)
        if read.norms.bias:
            found[f"{norm}.bias"] = (read.hidden_size,)
    if read.qk_norm is not None:
        for module, heads in zip(read.qk_norm.names, (read.num_attention_heads, read.num_key_value_heads), strict=True):
            shapes = {"head": (read.head_dim,), "width": (heads * read.head_dim,), "heads": (heads, read.head_dim)}
            found[f"self_attn.{module}.weight"] = shapes[read.qk_norm.over]
    return found


def assert_equals_transformers(read: Architecture, model: Any) -> None:
    """Parameters of a layer, each layer's window and frequencies (to the last place), the factor on scores, tied or not."""
    config, found = model.config, frequencies_of(model)
    parameters = dict(model.model.layers[0].named_parameters())
    assert shapes_of(read) == {name: tuple(p.shape) for name, p in parameters.items() if "act_fn" not in name}
    types = types_of(config)
    assert len(read.kinds) == len(types)
    for kind, layer_type in zip(read.kinds, types, strict=True):
        assert kind.window == (config.sliding_window if layer_type == SLIDING else None)
        if kind.rope is not None:
            values, factor = found[layer_type if layer_type in found else ""]
            np.testing.assert_allclose(kind.rope.frequencies, values, rtol=1.01 * ULP, atol=0)
            assert kind.rope.scale == pytest.approx(factor, rel=1e-12)
    assert read.attention_scale == pytest.approx(model.model.layers[0].self_attn.scaling, rel=1e-12)
    assert read.tie_word_embeddings == config.tie_word_embeddings


# -------------------------------------------------------------------------------------------------------------- the cases


@every_case
def test_both_spellings_equal_transformers(name: str) -> None:
    read = read_architecture(CASES[name])
    assert read_architecture(as_saved(CASES[name])) == read
    assert_equals_transformers(read, model_of(CASES[name]))


@pytest.mark.parametrize("name", families.WRAPPERS)
def test_the_text_half_of_wrappers(name: str) -> None:
    config = families.WRAPPERS[name]
    read = read_architecture(config)
    assert read == read_architecture(as_saved(config))
    text = {"model_type": WRAPPERS[config["model_type"]], **config["text_config"]}
    prefixes = {"layers_prefix": "language_model.model.layers", "modules_prefix": "model.language_model.layers"}
    assert read == dataclasses.replace(read_architecture(text), **prefixes)


def test_a_wrapper_s_sizes_left_out_are_the_class_s() -> None:
    """The first files of Gemma 3 have next to nothing in their text_config."""
    config = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 7, "sliding_window": 1024}}
    theirs = CONFIG_MAPPING["gemma3"].from_dict(copy.deepcopy(config)).text_config
    read = read_architecture(config)
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        assert getattr(read, key) == getattr(theirs, key)
    assert [kind.window for kind in read.kinds] == [1024, 1024, 1024, 1024, 1024, None, 1024]


@every_family
def test_keys_left_out_mean_what_the_class_says(model_type: str) -> None:
    heads = 1 if model_type == "nemotron" else FAMILIES[model_type].defaults.get("num_key_value_heads", 4)
    keys = case(model_type, "num_key_value_heads", "max_position_embeddings", head_dim=16)
    keys |= {"num_attention_heads": heads, "hidden_size": 16 * heads}
    if model_type == "nemotron":  # without the key, transformers crashes
        keys["num_key_value_heads"] = 1
    assert_equals_transformers(read_architecture(keys), model_of(keys))
    assert read_architecture(as_saved(keys)) == read_architecture(keys)


NULLS = ("head_dim", "num_key_value_heads", "sliding_window", "layer_types", "rope_scaling", "rope_parameters")


@every_family
def test_a_null_means_what_it_does_in_transformers(model_type: str) -> None:
    """Or is refused by both."""
    for key in NULLS:
        keys = {**case(model_type, **NEEDS_HEAD_DIM), key: None}
        try:
            model = model_of(keys)
        except (TypeError, ValueError, ZeroDivisionError, StrictDataclassError) as error:
            if key == "num_key_value_heads":  # as transformers 4 reads it
                assert read_architecture(keys).num_key_value_heads == keys["num_attention_heads"], error
            elif (model_type, key) == ("exaone4", "sliding_window"):  # in files beside layer_types; here without them
                assert {kind.window for kind in read_architecture(keys).kinds} == {None}
            else:
                with pytest.raises(InputError, match=key):
                    read_architecture(keys)
            continue
        if key == "sliding_window" and model_type in (
            "gemma2",
            "gemma3_text",
            "olmo3",
            "cohere2",
        ):  # windows of no size
            with pytest.raises(InputError, match="sliding_window is null: they contradict each other"):
                read_architecture(keys)
            continue
        assert_equals_transformers(read_architecture(keys), model)


# --------------------------------------------------------------------------------------------------------------- the keys


@every_family
def test_every_key_of_transformers_is_in_one_list(model_type: str) -> None:
    """Read, of one value, or neutral; a key that a new version of transformers adds to a class is in none, and fails here."""
    family = FAMILIES[model_type]
    lists = (family.keys_read, family.only.keys(), NEUTRAL | set(family.neutral))
    keys = CONFIG_MAPPING[model_type].from_dict(case(model_type, **NEEDS_HEAD_DIM)).to_dict()
    assert {key for key in keys if sum(key in names for names in lists) != 1} == set()
    assert all(not lists[i] & lists[j] for i in range(3) for j in range(i))


@every_family
def test_unknown_keys_are_refused_by_name(model_type: str) -> None:
    keys = case(model_type, **NEEDS_HEAD_DIM)
    read = read_architecture(keys)
    for value in (None, False, 0, 1.0, [], ""):
        assert read_architecture({**keys, "a_new_factor": value}) == read
    for value in (True, 0.5, "on", [1], {"a": 1}):
        with pytest.raises(InputError, match=r"a_new_factor is .*, not supported") as caught:
            read_architecture({**keys, "a_new_factor": value})
        assert "remove a_new_factor from config.json" in caught.value.fix


def test_facts_that_keys_decide() -> None:
    granite = read_architecture(CASES["granite"])
    assert granite.embed_scale == granite.noise_scale == 3.0 / 0.22
    assert granite.norms.eps == pytest.approx(1e-6 / 0.22**2)
    assert (granite.logit_scale, granite.attention_scale) == (0.5, 0.3)
    gemma2, gemma3 = read_architecture(CASES["gemma2"]), read_architecture(CASES["gemma3-v5"])
    assert (gemma2.attention_softcap, gemma2.logit_softcap, gemma3.attention_softcap) == (3.0, 8.0, None)
    assert (gemma2.embed_scale, gemma2.embed_scale_rounded, gemma2.activation) == (8.0, True, "gelu_tanh")
    assert read_architecture(CASES["gemma"]).activation == "gelu_tanh"  # whose file says gelu
    assert [kind.rope is None for kind in read_architecture(CASES["smollm3-list"]).kinds] == [False, True, True, False]
    assert [kind.rope is None for kind in read_architecture(CASES["cohere2"]).kinds] == [False, True] * 2
    assert [kind.rope is None for kind in read_architecture(CASES["exaone4"]).kinds] == [False, True] * 2
    assert not any(kind.rope is None for kind in read_architecture(CASES["exaone4-full"]).kinds)
    letters = case("exaone4", sliding_window=8, sliding_window_pattern="LLG")
    assert [kind.window for kind in read_architecture(letters).kinds] == [8, 8, None, 8]
    assert read_architecture(CASES["phi3"]).linears["qkv_proj"].parts == (64, 32, 32)
    phi3 = read_architecture(CASES["phi3-long"]).kinds[0].rope
    assert phi3 is not None and phi3.long is not None and (phi3.original, len(phi3.long)) == (16, 6)
    assert read_architecture(CASES["llama-dynamic"]).max_length == 256
    assert read_architecture(CASES["ministral3"]).max_length == 64
    seed = read_architecture(case("seed_oss"))
    assert (seed.attention_dropout, seed.other_dropouts) == (0.1, (("residual_dropout", 0.1),))
    assert (
        seed.dropouts_are_left_out
        and not read_architecture(case("starcoder2", residual_dropout=0.1)).dropouts_are_left_out
    )


@pytest.mark.parametrize("name", ["llama", "granite", "gemma3", "gemma"])
def test_neftune_s_noise_is_scaled_as_in_transformers(name: str) -> None:
    """Whether the embedding's scale is within the module that the noise is added behind."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    model, alpha = families.tiny_model(CASES[name]).train(), 5.0
    inputs: list[Any] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    ids = torch.zeros((2, families.LENGTH), dtype=torch.long)
    with torch.no_grad():
        model(ids)
        model.model.embed_tokens.neftune_noise_alpha = alpha
        model.model.embed_tokens.register_forward_hook(neftune_post_forward_hook)
        model(ids)
    added = float((inputs[1] - inputs[0]).abs().max()) * (families.LENGTH * 64) ** 0.5 / alpha
    residual = CASES[name].get("residual_multiplier", 1.0)  # which ours has folded away
    assert added / residual == pytest.approx(read_architecture(CASES[name]).noise_scale, rel=0.01)


COMMON = {
    "architectures": ["AForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True,
}  # fmt: skip
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "llama 3.1": case("llama", **COMMON, attention_bias=False, mlp_bias=False, pretraining_tp=1, rope_theta=5e5,
                      rope_scaling={**LLAMA3, "original_max_position_embeddings": 8192}, max_position_embeddings=131072),
    "smollm2": case("llama", **COMMON, is_llama_config=True, rope_interleaved=False, rope_scaling=None, rope_theta=1e5,
                    **{"transformers.js_config": {"dtype": "q4"}}),
    "qwen2.5": case("qwen2", **COMMON, max_window_layers=28, sliding_window=131072, use_sliding_window=False, use_mrope=False),
    "qwen3": case("qwen3", **COMMON, attention_bias=False, head_dim=128, max_window_layers=36, rope_scaling=None,
                  rope_theta=1000000, sliding_window=None, use_sliding_window=False),
    "mistral": case("mistral", **COMMON, head_dim=128, sliding_window=None, rope_theta=1000000.0),
    "gemma 2": case("gemma2", **{**COMMON, "hidden_act": "gelu_pytorch_tanh"}, head_dim=256, cache_implementation="hybrid",
                    attn_logit_softcapping=50.0, final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh",
                    query_pre_attn_scalar=256, sliding_window=4096),
    "gemma 3": case("gemma3_text", **{**COMMON, "hidden_act": "gelu_pytorch_tanh"}, head_dim=256, _sliding_window_pattern=6,
                    attn_logit_softcapping=None, final_logit_softcapping=None, hidden_activation="gelu_pytorch_tanh",
                    query_pre_attn_scalar=256, rope_local_base_freq=10000.0, rope_scaling=None, rope_theta=1000000.0,
                    sliding_window=512, use_bidirectional_attention=False, layer_types=[SLIDING] * 3 + [FULL]),
    "phi 4 mini": case("phi3", **COMMON, attention_bias=False, auto_map={"AutoConfig": "a.B"}, embd_pdrop=0.0, full_attn_mod=1,
                       interpolate_factor=1, lm_head_bias=False, mlp_bias=False, original_max_position_embeddings=4096,
                       max_position_embeddings=131072, partial_rotary_factor=0.75, resid_pdrop=0.0, sliding_window=262144,
                       rope_scaling={**LONG, "type": "longrope"}, tie_word_embeddings=True),
    "phi 3, first": case("phi3", **COMMON, original_max_position_embeddings=64, partial_rotary_factor=0.75,
                         rope_scaling={**LONG, "type": "su"}),
    "smollm 3": case("smollm3", **COMMON, attention_bias=False, layer_types=[FULL] * 4, max_window_layers=28, mlp_bias=False,
                     no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0], rope_scaling=None, rope_theta=5e6, sliding_window=None,
                     use_sliding_window=False, pretraining_tp=2),
    "command r7b": case("cohere2", "rms_norm_eps", **COMMON, attention_bias=False, cache_implementation="hybrid", head_dim=16,
                        layer_norm_eps=1e-5, logit_scale=0.25, order_of_interleaved_layers="local_attn_first",
                        position_embedding_type="rope_gptj", rotary_pct=1.0, sliding_window=4096, sliding_window_pattern=4,
                        use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True, use_parallel_embedding=True),
    "apertus": case("apertus", **{**COMMON, "hidden_act": "xielu"}, attention_bias=False, mlp_bias=False, post_norm=False, qk_norm=True,
                    rope_scaling={**LLAMA3, "original_max_position_embeddings": 8192, "type": "llama3"}, rope_theta=12000000),
    "exaone 4": case("exaone4", **COMMON, sliding_window=4096, sliding_window_pattern="LLLG", layer_types=[SLIDING] * 3 + [FULL],
                     rope_scaling={**LLAMA3, "original_max_position_embeddings": 8192}, rope_theta=1000000),
}  # fmt: skip
"""Keys as files of these models have them, with tiny sizes."""


@pytest.mark.parametrize("config", AS_PUBLISHED.values(), ids=AS_PUBLISHED.keys())
def test_files_as_they_are_published_are_read(config: dict[str, Any]) -> None:
    read = read_architecture(config)
    assert read.num_hidden_layers == 4
    if config.get("rope_scaling", {}) != {**LONG, "type": "su"}:  # where transformers 5 fails
        assert read_architecture(as_saved(config)) == read


# ------------------------------------------------------------------------------------------------------------------- rope

ROPES = {
    "llama 3.1": (128, {**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 5e5}),
    "llama 3.2": (64, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}),
    "deepseek-coder": (128, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}),
    "qwen2.5, long": (128, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}),
    "yarn of all keys": (96, {**YARN, "beta_fast": 16, "beta_slow": 2, "mscale": 0.9, "mscale_all_dim": 0.4, "truncate": False}),
    "longrope": (96, {"rope_type": "longrope", "short_factor": [1.05] * 48, "long_factor": [2.5] * 48, "factor": 32.0}),
    "longrope, its factor given": (32, {"rope_type": "longrope", "short_factor": [1.5] * 16, "long_factor": [3.0] * 16,
                                        "attention_factor": 1.25, "original_max_position_embeddings": 100}),
    "an odd theta": (80, {"rope_type": "default", "rope_theta": 12345.678}),
    "nothing of yarn": (64, {"rope_type": "yarn", "factor": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize(("head_dim", "rope"), ROPES.values(), ids=ROPES.keys())
def test_each_method_equals_transformers(head_dim: int, rope: dict[str, Any]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    keys = case("llama", head_dim=head_dim, max_position_embeddings=131072, rope_parameters=rope)
    config = CONFIG_MAPPING["llama"].from_dict(copy.deepcopy(keys))
    found = read_architecture(keys).kinds[0].rope
    assert found is not None
    if rope["rope_type"] == "default":
        values, factor = model_of(keys).model.rotary_emb.inv_freq, 1.0
    else:
        values, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    # torch rounds the reciprocal or the division by a scalar otherwise in a few places
    np.testing.assert_allclose(found.frequencies, values.numpy(), rtol=1.01 * ULP, atol=0)
    assert found.scale == pytest.approx(factor, rel=1e-12)
    if found.long is not None:
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=found.original + 1)
        np.testing.assert_allclose(found.long, long.numpy(), rtol=1.01 * ULP, atol=0)


def test_the_methods_are_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert METHODS.keys() - {"default"} == ROPE_INIT_FUNCTIONS.keys() - {"proportional"}


BAD_ROPES = {
    "rope_theta is 1.0, expected a number above 1": ("llama", {"rope_scaling": YARN, "rope_theta": 1}),
    "original_max_position_embeddings is 0.5, expected a number above 1": (
        "llama",
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 0.5}},
    ),
    "rope_scaling: rope_type is 'mrope', supported: default, linear": ("llama", {"rope_scaling": {"type": "mrope"}}),
    "supported: default, longrope": ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "rope_type is 'llama3', but type is 'linear'": ("llama", {"rope_scaling": {**LLAMA3, "type": "linear"}}),
    "they contradict each other": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
    ),
    "factor is missing": ("qwen3", {"rope_scaling": {"type": "linear"}}),
    "factor is 0, expected a positive number": ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}),
    "low_freq_factor is not below": ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}),
    "alpha is 3.0, not supported": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 3.0}}),
    "llama_4_scaling_beta is 0.1, not supported": ("mistral", {"rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}}),
    "mrope_section is [1], which rope_type 'default' does not have": (
        "qwen2",
        {"rope_scaling": {"type": "default", "mrope_section": [1]}},
    ),
    "factor is 4.0, which rope_type 'default' does not have": ("llama", {"rope_parameters": {"factor": 4.0}}),
    "partial_rotary_factor is 0.5, not supported": ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    "partial_rotary_factor is 1.5, expected a number above 0, to 1": ("phi3", {"partial_rotary_factor": 1.5}),
    "15 features of a head are rotated, expected an even number": ("nemotron", {"partial_rotary_factor": 15 / 16}),
    "short_factor has 6 numbers, expected 8": (
        "phi3",
        {"rope_scaling": {**LONG, "type": "longrope", "long_factor": [2] * 8}},
    ),
    "expected one object for all layers": ("qwen2", {"rope_parameters": {FULL: {"rope_type": "default"}}}),
    "expected an object for each of full_attention": ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}),
    "max_position_embeddings is missing": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": None},
    ),
    "rope_theta is -1, expected a positive number": ("qwen3", {"rope_theta": -1}),
}


@pytest.mark.parametrize(("found", "keys"), BAD_ROPES.items(), ids=BAD_ROPES.keys())
def test_rope_that_cannot_be_computed(found: str, keys: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(InputError) as caught:
        read_architecture(case(keys[0], **{"head_dim": 16, **keys[1]}))
    assert found in caught.value.found
    assert ";" not in caught.value.found


def test_both_rope_dicts_may_say_the_same() -> None:
    both = case("llama", rope_theta=5e5, rope_scaling=LLAMA3, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert read_architecture(both) == read_architecture(case("llama", rope_theta=5e5, rope_scaling=LLAMA3))


# --------------------------------------------------------------------------------------------------------------- refusals

BAD = {
    "no_rope_layer_interval is None, expected a whole number": ("smollm3", {"no_rope_layer_interval": None}),
    "no_rope_layers is {}, expected 0 or 1": ("smollm3", {"no_rope_layers": {}}),
    "max_window_layers is None, expected a whole number": ("qwen2", {"max_window_layers": None}),
    "layer_types has sliding_attention, but use_sliding_window is false": (
        "qwen2",
        {"layer_types": [FULL, SLIDING] * 2},
    ),
    "layer_types has sliding_attention, but sliding_window is null": ("gemma2", {"sliding_window": None}),
    "layer_types is ['chunked', 'chunked', 'chunked', 'chunked'], expected": (
        "olmo3",
        {"layer_types": ["chunked"] * 4},
    ),
    "for each of 4 layers": ("qwen3", {"layer_types": [FULL] * 3}),
    "but the layers of this family are": ("mistral", {"layer_types": [FULL] * 4, "sliding_window": 8}),
    "layer_types is ['sliding_attention'], not supported": ("llama", {"layer_types": [SLIDING]}),
    "sliding_window is 0, expected a whole number": ("mistral", {"sliding_window": 0}),
    "no_rope_layers is [1], expected 0 or 1 for each of 4 layers": ("smollm3", {"no_rope_layers": [1]}),
    "sliding_window_pattern is 'LX', expected": ("exaone4", {"sliding_window_pattern": "LX"}),
    "sliding_window_pattern is 6, supported: 2": ("gemma2", {"sliding_window_pattern": 6}),
    "use_bidirectional_attention is True, supported: False": ("gemma3_text", {"use_bidirectional_attention": True}),
    "attn_logit_softcapping is 50.0, not supported": ("qwen3", {"attn_logit_softcapping": 50.0}),
    "attention_bias is True, not supported": ("mistral", {"attention_bias": True}),
    "rms_norm_eps is 0.1, not supported": ("cohere", {"rms_norm_eps": 0.1}),
    "hidden_act is 'gelu', supported: 'silu', 'swish'": ("qwen2", {"hidden_act": "gelu"}),
    "hidden_activation is 'relu', supported: 'gelu_pytorch_tanh'": ("gemma2", {"hidden_activation": "relu"}),
    "query_pre_attn_scalar is None, expected a positive number": ("gemma2", {"query_pre_attn_scalar": None}),
    "residual_multiplier is 0, expected a positive number": ("granite", {"residual_multiplier": 0}),
    "head_dim is None, expected a whole number": ("qwen3", {"head_dim": None}),
    "num_attention_heads 4 is no multiple of num_key_value_heads 32": ("qwen2", {"num_key_value_heads": 32}),
    "hidden_size is 64, but num_attention_heads times head_dim 128": ("helium", {"head_dim": 32}),
    "attention_bias is 'yes', expected true or false": ("llama", {"attention_bias": "yes"}),
    "residual_dropout is 2, expected a number from 0 to below 1": ("starcoder2", {"residual_dropout": 2}),
}


@pytest.mark.parametrize(("found", "keys"), BAD.items(), ids=BAD.keys())
def test_what_is_refused(found: str, keys: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(InputError) as caught:
        read_architecture(case(keys[0], **{"head_dim": 16, **keys[1]}), "here")
    assert caught.value.where == "here"
    assert found in caught.value.found
    assert ";" not in caught.value.found


@pytest.mark.parametrize(
    ("model_type", "advice"),
    {
        "gemma3n": "text-only copy",
        "llama4": "text-only copy",
        "mixtral": "dense model",
        "gpt_oss": "dense model",
        "deepseek_v3": "latent attention",
        "mamba2": "attention in every layer",
        "internlm2": "llama's layout",
        "phi": "a family that is supported",
        "unheard_of": "one of these types: llama, mistral",
    }.items(),
)
def test_models_that_are_refused_by_name(model_type: str, advice: str) -> None:
    with pytest.raises(InputError, match=f"model_type is '{model_type}', not supported") as caught:
        read_architecture({**case("llama"), "model_type": model_type})
    assert advice in caught.value.fix


def test_no_model_is_both_supported_and_refused() -> None:
    assert not UNSUPPORTED.keys() & (FAMILIES.keys() | WRAPPERS.keys())


def test_a_wrapper_without_its_text() -> None:
    with pytest.raises(InputError, match="text_config is None"):
        read_architecture({"model_type": "gemma3"})
    with pytest.raises(InputError, match=r"config\.json: text_config\n.*model_type is 'mixtral'"):
        read_architecture({"model_type": "mistral3", "text_config": {**case("llama"), "model_type": "mixtral"}})


WEIRD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    1e400,
    float("nan"),
    "x",
    "",
    [],
    [1],
    {},
    {"a": 1},
    2**40,
    0.5,
    "default",
]


@every_case
def test_whatever_a_config_holds_is_read_or_refused(name: str) -> None:
    """One value after another, of the config and of its rope dicts, is replaced by something else."""
    for config in (CASES[name], as_saved(CASES[name])):
        for key, value in config.items():
            changed = [{**config, key: weird} for weird in WEIRD]
            if isinstance(value, dict):
                changed += [{**config, key: {**value, inner: weird}} for inner in value for weird in WEIRD]
            for keys in changed:
                try:
                    read_architecture(keys)
                except InputError as error:
                    assert error.found
