"""Methods about linked features: their values, how well they agree, and candidates for new links."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyromosaic.accepted import Count, Seed, Share, checked
from pyromosaic.data import Mosaic, measured
from pyromosaic.links import GuidanceGraph
from pyromosaic.models.mosaic_model import MosaicModel
from pyromosaic.neighbors import nearest
from pyromosaic.penalties import Cycle, Scores
from pyromosaic.tasks import inference_mode


class Linking(MosaicModel):
    """Methods about linked features; see `pyromosaic.ScModal`."""

    guide: Any
    graph: GuidanceGraph | None
    matches: dict[tuple[str, str], Scores]
    cycle: Cycle

    def linked_features(self, mosaic: Mosaic, a: str, b: str, graph: GuidanceGraph | None = None) -> np.ndarray:
        """Linked features of two modalities as the encoders see them, side by side, shape (N, links); 0 elsewhere.

        For a negative link, the sign of the second feature is flipped. Links of a feature that does not vary are left
        out. By default the graph of the model is used.
        """
        graph = self.graph if graph is None else graph
        assert graph is not None
        links = graph.links(a, b)
        values = np.zeros((mosaic.n_cells, len(links)), dtype=np.float32)
        varies = np.ones(len(links), dtype=bool)
        for name, sign in ((a, np.ones(len(links))), (b, links["sign"].to_numpy())):
            columns = pd.Index(self.schema[name].features).get_indexer(pd.Index(links[name]))
            cells = np.flatnonzero(mosaic.modalities[name].present)
            for part in np.array_split(cells, -(-len(cells) // 1024)):
                view = measured(mosaic, part).observed[name].to(self._device)
                values[part] = self.guide.modalities[name].encoder.scaling(view).cpu().numpy()[:, columns] * sign
            varies &= np.ptp(values[cells], axis=0) > 0
        if not varies.any():
            raise ValueError(
                f"modalities {a!r} and {b!r} have no linked features that vary, out of {len(links)} links; give at "
                'least one, or use linkage="cca", which also links modalities through others'
            )
        return values[:, varies]

    @checked
    def link_agreement(self, graph: Any, n_neighbors: Count = 15) -> float:
        """Agreement of linked features between a cell and its nearest cells in the other modality.

        With links that the model was not trained with, it shows which of two models aligns better, without pairs or
        labels. You can use it to choose the weights of the penalties.

        Parameters
        ----------
        graph
            Links that were left out, in the same form as for the model, e.g. a table.
        n_neighbors
            Number of nearest cells over which the feature of the other modality is averaged.

        Returns
        -------
        float
            Mean correlation over links, both directions, and aligned pairs of modalities.
        """
        mosaic, graph = self._data(None), GuidanceGraph.of(graph, self.schema)
        z, r = self.get_latent_representation().to_numpy(), []
        for a, b in self.matches:
            values = self.linked_features(mosaic, a, b, graph)
            for near, far in ((a, b), (b, a)):
                cells, others = (np.flatnonzero(mosaic.modalities[name].present) for name in (near, far))
                means = values[others[nearest(z[others], n_neighbors, z[cells])[1]]].mean(1)
                r.append(_correlations(values[cells], means))
        return float(np.concatenate(r).mean())

    @checked
    def feature_links(
        self, first: str, second: str, *, level: Share = 0.05, n_shuffles: Count = 100, seed: Seed = 0
    ) -> pd.DataFrame:
        """Features of two modalities with similar responses to the shared latent variable: candidates for links.

        The posterior means of all cells are decoded in both modalities. The association of two features is the
        covariance of their standardised expected measurements, which is large if z explains much of both. Responses to
        a few dimensions all resemble each other. Therefore the null distribution comes from unrelated latent spaces:
        the second modality decodes posterior means that were rotated at random. An association is beyond chance if its
        absolute value is larger than the largest of all pairs in all but a share `level` of the rotations.

        Parameters
        ----------
        first, second
            The modalities.
        level
            That share, from 0 to 1; 1 gives all pairs.
        n_shuffles
            Number of rotations.
        seed
            Seed of the rotations.

        Returns
        -------
        pandas.DataFrame
            One row per pair, the strongest first: columns named after the modalities, ``correlation`` (the association,
            signed), and ``mutual``, whether each is the strongest partner of the other. `linkage.link_recovery` and
            `GuidanceGraph.from_linkage` take such tables.
        """
        x, y = self.schema[first], self.schema[second]
        z = torch.tensor(self.get_latent_representation().to_numpy()).to(self._device)
        centre, spread = z.mean(0), torch.linalg.cholesky(torch.cov(z.T) + 1e-6 * torch.eye(z.shape[1]).to(z))
        white = torch.linalg.solve_triangular(spread, (z - centre).T, upper=False)
        noise = torch.Generator().manual_seed(seed)

        def response(name: str, z: Tensor) -> Tensor:
            expected = self.cycle.expected(name, z)
            return expected - expected.mean(0)

        with inference_mode(self.model, self.guide):
            own = response(first, z).T / len(z)
            association = (own @ response(second, z)).cpu().numpy()
            largest = []
            for _ in range(n_shuffles):
                turn = torch.linalg.qr(torch.randn(z.shape[1], z.shape[1], generator=noise)).Q.to(z)
                largest.append((own @ response(second, centre + (spread @ turn @ white).T)).abs().max().item())
        size = np.abs(association)
        rows, columns = np.nonzero(size > (np.quantile(largest, 1 - level) if level < 1 else -1))
        best_column, best_row = size.argmax(axis=1), size.argmax(axis=0)
        table = pd.DataFrame(
            {
                first: np.array(x.features, dtype=object)[rows],
                second: np.array(y.features, dtype=object)[columns],
                "correlation": association[rows, columns],
                "mutual": (best_column[rows] == columns) & (best_row[columns] == rows),
            }
        )
        return table.sort_values("correlation", key=np.abs, ascending=False, ignore_index=True)


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of each column of x with that of y; 0 for a constant one."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (x * y).sum(0) / np.sqrt(np.maximum((x**2).sum(0) * (y**2).sum(0), 1e-12))
