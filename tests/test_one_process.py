"""Training runs in one process on one device; several are refused in one sentence, before anything is changed."""

import os
import subprocess
import sys

import pytest
from lightning.pytorch.strategies import DDPStrategy

from pyromosaic import Mosaic, MultiVI, simulate

QUIET = {"progress_bar": False, "accelerator": "cpu", "batch_size": 16}
STARTED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_NAME")


@pytest.fixture(scope="module")
def model():
    return MultiVI(Mosaic.from_mudata(simulate(40, {"rna": 20, "adt": 5}, seed=0)[0]), n_latent=2, n_hidden=4)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)


def refused(model, found, folder, **options):
    with pytest.raises(ValueError, match="training runs in one process, on one device") as error:
        model.train(1, checkpoint_dir=folder / "run", **QUIET | options)
    assert f"found {found}. Start one process" in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "run").exists() and not len(model.history)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"devices": 2}, "devices=2"),
        ({"devices": "2"}, "devices='2'"),
        ({"devices": 2, "early_stopping": 2, "validation": 0.3}, "devices=2"),
        ({"devices": 2, "strategy": "ddp"}, "strategy='ddp'"),
        ({"strategy": "ddp_spawn"}, "strategy='ddp_spawn'"),
        ({"devices": 1, "strategy": "ddp_find_unused_parameters_true"}, "strategy='ddp_find_unused_parameters_true'"),
        ({"devices": 1, "num_nodes": 2}, "num_nodes=2"),
    ],
)
def test_several_devices_are_refused(model, options, found, tmp_path):
    refused(model, found, tmp_path, **options)


def test_a_strategy_of_ones_own_is_refused(model):
    with pytest.raises(ValueError, match="found strategy=<"):
        model.train(1, strategy=DDPStrategy(process_group_backend="gloo"), **QUIET)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"])
def test_processes_started_side_by_side_are_refused(model, name, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "2")
    refused(model, f"{name}=2", tmp_path)


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"},  # a shell in an allocation of four tasks
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_NAME": "bash"},
    ],
)
def test_one_process_is_taken(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    model = MultiVI(Mosaic.from_mudata(simulate(40, {"rna": 20}, seed=0)[0]), n_latent=2, n_hidden=4)
    model.train(1, devices=1, strategy="auto", num_nodes=1, **QUIET)
    model.train(1, devices="auto", **QUIET)
    assert len(model.history) == 1


SCRIPT = """
from pyromosaic import Mosaic, MultiVI, simulate
try:
    MultiVI(Mosaic.from_mudata(simulate(40, {"rna": 20}, seed=0)[0])).train(1, progress_bar=False, accelerator="cpu")
except ValueError as error:
    print(error, flush=True)
"""


@pytest.mark.slow
def test_torchrun_is_refused_in_each_process(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert run.stdout.count("found WORLD_SIZE=2. Start one process") == 2, run.stderr
