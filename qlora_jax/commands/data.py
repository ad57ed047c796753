"""`python -m qlora_jax data`: show what a run would learn from: rows as tokens, what counts in the loss, lengths, what is left out."""

import argparse

from convert.hub import cache_dir
from convert.model import open_tokens
from qlora_jax.base.console import make_console
from qlora_jax.config import load_config
from qlora_jax.config.arguments import path_argument, whole_argument
from qlora_jax.data.corpus import load_corpus
from qlora_jax.data.preview import preview


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--config", required=True, type=path_argument, metavar="FILE", help="the run's YAML file of settings"
    )
    parser.add_argument(
        "--rows", type=whole_argument(0), default=3, metavar="N", help="rows to show in full; default: 3"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")


def run(options: argparse.Namespace) -> None:
    """Print the preview to standard output."""
    console = make_console()
    config = load_config(options.config, options.overrides)
    tokenizer, limits = open_tokens(config.model.name_or_path, log=console.print)
    preview(load_corpus(config, tokenizer, cache_dir() / "tokenized", console, limits), console, max(options.rows, 1))
