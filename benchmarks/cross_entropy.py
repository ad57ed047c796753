"""How exact the gradient of the cross-entropy is in float32, here and in torch, on the CPU: `python -m benchmarks.cross_entropy`.

Both get the same float32 logits, of the head of SmolLM2-135M on normed random states, and are measured from float64: the gradient by the
logits, and what the head's transpose makes of it. Needs torch. Writes `results/cross-entropy-cpu.json`.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.machine import write_result
from convert.files.pieces import read_bfloat16
from convert.files.stated import names_of
from convert.gguf.packages import SMOLLM2_ID as MODEL_ID
from convert.model import open_model
from qlora_jax.compare.stages import relative

TOKENS = 256


def exact(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """d(mean loss)/d(logits) in float64."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p[np.arange(len(targets)), targets] -= 1
    return p / len(targets)


def ours(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """As `qlora_jax.model.loss.cross_entropy` does it: the log of a sum of exponentials, less the target's logit."""

    def loss(logits: jax.Array) -> jax.Array:
        picked = jnp.take_along_axis(logits, jnp.asarray(targets)[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)

    return np.asarray(jax.jit(jax.grad(loss))(logits))


def theirs(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """torch's `cross_entropy`."""
    tensor = torch.from_numpy(logits).requires_grad_()
    torch.nn.functional.cross_entropy(tensor, torch.from_numpy(targets)).backward()
    return tensor.grad.numpy()


def main() -> None:
    """Measure, print and write."""
    model = open_model(MODEL_ID)
    names = names_of(model.folder)
    head, norm = (read_bfloat16(model.folder, name).astype(np.float32) for name in (names.embedding, names.final_norm))
    rng = np.random.default_rng(0)
    states = rng.standard_normal((TOKENS, head.shape[1])).astype(np.float32) * norm
    logits, targets = states @ head.T, rng.integers(0, len(head), TOKENS)
    truth = exact(logits.astype(np.float64), targets)
    found = {
        name: {
            "gradient": relative(gradient, truth),
            "through_the_head": relative(gradient.astype(np.float64) @ head, truth @ head.astype(np.float64)),
        }
        for name, gradient in (("ours", ours(logits, targets)), ("torch", theirs(logits, targets)))
    }
    print(found)
    result = {"what": "cross_entropy", "tokens": TOKENS, "torch": torch.__version__, "relative_error": found}
    print(write_result("cross-entropy-cpu", result))


if __name__ == "__main__":
    main()
