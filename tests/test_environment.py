"""Environment variables that start-up reads: one sentence that names the wrong one."""

import os
import subprocess
import sys

import pytest

from llava_mini_jax import distributed, environment
from llava_mini_jax.errors import InputError
from tests.conftest import ROOT

GOOD = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("JAX_COORDINATOR_ADDRESS", "localhost", "host:port"),
        ("JAX_COORDINATOR_ADDRESS", "localhost:", "host:port"),
        ("JAX_COORDINATOR_ADDRESS", ":8476", "host:port"),
        ("JAX_COORDINATOR_ADDRESS", "localhost:99999", "host:port"),
        ("JAX_COORDINATOR_ADDRESS", "localhost:http", "host:port"),
        ("JAX_COORDINATOR_BIND_ADDRESS", "8476", "host:port"),
        ("JAX_COORDINATOR_PORT", "http", "a whole number"),
        ("JAX_NUM_PROCESSES", "two", "a whole number"),
        ("JAX_NUM_PROCESSES", "2.0", "a whole number"),
        ("JAX_NUM_PROCESSES", "", "a whole number"),
        ("JAX_NUM_PROCESSES", "0", "1 or more"),
        ("JAX_PROCESS_ID", "-1", "a whole number"),
        ("JAX_PROCESS_ID", "2", "0 to 1, as JAX_NUM_PROCESSES is 2"),
        ("JAX_LOCAL_DEVICE_IDS", "0;1", "numbers of devices"),
        ("SLURM_NTASKS", "4(x2)", "a whole number"),
        ("SLURM_PROCID", "x", "a whole number"),
        ("OMPI_COMM_WORLD_RANK", "x", "a whole number"),
        ("JOB_COMPLETION_INDEX", "x", "a whole number"),
    ],
)
def test_variables_of_processes(name, value, expected, monkeypatch):
    for good, setting in {**GOOD, name: value}.items():
        monkeypatch.setenv(good, setting)
    with pytest.raises(InputError) as refused:
        distributed.start()
    told = f'the environment variable {name} is "{value}"; expected {expected}'
    assert str(refused.value).startswith(told) and "\n" not in str(refused.value)


def test_right_ones_pass(monkeypatch):
    good = GOOD | {"JAX_COORDINATOR_ADDRESS": "[::1]:8476", "JAX_LOCAL_DEVICE_IDS": "0, 1"}
    for name, setting in good.items():
        monkeypatch.setenv(name, setting)
    distributed._check_environment()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_PLATFORMS", "nonsense"),
        ("JAX_PLATFORMS", "cuda"),
        ("JAX_ENABLE_X64", "maybe"),
        ("JAX_NUM_CPU_DEVICES", "many"),
        ("JAX_NUM_CPU_DEVICES", "0"),
        ("JAX_DEFAULT_DEVICE", "nonsense"),
        ("XLA_FLAGS", "--xla_no_such_flag=1"),
        ("XLA_FLAGS", "no/such/file"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=many"),
    ],
)
def test_variables_of_jax(name, value, tmp_path):
    if value == "cuda" and os.path.exists("/dev/nvidia0"):
        pytest.skip("here it is right")
    ended = subprocess.run(
        [sys.executable, "train.py", "configs/digits.py", "--workdir", str(tmp_path / "run")],
        env=os.environ | {"JAX_PLATFORMS": "cpu", name: value},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in ended.stderr.splitlines() if "arning" not in line and line[:1] != " "]
    assert ended.returncode == 2, ended.stderr
    assert len(lines) == 1 and f'the environment variable {name} is "{value}"' in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_flags_that_xla_knows_pass(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=")
    environment.check()
