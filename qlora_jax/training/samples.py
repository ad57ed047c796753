"""The sample prompts, answered at some steps: `samples.jsonl`, one object an answer."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from qlora_jax.base.files import replacing
from qlora_jax.engine.engine import Adapters

Answer = Callable[[Adapters, str], str]


class Samples:
    """Answers by step, on disk from the moment they are given."""

    def __init__(
        self, path: Path, prompts: Sequence[str], answer: Answer, console: Console, before: bytes = b""
    ) -> None:
        """`before`: the lines of a run that is continued; whatever else the file has is of steps that will be made again."""
        self._path, self._prompts, self._answer, self._console = path, prompts, answer, console
        if before or path.exists():
            with replacing(path) as file:
                file.write(before)

    def take(self, step: int, adapters: Adapters) -> None:
        """Answer each prompt with these adapters, those of `step` optimizer steps."""
        lines = []
        for prompt in self._prompts:
            text = self._answer(adapters, prompt)
            lines.append(json.dumps({"step": step, "prompt": prompt, "answer": text}))
            if step:  # the first answers are shown beside the last
                self._console.print(f"step {step}: {prompt} → {text}".replace("\n", " "))
        if lines:
            with self._path.open("ab") as file:
                file.write("".join(f"{line}\n" for line in lines).encode())

    def close(self) -> None:
        """Let go of what answers, which holds the model's memory: `take` is not called any more."""
        del self._answer

    def show(self, step: int | None = None) -> None:
        """Of each prompt the first answer and the last, or the last until `step`, one above the other."""
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        taken = [sample for sample in map(json.loads, lines) if step is None or sample["step"] <= step]
        for prompt in self._prompts:
            answers = [sample["answer"] for sample in taken if sample["prompt"] == prompt]
            ends = (("before", answers[0]), ("after", answers[-1])) if answers else ()
            for when, text in ends:  # as Text: an answer may look like rich's markup
                panel = Panel(Text(text), title=Text(f"{when}: {prompt}"), title_align="left")
                self._console.print(panel, soft_wrap=False)
