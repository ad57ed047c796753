"""What a run leaves behind: `best/`, `adapter/`, `merged/`, and the last lines on the screen."""

from pathlib import Path

from rich.console import Console

from convert.adapters.adapter import as_adapters, load_adapter, write_adapter
from convert.files.companions import GENERATION_CONFIG
from convert.jobs.held_out import show_held_out_loss
from convert.merge import merge_with_progress
from convert.model import BaseModel
from convert.stops import Conversation, generation_config, with_stops
from qlora_jax.base.files import remove_folder, replacing_folder, write_json
from qlora_jax.commands.prepare import PreparedRun
from qlora_jax.config import Config
from qlora_jax.data import save_template
from qlora_jax.engine.engine import Adapters
from qlora_jax.training.checkpoint import Checkpoints
from qlora_jax.training.output_dir import OutputDir
from qlora_jax.training.samples import Samples
from qlora_jax.training.trainer import best_is_gone


def save(folder: Path, adapters: Adapters, config: Config, model: BaseModel, conversation: Conversation) -> None:
    """An adapter in PEFT's format, where turns end in it, and the chat template it learned, where the model has none.

    The folder is whole or not there.
    """
    generation = with_stops(generation_config(model.folder.path, model.folder.config), conversation.stop_ids)
    with replacing_folder(folder) as aside:
        write_adapter(
            aside, adapters, config.lora, config.quantization, config.model.name_or_path, architecture=model.config
        )
        save_template(conversation.template, aside)
        write_json(aside / GENERATION_CONFIG, generation)


def export(run: PreparedRun, adapters: Adapters, best_step: int | None) -> int | None:
    """Write `adapter/`, and `merged/` if it is asked for. What is there of an earlier run is replaced.

    Returns:
        the step whose adapter it is: `best_step` with `load_best_model_at_end`, or None for the last.

    Raises:
        InputError: the best adapter is asked for and gone.
    """
    config, model, folder, console = run.config, run.model, run.folder, run.console
    out, best = folder.path, folder.path / "best"
    folder.check_ours()
    if not config.training.load_best_model_at_end:
        best_step = None
    elif best_step is None:
        console.print("the adapter is that of the last step: no evaluation came to a finite loss")
    with run.phases.time("export"):
        if best_step is not None:
            if not best.is_dir():
                raise best_is_gone(best, best_step)
            adapters = as_adapters(load_adapter(best, model.config), model.config)[1]
            console.print(f"the adapter is that of step {best_step}, which had the lowest held-out loss")
        save(out / "adapter", adapters, config, model, run.conversation)
        folder.has_adapter()
        # Another run's merged model would not be this adapter's. It is only there if overwriting was asked for.
        remove_folder(out / "merged")
        console.print(f"adapter: {out / 'adapter'}   loss curve: {out / 'loss.png'}")
        if config.training.export_merged:
            export_merged(config, model, out, console)
    return best_step


def export_merged(config: Config, model: BaseModel, output_dir: Path, console: Console) -> None:
    """`merged/`, as `python -m convert.merge` would write it."""
    adapter = load_adapter(output_dir / "adapter", model.config)
    merge_with_progress(model.folder, adapter, output_dir / "merged", config.training.merge_base, console)


def conclude(run: PreparedRun, samples: Samples, best_step: int | None) -> None:
    """Print what the run came to: the held-out loss of `merged/`, if there is one, for `run.json` too; and the samples."""
    samples.close()
    training = run.config.training
    if training.export_merged and run.held_out:
        with run.phases.time("evaluation"):
            loss = show_held_out_loss(run.folder.path / "merged", run.held_out, training.compute_dtype, run.console)
        run.folder.record["starts"][-1]["merged"] = {"base": training.merge_base, "eval_loss": loss}
    samples.show(best_step)


def finish(config: Config, folder: OutputDir, checkpoints: Checkpoints, last_step: int) -> None:
    """Write that the run is finished; where checkpoints are off, remove the one that was saved for the merge."""
    folder.end("finished")
    if not (config.training.save_steps or config.training.save_interval_minutes):
        checkpoints.remove(last_step)
