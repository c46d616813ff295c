"""Several processes train one model: what they divide, what they agree on, and what is refused in one sentence."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from trained_by_several import OPTIONS, resumable

import pyromosaic
from pyromosaic import Mosaic, MultiVI, simulate
from pyromosaic.data import contrastive_loader, loader, measured
from pyromosaic.train import Optimisation, Plan, fit
from pyromosaic.train.processes import Processes

QUIET = {"progress_bar": False, "accelerator": "cpu", "batch_size": 16}
STARTED = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
STARTED += ("SLURM_STEP_NUM_TASKS", "SLURM_JOB_NAME", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES")


@pytest.fixture(scope="module")
def mosaic():
    return Mosaic.from_mudata(simulate(40, {"rna": 20, "adt": 5}, seed=0)[0])


@pytest.fixture
def model(mosaic):
    return MultiVI(mosaic, n_latent=2, n_hidden=4)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)


# What is refused


def refused(model, message, folder, **options):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        model.train(1, checkpoint_dir=folder / "run", **QUIET | options)
    assert "\n" not in str(error.value)
    assert not (folder / "run").exists() and not len(model.history)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("ddp_find_unused_parameters_false", "strategy must be 'auto', 'ddp', "),
        ("fsdp", "strategy must be 'auto', 'ddp', "),
        (DDPStrategy(), "needs find_unused_parameters=True and broadcast_buffers=False; or set strategy='ddp'"),
        (DDPStrategy(find_unused_parameters=True), "a DDPStrategy for these models needs broadcast_buffers=False"),
    ],
)
def test_strategies_that_wait_for_ever_are_refused(model, strategy, message, tmp_path):
    refused(model, message, tmp_path, strategy=strategy, devices=2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but this process was not started by torchrun or srun"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "OMPI_COMM_WORLD_SIZE=3, but this process was not started by torchrun"),
        (
            {"SLURM_NTASKS": "2"},
            "SLURM has 2 tasks for this job, but this process is not one of them; start it by srun",
        ),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, "with --ntasks-per-node instead of --ntasks"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NAME": "bash"}, "a job that is not called 'bash' or 'interactive'"),
    ],
)
def test_processes_that_do_not_find_each_other_are_refused(model, variables, message, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(model, message, tmp_path)


def test_one_device_of_several_processes_is_refused(model, tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    refused(model, "2 processes were started, and devices times num_nodes is 1", tmp_path, devices=1)


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"},  # a shell in an allocation of four tasks
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_NAME": "bash"},
    ],
)
def test_one_process_is_taken(model, variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    model.train(1, devices=1, strategy="auto", num_nodes=1, **QUIET)
    model.train(1, devices="auto", **QUIET)
    assert len(model.history) == 1


@pytest.mark.parametrize(
    ("variables", "options", "n"),
    [
        ({}, {}, 1),
        ({}, {"devices": "2"}, 2),
        ({}, {"devices": 2, "num_nodes": 3}, 6),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, {}, 4),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, {"devices": 2, "num_nodes": 2}, 4),  # Lightning's own children
        (
            {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"}
            | {"SLURM_NODEID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
            {},
            4,
        ),
    ],
)
def test_the_number_of_processes_is_the_launchers(variables, options, n, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Processes({"accelerator": "cpu"} | options).n == n


def test_half_precision_by_a_plugin_is_refused(model, tmp_path):
    refused(model, "precision must be '32-true'", tmp_path, plugins=[MixedPrecision("bf16-mixed", "cpu")])


def test_minibatches_of_ones_own_are_not_divided(model, mosaic):
    minibatches = [next(iter(loader(mosaic, mosaic.find(None), 16)))]
    minibatches = torch.utils.data.DataLoader(minibatches, batch_size=None)
    with pytest.raises(ValueError, match="several processes divide minibatches of `pyromosaic.data.loader` alone"):
        fit(model.model, model.guide, minibatches, None, 1, Optimisation(), devices=2, accelerator="cpu")


# What is divided


@pytest.mark.parametrize(("n", "size", "processes"), [(101, 16, 2), (101, 16, 3), (7, 2, 3), (9, 1, 4), (64, 100, 2)])
def test_every_cell_is_in_one_minibatch_of_one_process(n, size, processes):
    mosaic = Mosaic.from_mudata(simulate(n, {"rna": 20}, seed=0)[0])
    cells = mosaic.find(None)
    for _ in range(2):
        found = []
        for rank in range(processes):
            minibatches = loader(mosaic, cells, size, seed=3)
            minibatches.sampler.divide(rank, processes)
            found.append([m.index.numpy() for m in minibatches])
            assert len(found[-1]) == len(minibatches) == len(found[0])
        sizes = [len(index) for own in found for index in own]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= size or size == 1
        assert sorted(np.concatenate([np.concatenate(own) for own in found])) == list(cells)


def test_few_validation_cells_are_each_evaluated_once(mosaic):
    found = []
    for rank in range(4):
        minibatches = loader(mosaic, np.arange(3), 16)
        minibatches.sampler.divide(rank, 4)
        found += [cell for m in minibatches for cell in m.index.tolist()]
    assert sorted(found) == [0, 1, 2]


@pytest.mark.parametrize("processes", [2, 3])
def test_pairs_are_divided(processes):
    mosaic = Mosaic.from_mudata(simulate(90, {"rna": 10}, treated=1 / 3, seed=0)[0])
    mosaic = mosaic.with_cohorts("condition", background="control")
    found, groups = [], []
    for rank in range(processes):
        minibatches = contrastive_loader(mosaic, mosaic.find(None), 8, seed=1)
        minibatches.sampler.divide(rank, processes)
        for minibatch in minibatches:
            found += minibatch.index.tolist()
            groups.append(minibatch.groups.bincount().tolist())
    times = Counter(found)
    assert {times[cell] for cell in np.flatnonzero(mosaic.groups == 0)} == {1}  # the larger cohort
    assert all(background == target for background, target in groups)
    with pytest.raises(ValueError, match="replay=True repeats the minibatches of a run in one process"):
        contrastive_loader(mosaic, mosaic.find(None), 8, seed=1, replay=True).sampler.divide(0, 2)


def test_a_row_of_the_history_is_of_the_cells_of_all_processes(model, mosaic, monkeypatch):
    """One process has a minibatch without antibodies; both find what one with all minibatches does."""
    without = ~mosaic.presence["adt"].to_numpy()
    parts = [measured(mosaic, np.flatnonzero(which), mosaic.n_cells) for which in (without, ~without)]
    assert "adt" not in parts[0].observed

    def plan(minibatches, n):
        plan = Plan(model.model, model.guide, Optimisation(), 1)
        plan._trainer = SimpleNamespace(world_size=n)
        with torch.no_grad(), pyro.validation_enabled(False):
            for minibatch in minibatches:
                torch.manual_seed(len(minibatch))
                plan._add("train", minibatch, plan.objective(minibatch, 1.0) / minibatch.n_cells)
        return plan

    pooled = plan(parts, 1)._totals()["train"]
    assert pooled[""] == mosaic.n_cells and pooled["adt"] > 0
    told = []
    monkeypatch.setattr("pyromosaic.train.plan.gathered", lambda value, n: told.append(value) or [value])
    plan(parts[:1], 2)._totals()
    monkeypatch.setattr("pyromosaic.train.plan.gathered", lambda value, n: [told[0], value])
    assert plan(parts[1:], 2)._totals()["train"] == pytest.approx(pooled)


# What they agree on


SCRIPT = Path(__file__).with_name("trained_by_several.py")


def run(command, folder, n=2, env=None):
    """What each process of a run of the script says."""
    paths = [str(Path(pyromosaic.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=570, env=os.environ | settings | (env or {})
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("process-*.json"))]
    assert len(found) == n, done.stderr[-3000:]
    return found


def torchrun(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


@pytest.mark.slow
def test_two_processes_train_every_model(tmp_path):
    first, second = run(torchrun("--standalone", "--nproc-per-node=2", str(SCRIPT), "every"), tmp_path)
    assert first["models"].keys() == second["models"].keys() > {"MultiVI", "DiagVI", "ContrastiveVI", "ScModal"}
    for name, one in first["models"].items():
        other = second["models"][name]
        assert one["parameters"] == other["parameters"], name
        assert one["history"] == other["history"] and np.isfinite(list(one["history"][-1].values())).all(), name
        assert one["noise"] != other["noise"], name
        trained = Counter(one["trained"]) + Counter(other["trained"])
        assert not set(one["trained"]) & set(other["trained"]) or name == "ContrastiveVI", name
        if name != "ContrastiveVI":  # whose smaller cohort is repeated
            assert set(trained.values()) == {1} and len(trained) == one["n_train"], name
        assert one["start"] == other["start"], name
    stopped = first["models"]["early stopping"]["history"]
    assert len(stopped) < 30 and stopped[-1]["epoch"] + 1 == len(stopped)
    assert first["saved"] and not second["saved"]
    assert first["failed"] == second["failed"] and "the loss is not finite" in first["failed"]
    assert first["finish failed"].startswith("NonFiniteLossError")
    assert second["finish failed"] == "RuntimeError: the first process failed: NonFiniteLossError: by the test"


@pytest.mark.slow
def test_a_resumed_run_is_as_if_it_had_never_stopped(tmp_path):
    found = run(torchrun("--standalone", "--nproc-per-node=2", str(SCRIPT), "resumed"), tmp_path)
    for one in found:
        assert one["whole"]["parameters"] == one["resumed"]["parameters"] == found[0]["whole"]["parameters"]
        assert one["whole"]["history"] == one["resumed"]["history"]
    assert len(list(tmp_path.glob("left-*"))) == 2  # the connection ended before the interpreter
    with pytest.raises(ValueError, match="it is that of a run of 2 processes, and this one has 1"):
        resumable().train(4, resume_from=tmp_path / "run", **OPTIONS)


@pytest.mark.slow
def test_however_they_are_started_processes_train_the_same(tmp_path):
    """By torchrun on two nodes, by SLURM, by Lightning from one process, and as spawned processes."""
    port = str(29_500 + os.getpid() % 1000)
    ends = {}
    for name in ("torchrun", "slurm", "ddp", "ddp_spawn", "ddp_fork"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "torchrun":
            nodes = ("--nnodes=2", "--nproc-per-node=1", f"--master-port={port}", "--master-addr=127.0.0.1")
            second = [torchrun(*nodes, f"--node-rank={rank}", str(SCRIPT), "small") for rank in (0, 1)]
            found = both(second, folder)
        elif name == "slurm":
            job = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
            job |= {"SLURM_JOB_ID": port, "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
            envs = [job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]
            found = both([[sys.executable, str(SCRIPT), "small"]] * 2, folder, envs)
        else:
            command = [sys.executable, str(SCRIPT), "small", "--devices=2", f"--strategy={name}"]
            found = run(command, folder, n=2 if name == "ddp" else 1)
        ends[name] = {(one["parameters"], json.dumps(one["history"])) for one in found}
    assert len(set().union(*ends.values())) == 1


PAGE = Path(__file__).parents[1] / "docs" / "how_to" / "several_processes.md"


@pytest.mark.slow
@pytest.mark.skipif(not PAGE.exists(), reason="the sources alone have the page")
def test_the_run_on_two_nodes_of_the_documentation(tmp_path, monkeypatch):
    text = PAGE.read_text()
    (tmp_path / "train.py").write_text(text.split("```python\n")[1].split("```")[0])
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    paths = [str(Path(pyromosaic.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = "set -e\n" + text.split("```bash\n")[1].split("```")[0]
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(MultiVI.load(tmp_path / "pbmc_model").history) == 2


def both(commands, folder, envs=({}, {})):
    """What two processes that are started side by side say."""
    paths = [str(Path(pyromosaic.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    runs = [
        subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=os.environ | settings | env)
        for command, env in zip(commands, envs, strict=True)
    ]
    said = [one.communicate(timeout=570)[1] for one in runs]
    assert [one.returncode for one in runs] == [0, 0], said
    return [json.loads(path.read_text()) for path in sorted(folder.glob("process-*.json"))]
