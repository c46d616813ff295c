"""Kill training runs, damage files, and model random data: count what is lost, what is loaded wrongly, what fails.

    python reliability.py kills --n 100 --folders . /dev/shm
    python reliability.py files --n 500
    python reliability.py mosaics --n 1000

Each failure is printed with its number; `--first NUMBER --n 1` repeats it. All files are harmless, and lie in temporary
folders.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from hashlib import sha256
from io import StringIO
from pathlib import Path
from shutil import copytree, rmtree
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np
from common import quiet
from rich.console import Console
from rich.table import Table

EPOCHS, CALM = 12, {"progress_bar": False, "accelerator": "cpu", "batch_size": 64}
SECONDS, MEGABYTES = 2.0, 200.0


def simulated(kind: str) -> Any:
    """A small model of one of the four classes, not trained."""
    from pyromosaic import ContrastiveVI, DiagVI, Mosaic, MultiVI, ScModal, simulate
    from pyromosaic.guidance import GuidanceGraph

    if kind == "MultiVI":
        mosaic = Mosaic.from_mudata(simulate(300, {"rna": 30, "adt": 6}, seed=1)[0], batch_key="batch")
        return MultiVI(mosaic, n_latent=3)
    if kind == "ContrastiveVI":
        mdata = simulate(300, {"rna": 30}, treated=0.5, seed=1)[0]
        return ContrastiveVI(Mosaic.from_mudata(mdata).with_cohorts("condition", background="control"), n_latent=3)
    mdata, truth = simulate(300, {"rna": 30, "adt": 10}, links={"adt": 0.8}, types=3, seed=1)
    mosaic = Mosaic.from_anndata({name: adata.copy() for name, adata in mdata.mod.items()})
    ends = [(("rna", row.gene), (row.modality, row.feature)) for row in truth.links.itertuples()]
    graph = GuidanceGraph.from_edges(mosaic, ends, sign=truth.links["sign"])
    return {"DiagVI": DiagVI, "ScModal": ScModal}[kind](mosaic, graph)


KINDS = ("MultiVI", "ContrastiveVI", "DiagVI", "ScModal")


def state(model: Any) -> list[Any]:
    return [*model.model.state_dict().items(), *model.guide.state_dict().items()]


def equal(one: Any, other: Any) -> bool:
    """Whether parameters and history are the same to the last bit."""
    import torch

    same = [a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(state(one), state(other), strict=True)]
    return all(same) and one.history.equals(other.history)


def calm() -> None:
    import torch

    quiet()
    torch.set_num_threads(1)


# Kills

MOMENTS = (
    "an epoch",
    "the writing of a checkpoint",
    "the sleep phase",
    "imputation",
    "the saving of a model",
    "the writing of a result",
)
OLD = b"an earlier result"


def victim(kind: str, folder: Path, said: Any) -> None:
    """Train, impute and save until killed; say what is being done."""
    import lightning.pytorch as lightning

    import pyromosaic.models.base as base

    calm()

    class Say(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, plan: Any) -> None:
            said.send(("epoch", trainer.current_epoch + 1))

    sleep = base.sleep

    def announced(*arguments: Any, **options: Any) -> Any:
        said.send(("sleep", 0))
        return sleep(*arguments, **options)

    base.sleep = announced
    model = simulated(kind)
    model.train(EPOCHS, sleep_steps=30, checkpoint_dir=folder / "run", callbacks=[Say()], **CALM)
    said.send(("saving", 0))
    model.save(folder / "model")
    said.send(("saved", 0))
    for _ in range(200):
        model.save(folder / "model", overwrite=True)
    said.send(("imputation", 0))
    while True:
        model.get_imputed_values("rna", n_samples=5)


def command(data: Path, folder: Path, *more: str) -> None:
    """Train, impute and write by the command line."""
    from pyromosaic.cli import app

    calm()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    places = ["--out", folder / "result.h5mu", "--model", folder / "model", "--checkpoints", folder / "run"]
    settings = ["--epochs", EPOCHS, "--batch-size", 64, "--n-latent", 3, "--batch-key", "batch", *more]
    app(["integrate", str(data), *map(str, places + settings)])


def results(folder: Path) -> list[np.ndarray]:
    """All numbers that the command line has added to the data."""
    from mudata import read_h5mu

    mdata = read_h5mu(folder / "result.h5mu")
    imputed = [mdata[name] for name in ("rna_imputed", "adt_imputed")]
    return [mdata.obsm["X_multivi"], *(a.X for a in imputed), *(a.layers["sd"] for a in imputed)]


def started(target: Callable[..., None], *arguments: Any) -> Any:
    """A process of its own."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def appears(folder: Path, pattern: str, seconds: float) -> bool:
    """Wait for a file."""
    deadline = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        if time.monotonic() > deadline:
            return False
    return True


def kill_command(rng: np.random.Generator, folder: Path, data: Path, reference: Path) -> str:
    """Kill the command line while it writes its result over an earlier one, run it again, and say what came of it."""
    from pyromosaic import MultiVI

    (folder / "result.h5mu").write_bytes(OLD)
    process = started(command, data, folder, "--overwrite")
    if not appears(folder, ".result.h5mu.*.part", 60):
        return "FAILED: no result is written"
    time.sleep(rng.uniform(0, 0.3))
    process.kill()
    process.join()

    def same() -> bool:
        return all(np.array_equal(*pair) for pair in zip(results(folder), results(reference), strict=True))

    if (folder / "result.h5mu").read_bytes() != OLD and not same():
        return "FAILED: the earlier result is lost and the new one is not whole"
    process = started(command, data, folder, "--overwrite", "--resume")
    process.join()
    if process.exitcode != 0 or not same():
        return "FAILED: the result of the command run again is another"
    if not equal(*(MultiVI.load(place / "model") for place in (folder, reference))):
        return "FAILED: the model of the command run again is another"
    if left := sorted(path.name for path in folder.rglob("*.part")):
        return f"FAILED: {left[0]} is left"
    return "equal to the last bit, epochs lost: 0"


def kill(number: int, folder: Path, home: Path, references: dict[str, Any]) -> str:
    """Kill a run, resume it, and say what came of it."""
    from pyromosaic.train.checkpoints import newest

    rng = np.random.default_rng(number)
    moment, kind = MOMENTS[number % len(MOMENTS)], KINDS[rng.integers(len(KINDS))]
    if moment == MOMENTS[5]:
        return kill_command(rng, folder, home / "data.h5mu", home)
    hear, say = multiprocessing.Pipe(duplex=False)
    process = started(victim, kind, folder, say)
    say.close()
    wanted = {MOMENTS[2]: "sleep", MOMENTS[3]: "imputation", MOMENTS[4]: "saved"}.get(moment, "epoch")
    at, begun = int(rng.integers(2, EPOCHS + 1)), 0
    while True:
        what, value = hear.recv()
        begun = value if what == "epoch" else EPOCHS
        if what == wanted and (what != "epoch" or value == at):
            break
    if moment == MOMENTS[1]:
        appears(folder / "run", ".last.ckpt.*.part", 5)
        time.sleep(rng.uniform(0, 0.003))
    else:
        time.sleep(rng.uniform(0, 0.15))
    process.kill()
    process.join()
    with suppress(EOFError, OSError):  # the end of what it has said
        while hear.poll():
            what, value = hear.recv()
            begun = value if what == "epoch" else EPOCHS
    done = len(newest(folder / "run")[1]["run"]["rows"])
    resumed = simulated(kind)
    with warnings.catch_warnings(record=True) as warned, redirect_stderr(StringIO()):
        warnings.simplefilter("always")
        resumed.train(EPOCHS, sleep_steps=30, resume_from=folder / "run", checkpoint_dir=folder / "run", **CALM)
    if any("is taken" in str(w.message) for w in warned):
        return "FAILED: the newest checkpoint was damaged"
    if not equal(resumed, references[kind]):
        return f"FAILED: {kind} resumed after {done} epochs is another"
    if moment in MOMENTS[3:] and not equal(type(resumed).load(folder / "model"), references[kind]):
        return f"FAILED: the saved {kind} is another"
    return f"equal to the last bit, epochs lost: {begun - done}"  # with the one under way


def kills(options: argparse.Namespace) -> Counter:
    """Kill -9 at random moments, resume, compare."""
    from pyromosaic import simulate

    calm()
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["pyromosaic", "pyromosaic.models", "pyromosaic.cli"]
    )
    references, home = {}, Path(options.scratch.name)
    for kind in KINDS:
        references[kind] = simulated(kind)
        references[kind].train(EPOCHS, sleep_steps=30, **CALM)
    simulate(300, {"rna": 30, "adt": 6}, seed=1)[0].write(home / "data.h5mu")
    started(command, home / "data.h5mu", home).join()

    def once(number: int) -> tuple[str, str]:
        place = options.folders[number // len(MOMENTS) % len(options.folders)]
        with TemporaryDirectory(prefix="pyromosaic-kills-", dir=place) as folder:
            outcome = kill(number, Path(folder).absolute(), home, references)
        return f"{MOMENTS[number % len(MOMENTS)]}, in {place}", outcome

    return counted(once, options)


# Files


class Marker:
    """Touches a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def of_bytes(rng: np.random.Generator, path: Path, marker: Path) -> str:
    """Change the bytes of a file."""
    content = bytearray(path.read_bytes())
    at, n = int(rng.integers(len(content))), int(rng.integers(1, 200))
    how = rng.choice(["flip", "cut", "extend", "insert", "remove", "empty", "pickle", "text", "repeat"])
    if how == "flip":
        content[at] ^= int(rng.integers(1, 256))
    elif how in ("extend", "insert"):
        at = len(content) if how == "extend" else at
        content[at:at] = rng.bytes(n)
    elif how == "remove":
        del content[at : at + n]
    else:
        deep = b"[" * 100_000
        content = {"cut": content[:at], "empty": b"", "pickle": pickle.dumps(Marker(str(marker))), "text": deep}.get(
            how, content + content
        )
    path.write_bytes(content)
    return f"bytes: {how}"


def of_links(rng: np.random.Generator, path: Path, marker: Path) -> str:
    """Put something else in the place of a file."""
    how = rng.choice(
        ["nothing", "pipe", "folder", "device", "dangling", "circle", "other file", "link to itself moved"]
    )
    moved = path.with_name("moved")
    path.rename(moved)
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "nothing":
        targets = {"device": "/dev/zero", "dangling": "nowhere", "circle": path.name, "other file": "/etc/passwd"}
        path.symlink_to(targets.get(how, moved.name))
    return f"links: {how}"


def of_sizes(rng: np.random.Generator, path: Path, marker: Path) -> str:
    """Let a file seem, or say that it is, far larger."""
    if rng.random() < 0.5:
        os.truncate(path, int(rng.choice([10**9, 10**11])))  # a hole, which takes no room
        return "sizes: hole at the end"
    content = bytearray(path.read_bytes())
    start = content.find(b"{")
    start = max(start - 8, 0) if path.suffix != ".json" else 0
    content[start : start + 8] = int(rng.choice([2**63 - 1, 2**40, 2**31, 0])).to_bytes(8, "little")
    path.write_bytes(content)
    return "sizes: header"


ODD = (None, True, -1, 0, 1.5, 10**30, "word", "", [], {}, [[[]]], float("nan"), 10**6, "../../x", "__import__('os')")


def leaf(rng: np.random.Generator, content: Any, depth: int = 0) -> Any:
    """A copy of plain values in which one is another, or gone, or renamed."""
    if isinstance(content, dict | list) and content and (depth == 0 or rng.random() < 0.8):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key, copy = keys[rng.integers(len(keys))], type(content)(content)
        how = rng.random()
        if how < 0.12:
            del copy[key]
        elif how < 0.2 and isinstance(copy, dict):
            copy[f"{key}_"] = copy.pop(key)
        else:
            copy[key] = leaf(rng, content[key], depth + 1)
        return copy
    return ODD[rng.integers(len(ODD))]


def of_keys(rng: np.random.Generator, path: Path, marker: Path) -> str:
    """Change what a file says, and sign it again half of the time."""
    from pyromosaic.train.checkpoints import Packed, read

    if path.suffix == ".ckpt":
        Packed(leaf(rng, read(path))).write(path)
        return "keys, signed again"
    description = path.with_name("model.json")
    content = leaf(rng, json.loads(description.read_text()))
    signed = rng.random() < 0.5 and isinstance(content, dict)
    if signed:
        content.pop("digest", None)
        content["digest"] = sha256(json.dumps(content).encode()).hexdigest()
    description.write_text(json.dumps(content))
    return "keys, signed again" if signed else "keys"


def of_types(rng: np.random.Generator, path: Path, marker: Path) -> str:
    """Change tensors, and sign them again."""
    import torch
    from safetensors.torch import load_file, save_file

    from pyromosaic.train.checkpoints import Packed, read

    content = read(path) if path.suffix == ".ckpt" else None
    file = path.with_name("weights.safetensors")
    tensors = dict(content["state_dict"]) if content else load_file(file)
    name = sorted(tensors)[rng.integers(len(tensors))]
    value = tensors[name].clone()
    how = rng.choice(["integers", "complex", "NaN", "infinity", "shape", "missing", "more", "half", "long", "empty"])
    changes: dict[str, Callable[[], Any]] = {
        "integers": lambda: value.to(torch.int16),
        "complex": lambda: value.to(torch.complex64) if content else value.to(torch.bool),
        "NaN": lambda: torch.full(value.shape, torch.nan),
        "infinity": lambda: torch.full(value.shape, torch.inf),
        "shape": lambda: torch.zeros(*value.shape, 2),
        "half": lambda: value.to(torch.float16),
        "long": lambda: torch.zeros(3_000_000),
        "empty": lambda: torch.zeros(0, 3),
    }
    if how == "missing":
        del tensors[name]
    else:
        tensors["more" if how == "more" else name] = value if how == "more" else changes[how]()
    if content:
        Packed(content | {"state_dict": tensors}).write(path)
    else:
        save_file(tensors, file)
        description = json.loads(path.with_name("model.json").read_text())
        description["weights"] = sha256(file.read_bytes()).hexdigest()
        description.pop("digest")
        description["digest"] = sha256(json.dumps(description).encode()).hexdigest()
        path.with_name("model.json").write_text(json.dumps(description))
    return f"tensors, signed again: {how}"


MUTATIONS = (of_bytes, of_links, of_sizes, of_keys, of_types)


def opened(path: Path, kind: str, said: Any) -> None:
    """Load a model or resume a run in a process of its own, and say what came of it."""
    import pyromosaic

    calm()
    original = simulated(kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.monotonic()
    try:
        if path.suffix == ".ckpt":
            model = original
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            model.train(3, resume_from=path, **CALM)
        else:
            model = getattr(pyromosaic, kind).load(path.parent)
        outcome = "loaded"
    except ValueError as error:
        outcome, model = ("refused" if "\n" not in str(error) else f"FAILED: not one sentence: {error}"), None
    except BaseException as error:  # noqa: BLE001  whatever it is, it is counted
        outcome, model = f"FAILED: {type(error).__name__}: {str(error)[:200]}", None
    seconds = time.monotonic() - began
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    found = None if model is None else ([(k, v.numpy()) for k, v in state(model)], model.history)
    said.send((outcome, seconds, megabytes, found))


def files(options: argparse.Namespace) -> Counter:
    """Change saved models and checkpoints, and load them."""
    calm()
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["pyromosaic", "pyromosaic.models", "pyromosaic.cli"]
    )
    home = Path(options.scratch.name)
    wholes = {}
    for kind in KINDS:
        wholes[kind] = simulated(kind)
        wholes[kind].train(3, checkpoint_dir=home / kind, **CALM)
        wholes[kind].save(home / kind)
        (home / kind / "previous.ckpt").unlink(missing_ok=True)

    def once(number: int) -> tuple[str, str]:
        rng = np.random.default_rng(number)
        kind, mutate = KINDS[rng.integers(len(KINDS))], MUTATIONS[number % len(MUTATIONS)]
        copy, marker = home / "copy", home / "code-ran"
        rmtree(copy, ignore_errors=True)
        copytree(home / kind, copy)
        path = copy / rng.choice(["model.json", "weights.safetensors", "last.ckpt"])
        what = mutate(rng, path, marker)
        hear, say = multiprocessing.Pipe(duplex=False)
        process = started(opened, path, kind, say)
        say.close()
        try:
            if not hear.poll(60):
                process.kill()
                return what, f"FAILED: {path.name} hangs"
            outcome, seconds, megabytes, found = hear.recv()
        except EOFError:
            return what, f"FAILED: the process that loads {path.name} ends"
        finally:
            process.join(10)
        if marker.exists():
            return what, "FAILED: code ran"
        of = f"{kind}'s {path.name} ({what})"
        if outcome == "refused" and (seconds > SECONDS or megabytes > MEGABYTES):
            return what, f"FAILED: {of} is refused after {seconds:.1f} s and {megabytes:.0f} MB"
        if outcome != "loaded":
            return what, outcome if outcome == "refused" else f"{outcome} at {of}"
        own = state(wholes[kind])
        same = all(np.array_equal(a.numpy(), b[1]) for (_, a), b in zip(own, found[0], strict=True))
        if same and found[1].equals(wholes[kind].history):
            return what, "loaded equal"
        finite = all(np.isfinite(b[1]).all() for a, b in zip(own, found[0], strict=True) if np.isfinite(a[1]).all())
        if "signed again" in what and finite:
            return what, "loaded as the file, signed again, says"
        return what, f"FAILED: {of} is loaded as something else"

    return counted(once, options)


# Mosaics

COUNTED = ("nb", "zinb", "nb_mixture", "multinomial", "poisson", "bernoulli")
LIKELIHOODS = (*COUNTED, "normal", "log1p_normal", "ziln", "zig")


def random_data(rng: np.random.Generator, least: int) -> tuple[dict[str, Any], dict[str, str]]:
    """AnnData and likelihood of each modality of a random mosaic."""
    import anndata
    import pandas as pd
    from scipy import sparse

    n = int(rng.integers(2, 61))
    names = np.array([f"c{i}" for i in range(n)])
    obs = pd.DataFrame({"batch": rng.choice(["a", "b", "c"][: rng.integers(1, 4)], n)}, names)
    obs["group"] = rng.choice(["x", "y"], n)
    adatas, likelihoods = {}, {}
    for i in range(rng.integers(least, 5)):
        likelihood, width = str(rng.choice(LIKELIHOODS)), int(rng.integers(1, 21))
        cells = np.flatnonzero(rng.random(n) < rng.choice([0.3, 0.7, 1.0]))
        cells = cells if len(cells) > 1 else np.arange(2)
        shape, density = (len(cells), width), rng.choice([0.05, 0.3, 1.0])
        if likelihood in COUNTED:
            x = rng.negative_binomial(2, 1 / (1 + rng.gamma(1, 5, width)), shape).astype("float64")
        else:
            x = rng.normal(size=shape) if likelihood == "normal" else rng.gamma(2, 1, shape)
        x *= rng.random(shape) < density
        x = x.astype(rng.choice(["float32", "float64", "int32", "int64"] if likelihood in COUNTED else ["float32"]))
        store = [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array][rng.integers(4)]
        var = pd.DataFrame(index=[f"m{i}f{j}" for j in range(width)])
        adatas[f"m{i}"], likelihoods[f"m{i}"] = anndata.AnnData(store(x), obs.iloc[cells].copy(), var), likelihood
    return adatas, likelihoods


class Wrong(Exception):
    """A result that is not as it must be."""


def finite(what: str, values: Any) -> None:
    if not np.isfinite(np.asarray(values, dtype=float)).all():
        raise Wrong(f"{what} is not finite")


def modelled(kind: str, rng: np.random.Generator, folder: Path) -> None:
    """Register, train, save, load and ask one model of random data."""
    import pandas as pd

    import pyromosaic
    from pyromosaic import ModalitySpec, Mosaic
    from pyromosaic.guidance import GuidanceGraph

    linked = kind in ("DiagVI", "ScModal")
    adatas, likelihoods = random_data(rng, 2 if linked else 1)
    batch = "batch" if rng.random() < 0.5 else None
    empty = rng.choice(["refuse", "holes", "keep"], p=[0.1, 0.7, 0.2])
    specs = {
        name: ModalitySpec(likelihood, batch_key=batch, empty_cells=str(empty))
        for name, likelihood in likelihoods.items()
    }
    if not linked:
        mosaic = Mosaic.from_anndata(adatas, specs, match_cells=True)
        if kind == "ContrastiveVI":
            mosaic = mosaic.with_cohorts("group", background="x")
        model = getattr(pyromosaic, kind)(mosaic, n_latent=int(rng.integers(1, 8)))
    else:
        mosaic = Mosaic.from_anndata(adatas, specs)
        names = list(adatas)
        ends = [
            ((a, adatas[a].var_names[k]), (b, adatas[b].var_names[k]))
            for i, a in enumerate(names)
            for b in names[:i]
            for k in range(min(adatas[a].n_vars, adatas[b].n_vars))
        ]
        model = getattr(pyromosaic, kind)(mosaic, GuidanceGraph.from_edges(mosaic, ends))
    model.train(2, progress_bar=False, accelerator="cpu", batch_size=int(rng.integers(4, 64)))
    finite("the history", model.history.filter(like="train"))
    model.save(folder, overwrite=True)
    again = type(model).load(folder, mosaic)
    latents = model.get_latent_representation(), again.get_latent_representation()
    finite("the latent space", latents[0])
    if not latents[0].equals(latents[1]) or not equal(model, again):
        raise Wrong("the loaded model is another")
    groups = pd.Series(np.resize(["p", "q"], mosaic.n_cells), mosaic.obs_names)
    for name in mosaic.modalities:
        means = [m.get_imputed_values(name, n_samples=3) for m in (model, again)]
        finite(f"imputed {name}", means[0].mean)
        finite(f"the deviation of {name}", means[0].sd)
        if not means[0].mean.equals(means[1].mean):
            raise Wrong(f"{name} is imputed otherwise after loading")
        finite(f"drawn {name}", model.posterior_predictive_sample(name, n_samples=2))
        one, two = (groups.index[groups == g] for g in "pq")
        table = model.differential(cells1=one, cells2=two, modality=name)
        finite(f"differential {name}", table.select_dtypes("number").dropna(axis=1, how="all"))


def mosaics(options: argparse.Namespace) -> Counter:
    """Model random small mosaics by all four models."""
    import pyromosaic

    calm()
    home = str(Path(pyromosaic.__file__).parent)

    def once(number: int) -> tuple[str, str]:
        kind = KINDS[number % len(KINDS)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                modelled(kind, np.random.default_rng(number // len(KINDS)), Path(options.scratch.name) / "model")
        except Wrong as error:
            return kind, f"FAILED: {error}"
        except (ValueError, TypeError) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            if last.filename.startswith(home) and "\n" not in str(error):
                if options.verbose:
                    print(f"  {number} {kind}: {error}")
                return kind, "refused in one sentence"
            raise
        return kind, "all finite, equal after loading"

    return counted(once, options)


def counted(once: Callable[[int], tuple[str, str]], options: argparse.Namespace) -> Counter:
    """Outcomes of all trials, or of those before Ctrl-C or SIGTERM; a failure is printed with its number."""
    counts: Counter = Counter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for number in range(options.first, options.first + options.n):
        try:
            what, outcome = once(number)
        except KeyboardInterrupt:
            break
        except Exception as error:  # noqa: BLE001  a trial that cannot be judged has failed
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            what, outcome = "trial", f"FAILED: {type(error).__name__} at {where}: {str(error)[:200]}"
        if outcome.startswith("FAILED"):
            print(f"{number}, {what}: {outcome}", flush=True)
            outcome = "FAILED"
        counts[what, outcome] += 1
    return counts


def main() -> None:
    """Run the trials asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trials = parser.add_subparsers(required=True)
    for run, n in ((kills, 100), (files, 500), (mosaics, 1000)):
        part = trials.add_parser(run.__name__, help=run.__doc__)
        part.add_argument("--n", type=int, default=n, help=f"number of trials (default {n})")
        part.add_argument("--first", type=int, default=0, help="number of the first trial, its seed")
        part.add_argument("--verbose", action="store_true", help="print refusals")
        part.set_defaults(run=run)
        if run is kills:
            part.add_argument(
                "--folders", type=Path, nargs="+", default=[Path(gettempdir())], help="where checkpoints go, in turn"
            )
    options = parser.parse_args()
    began = time.monotonic()
    with TemporaryDirectory() as scratch:
        options.scratch = argparse.Namespace(name=scratch)
        counts = options.run(options)
    table = Table(
        "trial",
        "outcome",
        "number",
        title=f"{sum(counts.values())} {options.run.__name__}, {time.monotonic() - began:.0f} s",
    )
    for (what, outcome), number in sorted(counts.items()):
        table.add_row(what, outcome, str(number))
    Console(width=120).print(table)
    raise SystemExit(any(outcome == "FAILED" for _, outcome in counts))


if __name__ == "__main__":
    main()
