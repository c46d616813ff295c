"""The script that checks a GPU, tried on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the sources alone have the benchmarks")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu

    return gpu


def test_noise_is_the_same_wherever_it_is_drawn(script):
    def draws():
        x, laid = torch.zeros(3).normal_(), torch.zeros(3)
        return [x, torch.randn_like(x), torch.rand(2, device="cpu"), torch.bernoulli(laid + 0.5), torch.normal(x, 1.0)]

    torch.manual_seed(1)
    expected = draws()
    torch.manual_seed(1)
    with script.NoiseOfTheCPU():
        found = draws()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.slow
def test_it_runs_on_the_cpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--cells", "900", "--genes", "200", "--proteins", "20"]
    command += ["--sizes", "256", "--json", str(tmp_path / "gpu.json")]
    paths = [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    (figures,) = json.loads((tmp_path / "gpu.json").read_text())["runs"]["pyromosaic"]
    for what in ("loss", "gradient", "latent"):
        for model in ("MultiVI", "MultiVI, adversary", "ContrastiveVI", "DiagVI", "ScModal"):
            assert figures[f"{model}: {what}"] == 0
    assert figures["ms a step of 256 cells"] > 0 and figures["aten::_local_scalar_dense a step"] > 0


def test_a_difference_is_said(script, monkeypatch):
    """Gradients of one device are changed."""
    evaluated, calls = script.evaluated, []

    def wrong(model, device):
        calls.append(device)
        found = evaluated(model, device)
        return found if len(calls) % 2 else found | {"gradient": found["gradient"] * 1.1}

    one = next(script.models())
    monkeypatch.setattr(script, "models", lambda: [one])
    monkeypatch.setattr(script, "evaluated", wrong)
    figures, said = script.compare(torch.device("cpu"))
    assert said == ["MultiVI: the gradient differs by 0.1; accepted: 0.01"] and figures["MultiVI: loss"] == 0
