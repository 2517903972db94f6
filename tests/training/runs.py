"""Runs of the tiny stages, in this process and in others, and what they leave."""

import json
import os
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax.training import loop
from llava_mini_jax.training.step import train_step
from tests.conftest import ROOT

SETTINGS = (
    "jax_platforms",
    "jax_num_cpu_devices",
    "jax_disable_most_optimizations",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


class Final(NamedTuple):
    """What a stage leaves."""

    params: dict[str, np.ndarray]
    devices: set[int]  # how many devices a parameter lies on
    compiled: int  # programs of the training step


def run(stages, folder):
    """{stage: Final} of a run."""
    finals = {}

    def recorded(stage, *rest):
        before = train_step._cache_size()
        params = run_stage(stage, *rest)
        devices = {len(leaf.devices()) for leaf in jax.tree.leaves(params)}
        finals[stage.name] = Final(arrays(params), devices, train_step._cache_size() - before)
        return params

    run_stage = loop.run_stage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_stage", recorded)
        loop.run(stages, str(folder))
    return finals


def arrays(params):
    return {path: np.array(leaf) for path, leaf in param_tree.paths(params).items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [path for path in ours if not np.array_equal(ours[path], theirs[path])]
    assert not different, f"different: {different}"


def metric_lines(folder):
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def metrics_of(folder):
    """{(stage, step): the line about it, without times}."""
    lines = [line for line in metric_lines(folder) if "loss" in line]
    kept = ("loss", "token_accuracy", "grad_norm")
    assert len({(line["stage"], line["step"]) for line in lines}) == len(lines)
    return {(line["stage"], line["step"]): [line[name] for name in kept] for line in lines}


def saved_steps(folder, stage):
    steps = (folder / "checkpoints" / stage).iterdir()
    return sorted(int(path.name) for path in steps if path.name.isdigit())


def copied(finished, folder, *removed):
    """A finished workdir without some of its folders; what metrics.jsonl says stays."""
    shutil.copytree(finished[0], folder, dirs_exist_ok=True)
    for name in removed:
        shutil.rmtree(folder / name)
    return folder


def program(code, folder, **options):
    """A Python program of its own, with this process's settings of JAX and `folder` as argument."""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {name.upper(): str(jax.config.values[name]) for name in SETTINGS},
        cwd=ROOT,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )


def output(program):
    """(exit status, stdout, stderr) of a program that ends within five minutes."""
    out, err = program.communicate(timeout=300)
    return program.returncode, out, err
