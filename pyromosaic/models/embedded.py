"""Embeddings of features: their part in a program, and the methods about them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from torch import Tensor

from pyromosaic.accepted import Count, checked
from pyromosaic.data import Minibatch, View
from pyromosaic.data.minibatch import across_batches
from pyromosaic.links import GuidanceGraph
from pyromosaic.measurement import Measurement, scaled
from pyromosaic.models.mosaic_model import Cells, MosaicModel
from pyromosaic.tasks import inference_mode


@dataclass(frozen=True)
class Weights:
    """Weights in the objective; every modality has the same weight, however many cells have it.

    Parameters
    ----------
    graph
        Weight of the graph: of its likelihood, and of the divergence of the feature embeddings.
    cells
        Weight of the divergences of the cells, by modality.
    """

    graph: float
    cells: Mapping[str, float]

    @contextmanager
    def features(self, minibatch: Minibatch, n_features: int) -> Iterator[None]:
        """Plate of the feature embeddings; their divergence enters as the mean over features over their number."""
        scale = minibatch.n_cells * self.graph / n_features**2
        with scaled(scale), pyro.plate("features", n_features, dim=-1):
            yield


class LinkedMeasurement(Measurement):
    """A modality whose decoder reads the embeddings of its features, shape (..., features, latent)."""

    def predictors(self, z: Tensor, own: Tensor | None, view: View, *context: Any) -> dict[str, Tensor]:
        """Outputs of the decoder for cells and features, by predictor."""
        (embeddings,) = context
        return across_batches(lambda view: self.decoder(z, embeddings, own, view), view, self.likelihood)


def directed(graph: GuidanceGraph) -> tuple[Tensor, Tensor, Tensor]:
    """Edges in both directions and a self loop at every node, shape (2, E); their weights and signs, shape (E,)."""
    loops = np.arange(graph.n_features)
    edges = np.concatenate([graph.edges, graph.edges[::-1], [loops, loops]], axis=1)
    ones = np.ones(len(loops), dtype=np.float32)
    weight, sign = (np.concatenate([values, values, ones]) for values in (graph.weight, graph.sign))
    return torch.from_numpy(edges), torch.from_numpy(weight), torch.from_numpy(sign)


class Embedded(MosaicModel):
    """Methods about the embeddings of features; see `pyromosaic.DiagVI`."""

    guide: Any
    graph: GuidanceGraph

    @checked
    def get_feature_embeddings(self, modality: str | None = None) -> pd.DataFrame:
        """Posterior mean of the feature embeddings.

        Parameters
        ----------
        modality
            The modality; None for all.

        Returns
        -------
        pandas.DataFrame
            Features × latent dimensions, indexed by modality and feature.
        """
        with inference_mode(self.guide):
            loc = self.guide.graph_encoder()[0].cpu().numpy()
        pairs = [(name, feature) for name, features in self.graph.features.items() for feature in features]
        index = pd.MultiIndex.from_tuples(pairs, names=["modality", "feature"])
        frame = pd.DataFrame(loc, index, [f"v_{i}" for i in range(loc.shape[1])])
        if modality is None:
            return frame
        self.schema[modality]
        return frame.loc[[modality]]

    @checked
    def nearest_features(self, modality: str, to: str, features: Cells = None, n_neighbors: Count = 5) -> pd.DataFrame:
        """Features of another modality whose embeddings point in the same direction: candidates for regulatory links.

        Parameters
        ----------
        modality, to
            Modality to start from, and modality in which to search.
        features
            Names of the features to start from; None for all.
        n_neighbors
            Number of neighbours of each feature.

        Returns
        -------
        pandas.DataFrame
            One row per pair, nearest first: the two features (columns named after the modalities), ``score``, the
            cosine similarity of their embeddings, and ``linked``, whether the graph links them.
        """
        chosen = np.asarray(self.schema[modality].features, dtype=object)[self._features(modality, features)]
        others = np.asarray(self.schema[to].features, dtype=object)
        embeddings = self.get_feature_embeddings()
        embeddings = embeddings.div(np.linalg.norm(embeddings, axis=1), axis=0)
        cosine = embeddings.loc[modality].loc[chosen].to_numpy() @ embeddings.loc[to].to_numpy().T
        n = min(n_neighbors, len(others))
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :n]
        table = pd.DataFrame(
            {
                modality: np.repeat(chosen, n),
                to: others[nearest.ravel()],
                "score": np.take_along_axis(cosine, nearest, axis=1).ravel(),
            }
        )
        links = pd.MultiIndex.from_frame(self.graph.links(modality, to)[[modality, to]])
        return table.assign(linked=pd.MultiIndex.from_frame(table[[modality, to]]).isin(links))
