"""Models trained by several processes, each of which writes what it has; started by test_processes.py.

every    each model once, early stopping, and runs in which one process fails
resumed  a run, and one that goes on from its middle
small    one short run
"""

import argparse
import atexit
import json
import os
from hashlib import sha256
from pathlib import Path

import pandas as pd
import torch
from lightning.pytorch import Callback
from torch import distributed

from pyromosaic import ContrastiveVI, DiagVI, Mosaic, MultiVI, ScModal, simulate
from pyromosaic.penalties import Adversary
from pyromosaic.train import NonFiniteLossError

OPTIONS = {"progress_bar": False, "accelerator": "cpu", "batch_size": 16, "validation": 0.2, "sleep_steps": 2}


def digest(model):
    """Of all parameters, with what `finish` has learnt."""
    found = sha256()
    for part in (model.model, model.guide):
        for name, value in part.state_dict().items():
            found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def history(model):
    return json.loads(model.history.reset_index().to_json(orient="records", double_precision=15))


class Watch(Callback):
    """Cells that this process trained on in the first epoch, its first parameters, and a draw of its noise."""

    def __init__(self):
        self.trained = []

    def on_train_start(self, trainer, plan):
        values = torch.cat([p.detach().flatten() for p in plan.parameters()])
        self.start, self.noise = float(values.double().sum()), torch.get_rng_state().numpy().tobytes().hex()[:2000]

    def on_train_batch_start(self, trainer, plan, minibatch, step):
        if trainer.current_epoch == 0:
            self.trained += minibatch.index.tolist()


class Spoil(Callback):
    """Makes the parameters of one process infinite."""

    def on_train_batch_start(self, trainer, plan, minibatch, step):
        if step == 1 and trainer.global_rank == 1:
            with torch.no_grad():
                next(plan.parameters()).fill_(torch.inf)


def mosaics():
    rna_adt = simulate(100, {"rna": 20, "adt": 5}, seed=0)[0]
    rare = {"rna": rna_adt["rna"].copy(), "adt": rna_adt["adt"][:6].copy()}  # no antibodies in most minibatches
    treated = Mosaic.from_mudata(simulate(90, {"rna": 20}, treated=1 / 3, seed=0)[0])
    apart = Mosaic.from_mudata(simulate(80, {"rna": 20, "adt": 5}, patterns=["rna", "adt"], seed=0)[0])
    return {
        "rare": Mosaic.from_anndata(rare, match_cells=True),
        "apart": apart,
        "treated": treated.with_cohorts("condition", background="control"),
    }


def every():
    data, small, found = mosaics(), {"n_latent": 2, "n_hidden": 8}, {}
    links = pd.DataFrame({name: data["apart"].schema[name].features[:5] for name in ("rna", "adt")})
    models = {
        "MultiVI": (MultiVI(data["rare"], **small), {}),
        "adversary": (MultiVI(data["rare"], adversary=Adversary(weight=1.0), **small), {}),
        "early stopping": (MultiVI(data["rare"], **small), {"n_epochs": 30, "early_stopping": 1, "learning_rate": 0.1}),
        "accumulated": (MultiVI(data["rare"], adversary=1.0, **small), {"accumulate_grad_batches": 2}),
        "DiagVI": (DiagVI(data["apart"], links, linkage=None, n_latent=2, n_hidden=8), {}),
        "ContrastiveVI": (ContrastiveVI(data["treated"], n_hidden=8), {}),
        "ScModal": (ScModal(data["apart"], links, refresh_every=1, **small), {}),
    }
    for name, (model, options) in models.items():
        watch = Watch()
        model.train(callbacks=[watch], **{"n_epochs": 3} | OPTIONS | options)
        found[name] = {"parameters": digest(model), "history": history(model), "n_train": len(model.split.train)}
        found[name] |= {"trained": watch.trained, "start": watch.start, "noise": watch.noise}
    folder = Path(f"saved-{distributed.get_rank()}")
    models["MultiVI"][0].save(folder)
    return {"models": found, "saved": folder.exists(), **failures(data["rare"], small)}


def failures(mosaic, small):
    model = MultiVI(mosaic, **small)
    before, said = digest(model), {}
    try:
        model.train(3, callbacks=[Spoil()], **OPTIONS)
    except NonFiniteLossError as error:
        said["failed"] = str(error).partition(", at ")[0]
    assert digest(model) == before and not len(model.history)
    if distributed.get_rank() == 0:
        model.finish = fails
    try:
        model.train(1, **OPTIONS)
    except RuntimeError as error:
        said["finish failed"] = f"{type(error).__name__}: {error}"
    assert digest(model) == before and not len(model.history)
    return said


def fails(mosaic):
    raise NonFiniteLossError("by the test")


def resumable():
    return MultiVI(mosaics()["rare"], adversary=1.0, n_latent=2, n_hidden=8)


def resumed():
    found = {}
    options = OPTIONS | {"checkpoint_dir": "run"}

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, plan):
            if trainer.current_epoch == 2:
                raise RuntimeError("stop here")

    whole = resumable()
    whole.train(4, **OPTIONS)
    found["whole"] = {"parameters": digest(whole), "history": history(whole)}
    again = resumable()
    try:
        again.train(4, callbacks=[Stop()], **options)
    except RuntimeError:
        distributed.barrier()
    again.train(4, resume_from="run", **options)
    found["resumed"] = {"parameters": digest(again), "history": history(again)}
    return found


def small(**options):
    model = MultiVI(mosaics()["rare"], n_latent=2, n_hidden=8)
    model.train(3, early_stopping=2, **OPTIONS | options)
    return {"parameters": digest(model), "history": history(model)}


def say_whether_connected():
    if not distributed.is_initialized():
        Path(f"left-{os.environ.get('RANK', 0)}").touch()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["every", "resumed", "small"])
    parser.add_argument("--devices", type=int)
    parser.add_argument("--strategy", default="auto")
    options = parser.parse_args()
    atexit.register(say_whether_connected)  # runs after what training has registered
    if options.what == "small":
        found = small(strategy=options.strategy, **({} if options.devices is None else {"devices": options.devices}))
    else:
        found = {"every": every, "resumed": resumed}[options.what]()
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    Path(f"process-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
