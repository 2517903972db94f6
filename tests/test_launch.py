"""The files of launch/: what they start is a command that train.py, or the server, takes."""

import argparse
import dataclasses
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml

import train
from llava_mini_jax.cli import serve
from llava_mini_jax.serving import metrics
from llava_mini_jax.training.stages import load_config
from tests.conftest import ROOT

LAUNCH = ROOT / "launch"


def fake(folder: Path, name: str, script: str) -> None:
    """A command `name` in `folder`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(script: str, *words: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """A script of launch/ that finds the commands of `folder` first."""
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
    return subprocess.run(
        [LAUNCH / script, *words], env=environment, capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_valid_and_can_be_started(path):
    assert os.access(path, os.X_OK)
    checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_a_jobset_starts_a_run_on_all_its_devices(name):
    jobset = yaml.safe_load((LAUNCH / name).read_text())
    assert jobset["kind"] == "JobSet"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    python, script, config, *options = container["command"]
    assert (python, script) == ("python", "/llava-mini/train.py")
    config = str(ROOT / Path(config).relative_to("/llava-mini"))
    command = train.parse(load_config(config), [config, *options])
    assert command.distributed and command.stopped_status == 143
    assert command.workdir.startswith("gs://")
    (devices,) = container["resources"]["limits"].values()
    hosts = job["parallelism"] * replicated["replicas"]
    mesh = command.config.mesh
    assert mesh.data * mesh.fsdp * mesh.tensor == hosts * devices
    assert job["completions"] == job["parallelism"]
    # Bad input, which ends train.py with status 2, must not be tried a hundred times.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [2]}
    assert container["name"] == rule["onExitCodes"]["containerName"]


def test_the_gpu_jobset_tells_jax_who_is_there():
    jobset = yaml.safe_load((LAUNCH / "gke_gpu.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    name, port = jobset["metadata"]["name"], container["ports"][0]["containerPort"]
    address = f"{name}-{replicated['name']}-0-0.{name}:{port}"
    assert variables["JAX_COORDINATOR_ADDRESS"] == address
    assert variables["JAX_NUM_PROCESSES"] == str(job["parallelism"])
    assert "JAX_PROCESS_ID" in variables and job["completionMode"] == "Indexed"


@pytest.fixture
def served() -> dict[str, dict]:
    """The objects of serve_gke.yaml by kind."""
    found = list(yaml.safe_load_all((LAUNCH / "serve_gke.yaml").read_text()))
    assert {each["metadata"]["name"] for each in found} == {"llava-mini-serve"}
    return {each["kind"]: each for each in found}


def served_command(container: dict) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    program, subcommand, *words = container["command"]
    assert (program, subcommand) == ("llava-mini", "serve")
    return parser.parse_args(words)


def test_the_deployment_serves_and_stops_without_cutting_an_answer(served):
    pod = served["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = served_command(container)
    serve._check(options)
    assert options.host == "0.0.0.0" and options.api_key_file is not None
    (port,) = container["ports"]
    assert port["containerPort"] == options.port
    # SIGTERM, then late requests, then the end of answers: all before SIGKILL.
    left = pod["terminationGracePeriodSeconds"] - options.drain_delay - options.drain_timeout
    probe = container["readinessProbe"]
    assert left >= 10
    assert options.drain_delay > probe["periodSeconds"] * probe["failureThreshold"]
    paths = (probe["httpGet"]["path"], container["livenessProbe"]["httpGet"]["path"])
    assert paths == ("/ready", "/health")
    assert {probe["httpGet"]["port"], *_ports(served)} == {port["name"]}


def _ports(served: dict[str, dict]) -> list[str]:
    (service,) = served["Service"]["spec"]["ports"]
    (scraped,) = served["PodMonitoring"]["spec"]["endpoints"]
    return [service["targetPort"], scraped["port"]]


def test_the_deployment_runs_as_nobody_and_writes_into_its_scratch_alone(served):
    pod = served["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] and own["capabilities"] == {"drop": ["ALL"]}
    assert own["allowPrivilegeEscalation"] is False
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    writable = [mount["mountPath"] for mount in mounts.values() if not mount.get("readOnly")]
    assert writable == ["/scratch"]
    assert {v["value"] for v in container["env"]} == set(writable)


def test_it_is_scaled_by_a_metric_that_the_server_has(served):
    scaler = served["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == served["Deployment"]["metadata"]["name"]
    assert "replicas" not in served["Deployment"]["spec"]
    (metric,) = scaler["metrics"]
    _, name, kind = metric["pods"]["metric"]["name"].split("|")
    load = metrics.Load(*[0] * len(dataclasses.fields(metrics.Load)))
    assert f"# TYPE {name} {kind}" in metrics.Metrics("served", lambda: load).text().decode()
    labels = served["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitoring"):
        assert served[kind]["spec"]["selector"]["matchLabels"] == labels
    assert served["Service"]["spec"]["selector"] == labels


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [(143, "RUNNING", True), (143, "COMPLETING", False), (0, "RUNNING", False)],
)
def test_slurm(tmp_path, status, state, requeued):
    fake(tmp_path, "srun", f'echo "$JAX_LOCAL_DEVICE_IDS|$*"; exit {status}')
    fake(tmp_path, "squeue", f"echo {state}")
    fake(tmp_path, "scontrol", 'echo "scontrol $*"')
    slurm = dict(SLURM_GPUS_ON_NODE="4", SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="64", PYTHON="py")
    done = run("slurm.sh", "c.py", "--workdir", "/a b", folder=tmp_path, **slurm)
    started, *rest = done.stdout.splitlines()
    assert started.startswith("0,1,2,3|")
    assert started.endswith(" py train.py c.py --workdir /a b --distributed --stopped-status 143")
    assert rest == (["scontrol requeue 7"] if requeued else [])
    assert (done.returncode, done.stderr) == (status, "")


def test_slurm_signals_the_processes_alone():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    assert "#SBATCH --signal=TERM@120" in lines and "#SBATCH --ntasks-per-node=1" in lines


def test_a_tpu_vm_gets_the_words_of_the_command(tmp_path):
    """The command goes through two shells, this machine's and the host's."""
    fake(tmp_path, "gcloud", 'echo "$*" > "$SEEN"; cd "$HOST" && exec bash -c "${@: -1}"')
    fake(tmp_path / "llava-mini/.venv/bin", "python", 'printf "%s\\n" "$@" > words')
    words = ["c.py", "--workdir", "gs://b/a b", "--name", "it's"]
    variables = dict(TPU="slice", ZONE="zone", HOST=str(tmp_path), SEEN=str(tmp_path / "seen"))
    done = run("tpu_vm.sh", *words, folder=tmp_path, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    expected = "compute tpus tpu-vm ssh slice --zone zone --worker=all --command "
    assert (tmp_path / "seen").read_text().startswith(expected)
    given = tmp_path / "llava-mini" / "words"
    for _ in range(1200):  # it runs in the background, for up to a minute
        if given.exists() and given.read_text().endswith("--distributed\n"):
            break
        time.sleep(0.05)
    assert given.read_text().splitlines() == ["train.py", *words, "--distributed"]


def test_a_tpu_vm_must_be_named(tmp_path):
    done = run("tpu_vm.sh", "c.py", folder=tmp_path, TPU="")
    assert done.returncode == 1 and "TPU: the name of the TPU VM" in done.stderr
