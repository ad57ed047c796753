"""The benchmark suite: what it takes from a program's output, and that one failing case stops no other."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import suite

PRINTS = [sys.executable, "-c"]


def test_lines_with_a_step_are_taken_and_nothing_else() -> None:
    text = 'warning {not json}\n{"device": "cpu"}\nRESULT {"step_s": 1.5, "name": "peer"}\n{"step_s": 2}\n'
    found = list(suite.results([*PRINTS, f"print({text!r})"], 60))
    assert found == [{"step_s": 1.5, "name": "peer"}, {"step_s": 2}]


def test_what_fails_says_why() -> None:
    raises = list(suite.results([*PRINTS, "print('{\"step_s\": 1}'); raise SystemExit('out of memory')"], 60))
    assert raises == [{"step_s": 1}, {"error": "exit status 1: out of memory"}]
    assert "printed nothing" in next(suite.results([*PRINTS, ""], 60))["error"]
    assert "timed out" in next(suite.results([*PRINTS, "import time; time.sleep(60)"], 0.2))["error"]
    assert "No such file" in next(suite.results(["/no/such/program"], 60))["error"]


def test_a_loss_that_does_not_fall_is_an_error() -> None:
    assert "did not fall" in suite.not_learning({"losses": [12.002, 12.004, 12.002, 12.003]})["error"]
    assert not suite.not_learning({"losses": [12.002, 12.004, 12.002, 11.99]})
    assert not suite.not_learning({"losses": [12.002, 12.003]}), "too few to tell"
    assert not suite.not_learning({"step_s": 1.0})


def test_every_case_is_one_that_the_benchmark_takes() -> None:
    """As far as its arguments go."""
    import argparse

    from benchmarks.step import add_case_arguments

    parser = argparse.ArgumentParser(exit_on_error=False)
    add_case_arguments(parser)
    parser.add_argument("--steps", type=int)
    for _, command in suite.commands(list(suite.SUITES), []):
        parser.parse_args(command[3:])


def test_a_suite_goes_on_past_a_failing_case(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.suite", "tiny", "--out", str(tmp_path / "steps.jsonl")]
    done = subprocess.run([*command, "--also", "peer=false"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    machine, step, peer = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert machine["jax"]
    assert step["case"] == "135m:2, on a processor"
    assert step["step_s"] > 0
    assert peer == {"case": "peer", "error": "exit status 1: it printed nothing"}
    assert "exit status 1" in done.stdout
