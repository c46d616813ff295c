"""Quality of MultiVI against the length of training, on simulated mosaics of RNA and antibodies of several sizes.

The learning rate falls over each run, therefore every length is a run of its own. It needs no scvi-tools.

    python benchmarks/length.py --cells 2000 --epochs 75 150 300
    python benchmarks/length.py --cells 10000 --epochs 15 30 60 150
    python benchmarks/length.py --cells 20000 --genes 300 --proteins 30 --epochs 40 --batch-size 256  # and without it
"""

import time
from argparse import Namespace

import numpy as np
from common import Figures, arguments, isolated, quiet, report


def trained(options: Namespace, n_cells: int, n_epochs: int, seed: int) -> Figures:
    """Train once, and look at cells that were not used, and at the alignment of modalities."""
    quiet()
    import torch

    from pyromosaic import Mosaic, MultiVI, metrics, simulate
    from pyromosaic.train import minibatch_for

    torch.set_num_threads(1)
    mdata, truth = simulate(
        n_cells,
        {"rna": options.genes, "adt": options.proteins},
        types=20,
        n_latent=10,
        separation=1.0,
        depth=0.2,
        patterns=["rna", "adt", "rna+adt"],
        keep_means=False,
        seed=seed,
    )
    model = MultiVI(Mosaic.from_mudata(mdata, batch_key="batch"), seed=seed)
    start = time.process_time()
    model.train(
        n_epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=seed,
        check_val_every_n_epoch=n_epochs,
        progress_bar=False,
    )
    assert model.split is not None
    n_train = len(model.split.train)
    size = options.batch_size or minibatch_for(n_train, model.largest_minibatch)
    last, n_steps = model.history.iloc[-1], n_epochs * -(-n_train // size)
    z, presence = model.get_latent_representation().to_numpy(), model._data(None).presence.to_numpy()
    only = [presence[:, i] & ~presence[:, 1 - i] for i in range(2)]
    types = np.asarray(truth.type)
    transfer = metrics.label_transfer_both_ways(z[only[0]], types[only[0]], z[only[1]], types[only[1]])
    return {
        "steps": n_steps,
        "held-out ELBO per cell": last["validation_elbo"],
        "held-out reconstruction per cell": last["validation_reconstruction"],
        "train ELBO per cell": last["train_elbo"],
        "transfer rna -> adt": transfer.x_to_y,
        "transfer adt -> rna": transfer.y_to_x,
        "processor seconds": time.process_time() - start,
    }


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[2000, 10_000])
    parser.add_argument("--epochs", type=int, nargs="+", default=[30, 150])
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--proteins", type=int, default=50)
    parser.add_argument("--batch-size", type=int, help="by default that of the model")
    parser.add_argument("--learning-rate", type=float, help="by default that of the model")
    parser.set_defaults(seeds=1)
    options = parser.parse_args()
    for n_cells in options.cells:
        runs: dict[str, list[Figures]] = {
            f"{n} epochs": [isolated(trained, options, n_cells, n, seed) for seed in range(options.seeds)]
            for n in options.epochs
        }
        path = options.json and options.json.with_stem(f"{options.json.stem}_{n_cells}")
        report(f"{n_cells} simulated cells", runs, vars(options), path)


if __name__ == "__main__":
    main()
