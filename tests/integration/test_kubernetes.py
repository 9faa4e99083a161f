"""The image and what Kubernetes is given: held against the published schemas, and run here, two pods as two processes."""

from __future__ import annotations

import copy
import functools
import json
import operator
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from helpers.launching import BIN, CLEAN, QUIET, ROOT, python, run
from helpers.runs import assert_same_run, reached, result, wait_until
from helpers.variants import soak

FOLDER = ROOT / "launch/kubernetes"
DOCUMENTS = {
    f"{document['kind']} {document['metadata']['name']}": document
    for file in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
}
JOB, SERVICE = DOCUMENTS["Job digitdist"], DOCUMENTS["Service digitdist"]
TRAINJOB, RUNTIME = DOCUMENTS["TrainJob digitdist-trainjob"], DOCUMENTS["TrainingRuntime digitdist"]
RUNTIME_JOB = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"][0]
PODS = {"job": JOB["spec"]["template"]["spec"], "trainjob": RUNTIME_JOB["template"]["spec"]["template"]["spec"]}
FREE = (".labels.", ".selector.", ".requests.", ".limits.")  # mappings whose keys are anybody's


# The schemas


def through_the_models(document: dict[str, Any]) -> Any:
    """What the published models make of a document; they leave out, without a word, what they do not know."""
    if document["apiVersion"].startswith("trainer.kubeflow.org/"):
        from kubeflow_trainer_api import models

        return getattr(models, f"TrainerV1alpha1{document['kind']}").from_dict(document).to_dict()
    from kubernetes import client

    return client.ApiClient().sanitize_for_serialization(getattr(client, f"V1{document['kind']}").from_dict(document))


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Each value of a document that holds no others, by its path."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {inner: leaf for key, item in items for inner, leaf in leaves(item, f"{path}.{key}").items()}
    return {path: value}


def problems(document: dict[str, Any]) -> list[str]:
    """What the models refuse in a document, or lose, or alter."""
    try:
        kept = leaves(through_the_models(document))
    except (ValueError, TypeError, AttributeError) as error:  # the models' ways to say that a value is of another type
        return [repr(error)]
    return [f"{path}: {leaf!r}" for path, leaf in leaves(document).items() if repr(kept.get(path, ...)) != repr(leaf)]


def places(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Each place in a document, with what stands there."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*path, key), value[key]
        if isinstance(value[key], dict | list):
            yield from places(value[key], (*path, key))


def changed(document: dict[str, Any], path: tuple, key: str | int, value: Any) -> dict[str, Any]:
    """A copy of a document that has `value`, under the name `key`, instead of what stands at `path`."""
    mutant = copy.deepcopy(document)
    holder = functools.reduce(operator.getitem, path[:-1], mutant)
    if isinstance(holder, dict):
        del holder[path[-1]]
    holder[key] = value
    return mutant


def mutants(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The document with each of its keys misspelt, and with each of its values of another type, one at a time."""
    for path, value in places(document):
        name = "." + ".".join(map(str, path))
        if name in (".apiVersion", ".kind") or any(part in name for part in FREE):
            continue
        yield f"{name} of another type", changed(document, path, path[-1], "many" if isinstance(value, int) else 7)
        if isinstance(path[-1], str):
            yield f"{name} misspelt", changed(document, path, f"{path[-1]}s", value)


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_the_published_models_know_every_field(document: dict[str, Any]):
    assert problems(document) == []


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_whatever_is_misspelt_or_of_another_type_is_noticed(document: dict[str, Any]):
    found = {name: bool(problems(mutant)) for name, mutant in mutants(document)}
    assert len(found) > 10
    assert [name for name, noticed in found.items() if not noticed] == []


# What schemas do not know


def container(name: str) -> dict[str, Any]:
    return PODS[name]["containers"][0]


def words(name: str) -> list[str]:
    """The whole command of a pod."""
    given = container("job") if name == "job" else TRAINJOB["spec"]["trainer"]
    return given["command"] + given["args"]


def option(name: str, option: str) -> str:
    (value,) = (word.partition("=")[2] for word in words(name) if word.startswith(f"{option}="))
    return value


def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (ROOT / "launch/Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, rest in (line.split(maxsplit=1) for line in lines)]


IMAGE = dict(dockerfile())  # the last of each instruction


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_its_volumes_its_user_and_the_time_that_a_checkpoint_takes(name: str):
    pod = PODS[name]
    volumes = {volume.pop("name"): volume for volume in copy.deepcopy(pod["volumes"])}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(name)["volumeMounts"]}
    claims = {key: mounts[f"{IMAGE['WORKDIR']}/{key}"]["persistentVolumeClaim"]["claimName"] for key in ("data", "runs")}
    documents = yaml.safe_load_all((FOLDER / "volumes.yaml").read_text())
    assert set(claims.values()) == {document["metadata"]["name"] for document in documents}
    assert claims == {"data": "digitdist-data", "runs": "digitdist-runs"}  # config: data.root=data, run.dir=runs
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy and the JobSet's restarts need it
    assert pod["terminationGracePeriodSeconds"] >= int(option(name, "--shutdown-timeout")) + 10 > 30
    assert pod["securityContext"]["runAsUser"] == int(IMAGE["USER"]) > 0
    assert pod["securityContext"]["runAsNonRoot"]
    (wandb,) = container(name)["env"]
    assert wandb["name"] == "WANDB_API_KEY"
    assert wandb["valueFrom"]["secretKeyRef"]["optional"]
    assert words(name)[0] == "torchrun"
    assert option(name, "run.name")


def test_the_jobs_pods_find_each_other():
    job, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": job}
    assert PODS["job"]["subdomain"] == service
    assert option("job", "--master-addr") == f"{job}-0.{service}"
    assert int(option("job", "--master-port")) == SERVICE["spec"]["ports"][0]["port"]
    assert JOB["spec"]["completionMode"] == "Indexed"
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(option("job", "--nnodes"))


def test_the_trainjob_finds_its_runtime_and_the_operator_its_container():
    reference = TRAINJOB["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (RUNTIME["kind"], RUNTIME["metadata"]["name"])
    assert RUNTIME_JOB["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert (RUNTIME_JOB["name"], container("trainjob")["name"]) == ("node", "node")


# The image


def test_the_image_is_made_of_what_is_there_and_stops_on_sigterm():
    done = run([str(BIN / "hadolint"), str(ROOT / "launch/Dockerfile")], cwd=ROOT, env=None, timeout=60)
    assert done.code == 0, done.out
    copied = [source for source, _ in copies()]
    assert {"pyproject.toml", "README.md", "LICENSE", "configs", "digitdist"} == set(copied)
    assert all((ROOT / source).exists() for source in copied)
    assert IMAGE["STOPSIGNAL"] == "SIGTERM"
    assert "ENTRYPOINT" not in IMAGE
    assert json.loads(IMAGE["CMD"]) == ["python", "-m", "digitdist.train"]


def copies() -> list[tuple[str, str]]:
    """What the image's build copies from the project, each with where to."""
    given = [rest.split() for name, rest in dockerfile() if name == "COPY" and "--from" not in rest]
    return [(source, target) for *sources, target in given for source in sources]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_images_wheel_trains_by_its_command_in_an_empty_folder(tmp_path: Path):
    """The build's own command, on the files that it copies, and then what the image runs: MNIST is in there."""
    for source, target in copies():
        place = tmp_path / target.strip("/")
        place = place / source if target.endswith("/") else place
        place.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(ROOT / source), str(place)], check=True)
    build = next(rest for name, rest in dockerfile() if name == "RUN")
    here = [re.sub("^/", f"{tmp_path}/", word) for word in shlex.split(build)]
    made = run([str(BIN / here[0]), *here[1:]], cwd=tmp_path, env=None, timeout=200)
    assert made.code == 0, made.err
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    pip = ["install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    assert run([str(BIN / "pip"), *pip], cwd=tmp_path, env=None, timeout=100).code == 0
    env = {"PYTHONPATH": str(site)}
    assert python("-c", "import digitdist; print(digitdist.__file__)", cwd=home, env=env).out.startswith(str(site))
    done = python(*json.loads(IMAGE["CMD"])[1:], *QUIET, "train.max_steps=3", "run.name=a", cwd=home, env=env)
    assert done.code == 0, done.err
    assert result(home / "runs/a")["test_total"] == 10000


# The pods, as processes of this machine

SHORT = (
    *("data.batch_size=400", "data.eval_batch_size=5000", "train.max_steps=30", "train.log_every=1", "train.threads=1"),
    *("sync.mode=exact", "sync.timeout_s=20", "checkpoint.every_steps=8", "run.name=a", *QUIET),
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """The folder of the same training by one process."""
    place = tmp_path_factory.mktemp("unbroken")
    (place / "data").symlink_to(mnist_root)
    done = python("-m", "digitdist.train", *SHORT, cwd=place)
    assert done.code == 0, done.err
    return place / "runs/a"


class Pods:
    """Two pods: their container's command with what the operator, the Job's controller and the kubelet put into it."""

    def __init__(self, name: str, place: Path):
        self.name, self.place, self.starts = name, place, [0, 0]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = str(free.getsockname()[1])
        self.processes = [self.start(index) for index in (0, 1)]

    def start(self, index: int) -> subprocess.Popen:
        if self.name == "job":
            env = {"JOB_COMPLETION_INDEX": str(index)}
        else:  # see the operator's Torch plugin; the first pod's name and its port are 127.0.0.1 and a free one here
            trainer = TRAINJOB["spec"]["trainer"]
            env = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"])}
            env |= {"PET_NODE_RANK": str(index), "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": self.port}
        command = [re.sub(r"\$\((\w+)\)", lambda match: env[match[1]], word) for word in words(self.name)]
        command = [re.sub("^--master-addr=.*", "--master-addr=127.0.0.1", word) for word in command]
        command = [re.sub("^--master-port=.*", f"--master-port={self.port}", word) for word in command]
        self.starts[index] += 1
        env |= {"PATH": f"{BIN}:{os.environ['PATH']}"}
        with (self.place / f"log-{index}-{self.starts[index]}").open("w") as log:
            return subprocess.Popen([*command, *SHORT], cwd=self.place, env=CLEAN | env, stdout=log, stderr=log)

    def log(self, index: int) -> str:
        return "\n".join(file.read_text() for file in sorted(self.place.glob(f"log-{index}-*")))

    def wait_for_step(self, step: int) -> None:
        def is_there() -> bool:
            assert all(process.poll() is None for process in self.processes), self.log(0) + self.log(1)
            return reached(self.place / "runs/a") >= step

        wait_until(is_there, failure=lambda: self.log(0))

    def wait(self, timeout: float) -> list[int]:
        deadline = time.monotonic() + timeout
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def finish(self) -> None:
        """What Kubernetes does until all is done: a Job replaces the pod that failed, a TrainJob all of them."""
        deadline = time.monotonic() + 250
        while codes := [process.poll() for process in self.processes]:
            assert time.monotonic() < deadline, self.log(0) + self.log(1)
            assert max(self.starts) <= 5, self.log(0) + self.log(1)
            failed = [index for index, code in enumerate(codes) if code]
            if failed and self.name == "trainjob":
                self.terminate(0, 1)
                self.wait(60)
                failed = [0, 1]
            for index in failed:
                self.processes[index] = self.start(index)
            if codes == [0, 0]:
                return
            time.sleep(0.1)

    def terminate(self, *indices: int) -> None:
        for index in indices:
            self.processes[index].send_signal(signal.SIGTERM)

    def kill(self, index: int, what: str = "pod") -> None:
        """Ends every process of a pod at once, as the loss of its node does, or its worker alone, as a lack of memory does."""
        launcher = psutil.Process(self.processes[index].pid)
        workers = launcher.children(recursive=True)
        for process in [launcher, *workers] if what == "pod" else workers:
            process.kill()


@pytest.fixture
def pods(request: pytest.FixtureRequest, place: Path) -> Iterator[Pods]:
    started = Pods(request.param, place)
    yield started
    for index, process in enumerate(started.processes):
        if process.poll() is None:
            started.kill(index)
            process.wait()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("pods", [soak("job"), "trainjob"], indirect=True)
def test_two_pods_train_as_one_process_does(pods: Pods, unbroken: Path):
    assert pods.wait(150) == [0, 0], pods.log(0) + pods.log(1)
    assert "world size 2: 2 processes, on several hosts" in pods.log(0)
    assert result(pods.place / "runs/a")["world_size"] == 2
    assert_same_run(pods.place / "runs/a", unbroken)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("pods", "lost", "what"),
    [
        ("job", 0, "pod"),
        *(soak("job", 1, "pod"), soak("trainjob", 1, "worker")),
    ],
    indirect=["pods"],
)
def test_a_pod_killed_midway_is_started_again_and_the_run_goes_on(pods: Pods, unbroken: Path, lost: int, what: str):
    pods.wait_for_step(12)
    pods.kill(lost, what)
    pods.finish()
    assert re.search("runs/a on .* resumes at step", pods.log(0))
    assert result(pods.place / "runs/a")["world_size"] == 2
    assert_same_run(pods.place / "runs/a", unbroken)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("pods", "drained"), [soak("job", [1]), ("trainjob", [0, 1])], indirect=["pods"])
def test_sigterm_saves_within_the_grace_period_and_the_next_pods_go_on(pods: Pods, unbroken: Path, drained: list[int]):
    """To one pod or to all: all of them end, since each step takes every rank."""
    pods.wait_for_step(12)
    began = time.monotonic()
    pods.terminate(*drained)
    codes = pods.wait(PODS[pods.name]["terminationGracePeriodSeconds"])
    assert codes == [1, 1]  # torchrun's own: Kubernetes starts them again
    assert time.monotonic() - began < int(option(pods.name, "--shutdown-timeout")) / 4
    assert "stopped on request after step" in pods.log(0)
    assert not (pods.place / "runs/a/result.json").exists()
    pods.finish()
    assert re.search("runs/a on .* resumes at step", pods.log(0))
    assert result(pods.place / "runs/a")["world_size"] == 2
    assert_same_run(pods.place / "runs/a", unbroken)
