"""Linkage of two modalities that were measured in different cells.

=========================  =============================================================================================
linked features            :func:`links_from_table`, :func:`links_by_name`, :func:`links_by_overlap`, all :class:`Links`
complete pipeline          :func:`cca`, a :class:`Linkage` with scores of all cells
matching by shape          :class:`ByShape`, :class:`Alternative`: how sure it is, and what else fits
as a Pyro program          :func:`variational_cca`, a :class:`VariationalLinkage` with uncertainty, linear or deep;
                           its :class:`VariationalCCAModel` and :class:`VariationalCCAGuide`
its parts                  :class:`Correspondence`, :func:`canonical_correlation`, :func:`shuffled_covariances`,
                           :func:`count_components`, :func:`crossfit_correlations`
ways to match              :func:`transport`, :func:`mutual_nearest`, :func:`assignment`, :func:`gromov_wasserstein`,
                           :func:`diagonal`
links from correlations    :meth:`Linkage.feature_links`, :func:`link_recovery`
=========================  =============================================================================================
"""

from pyromosaic.linkage.alignment import Linkage, cca, link_recovery
from pyromosaic.linkage.canonical import (
    Canonical,
    canonical_correlation,
    count_components,
    crossfit_correlations,
    shuffled_covariances,
)
from pyromosaic.linkage.certainty import Alternative, ByShape
from pyromosaic.linkage.matching import (
    Correspondence,
    assignment,
    diagonal,
    gromov_wasserstein,
    mutual_nearest,
    transport,
)
from pyromosaic.linkage.variational import (
    VariationalCCAGuide,
    VariationalCCAModel,
    VariationalLinkage,
    variational_cca,
)
from pyromosaic.links import Links as Links  # documented there
from pyromosaic.links import links_by_name as links_by_name
from pyromosaic.links import links_by_overlap as links_by_overlap
from pyromosaic.links import links_from_table as links_from_table

__all__ = [
    "Alternative",
    "ByShape",
    "Canonical",
    "Correspondence",
    "Linkage",
    "VariationalCCAGuide",
    "VariationalCCAModel",
    "VariationalLinkage",
    "assignment",
    "canonical_correlation",
    "cca",
    "count_components",
    "crossfit_correlations",
    "diagonal",
    "gromov_wasserstein",
    "link_recovery",
    "mutual_nearest",
    "shuffled_covariances",
    "transport",
    "variational_cca",
]
