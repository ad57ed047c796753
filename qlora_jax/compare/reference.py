"""PyTorch's side of a comparison: transformers, bitsandbytes and peft, as their users call them. A program: `... reference JOB.json`.

The only file of this package that imports torch, and the one that nothing imports. The job is a list of runs (`compare.process.Run`
as JSON), done one after the other; each leaves its files in `out`:

    weights-KEY.safetensors      a linear's codes, scales and dequantized values
    forward.safetensors          `hidden.0` (the embedding's output), `hidden.1`, ... (each layer's) [B, T, D] and `logits` [B, T, V]
    gradients.safetensors        of each adapter tensor, under our keys
    adapter/                     after the last step, as peft saves it
    numbers.json                 losses

Three choices of ours, all of them settings of the libraries. In bfloat16 the model is bfloat16 throughout and runs under autocast, as
transformers' Trainer does it with `bf16=True`; peft's `prepare_model_for_kbit_training`, which some recipes add, would keep norms and the
residual stream in float32. In float32 the quantization states say float32, as they do where a float32 model is quantized: with a bfloat16
state bitsandbytes' forward would dequantize to float32 and its backward to bfloat16. And modules are in training mode (there is no
dropout), because outside of it bitsandbytes repacks weights for a faster CPU kernel.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import bitsandbytes
import numpy as np
import peft
import torch
import transformers
from safetensors.torch import save_file

PROGRESS = "progress "
FAILURE = "failure.json"


def main(job: str) -> int:
    """Do the runs; what stops one is written to `failure.json` in its folder, and the exit status is 1."""
    runs = json.loads(Path(job).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    for run in runs:
        out = Path(run["out"])
        try:
            model = load(run)
        except Exception as error:  # the libraries raise nearly anything for a model or adapter that they cannot take
            (out / FAILURE).write_text(json.dumps({"message": f"{type(error).__name__}: {error}"}), encoding="utf-8")
            return 1
        numbers = compute(model, run, out)
        numbers["versions"] = {
            library.__name__: library.__version__ for library in (torch, transformers, bitsandbytes, peft)
        }
        numbers["device"] = device_name(run)
        (out / "numbers.json").write_text(json.dumps(numbers), encoding="utf-8")
        del model
    return 0


def device_name(run: dict[str, Any]) -> str:
    """What the run was on."""
    return torch.cuda.get_device_name() if run["device"] == "cuda" else "cpu"


def load(run: dict[str, Any]) -> Any:
    """The model, quantized if the run says so, with its adapter."""
    if run["device"] == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this torch sees no GPU, and JAX does: install torch for CUDA, or set JAX_PLATFORMS=cpu")
    bfloat16 = torch.bfloat16
    options: dict[str, Any] = {"dtype": bfloat16, "device_map": {"": run["device"]}, "local_files_only": True}
    if run["quantization"] is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=run["quantization"]["quant_type"],
            bnb_4bit_use_double_quant=run["quantization"]["double_quant"],
            bnb_4bit_compute_dtype=getattr(torch, run["dtype"]),
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(run["model"], **options)
    if run["dense"]:
        make_dense(model)
    set_dtype(model, getattr(torch, run["dtype"]))
    if run["adapter"] is not None:
        config = peft.PeftConfig.from_pretrained(run["adapter"])
        config.lora_dropout = 0.0
        model = peft.PeftModel.from_pretrained(model, run["adapter"], config=config, is_trainable=True)
    return model.train()


def make_dense(model: Any) -> None:
    """Each 4-bit linear becomes a plain one of what its weight dequantizes to."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = torch.nn.Parameter(values.reshape(module.weight.quant_state.shape), requires_grad=False)
            model.set_submodule(name, plain)
    model.is_loaded_in_4bit = False  # else peft would look for 4-bit linears


def set_dtype(model: Any, dtype: torch.dtype) -> None:
    """Everything but codes and scales in the compute dtype, and so what these dequantize to."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.weight.quant_state.dtype = dtype
    for parameter in model.parameters():
        if not isinstance(parameter, bitsandbytes.nn.Params4bit):
            parameter.data = parameter.data.to(dtype)


def compute(model: Any, run: dict[str, Any], out: Path) -> dict[str, Any]:
    """The stages that the run asks for, in this order."""
    stages, tokens = set(run["stages"]), np.load(run["tokens"])
    batches = to_batches(tokens["input_ids"], tokens["labels"], run["device"])
    held_out = to_batches(tokens["held_out_ids"], tokens["held_out_labels"], run["device"])
    numbers: dict[str, Any] = {}
    if "weights" in stages:
        save_weights(model, run["linears"], out)
    if "forward" in stages:
        numbers["loss"] = save_forward(model, batches[0], run, out)
    if "gradients" in stages:
        loss_of(model, batches[0], run).backward()
        gradients = {key: parameter.grad for key, parameter in adapter_parameters(model, run).items()}
        save_file(
            {key: gradient.contiguous().cpu() for key, gradient in gradients.items()}, out / "gradients.safetensors"
        )
        model.zero_grad()
    if "evaluate" in stages:
        numbers["held_out"] = [evaluate(model, held_out, run)]
    if "train" in stages:
        numbers |= train(model, batches, run)
        model.save_pretrained(out / "adapter")
        if "evaluate" in stages:
            numbers["held_out"].append(evaluate(model, held_out, run))
    return numbers


def to_batches(input_ids: np.ndarray, labels: np.ndarray, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[S, B, T] of both → S pairs [B, T] on the device."""
    return [
        (torch.from_numpy(ids).long().to(device), torch.from_numpy(targets).long().to(device))
        for ids, targets in zip(input_ids, labels, strict=True)
    ]


def autocast(run: dict[str, Any]) -> Any:
    """What `bf16=True` means to the Trainer; nothing in float32."""
    if run["dtype"] != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(run["device"], dtype=torch.bfloat16)


def loss_of(model: Any, batch: tuple[torch.Tensor, torch.Tensor], run: dict[str, Any]) -> torch.Tensor:
    """transformers' own loss, divided by the number of supervised tokens."""
    input_ids, labels = batch
    counted = (labels[:, 1:] != -100).sum()
    with autocast(run):
        return model(input_ids=input_ids, labels=labels, num_items_in_batch=counted, use_cache=False).loss


def evaluate(model: Any, batches: list[tuple[torch.Tensor, torch.Tensor]], run: dict[str, Any]) -> float:
    """Mean loss over all supervised tokens."""
    total, count = 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(batches, 1):
            counted = int((batch[1][:, 1:] != -100).sum())
            total += float(loss_of(model, batch, run)) * counted
            count += counted
            progress("evaluating", number, len(batches))
    return total / count


def train(model: Any, batches: list[tuple[torch.Tensor, torch.Tensor]], run: dict[str, Any]) -> dict[str, Any]:
    """One optimizer step a batch: torch's AdamW and clipping."""
    settings = run["optimizer"]
    parameters = list(adapter_parameters(model, run).values())
    optimizer = torch.optim.AdamW(
        parameters,
        betas=(settings["adam_beta1"], settings["adam_beta2"]),
        eps=settings["adam_epsilon"],
        weight_decay=settings["weight_decay"],
    )
    losses, norms = [], []
    for number, (batch, rate) in enumerate(zip(batches, run["learning_rates"], strict=True), 1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, batch, run)
        loss.backward()
        limit = settings["max_grad_norm"] or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, limit)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        progress("training", number, len(batches))
    return {"losses": losses, "norms": norms}


def save_forward(model: Any, batch: tuple[torch.Tensor, torch.Tensor], run: dict[str, Any], out: Path) -> float:
    """Hidden states by hooks (transformers' own list has the last one normed already), logits and loss of one batch."""
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            kept[name] = (output[0] if isinstance(output, tuple) else output).cpu().contiguous()

        return hook

    decoder = (model.get_base_model() if run["adapter"] is not None else model).model
    decoder = getattr(decoder, "language_model", decoder)  # of a model of images and text
    modules = [decoder.embed_tokens, *decoder.layers]
    handles = [module.register_forward_hook(keep(f"hidden.{i}")) for i, module in enumerate(modules)]
    with torch.no_grad(), autocast(run):
        counted = (batch[1][:, 1:] != -100).sum()
        result = model(input_ids=batch[0], labels=batch[1], num_items_in_batch=counted, use_cache=False)
    for handle in handles:
        handle.remove()
    kept["logits"] = result.logits.cpu().contiguous()
    save_file(kept, out / "forward.safetensors")
    return float(result.loss)


def save_weights(model: Any, linears: dict[str, str], out: Path) -> None:
    """What each linear is in, and what that dequantizes to (in bfloat16, as int16, whatever the run computes in)."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    modules = dict(base.named_modules())
    for number, (key, path) in enumerate(linears.items(), 1):
        module = modules[path]
        weight = getattr(module, "base_layer", module).weight
        state = weight.quant_state
        dtype, state.dtype = state.dtype, torch.bfloat16
        values = bitsandbytes.functional.dequantize_4bit(weight.data, state).reshape(state.shape)
        state.dtype = dtype
        tensors = {
            "codes": weight.data.view(torch.uint8).flatten(),
            "absmax": state.absmax,
            "values": values.view(torch.int16),
        }
        if state.nested:
            tensors |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset.reshape(1)}
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, out / f"weights-{key}.safetensors"
        )
        progress("reading weights", number, len(linears))


def adapter_parameters(model: Any, run: dict[str, Any]) -> dict[str, torch.nn.Parameter]:
    """Our keys → peft's parameters, which carry the adapter's name inside theirs."""
    found = {name.replace(".default.", "."): parameter for name, parameter in model.named_parameters()}
    return {key: found[name] for key, name in run["adapters"].items()}


def progress(what: str, done: int, total: int) -> None:
    """A line for the process that waits."""
    print(f"{PROGRESS}{json.dumps([what, done, total])}", flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
