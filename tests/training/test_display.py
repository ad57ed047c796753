"""Bars on a terminal say how much, how fast and how long yet; elsewhere there are none."""

import io

import pytest
from rich.console import Console

from qlora_jax.base.console import byte_bar


@pytest.mark.parametrize("terminal", [True, False])
def test_bytes_speed_and_time_left(terminal: bool) -> None:
    out, now = io.StringIO(), iter(range(1000))
    with byte_bar(Console(file=out, force_terminal=terminal, width=120)) as progress:
        progress.get_time = lambda: float(next(now))
        task = progress.add_task("quantizing", total=100 * 2**20)
        for _ in range(3):
            progress.advance(task, 10 * 2**20)
        progress.refresh()
    text = out.getvalue()
    if not terminal:
        assert text.strip() == ""
        return
    assert "quantizing" in text
    assert "30.0/100.0 MiB" in text
    assert "MiB/s" in text
    assert "0:00:0" in text
