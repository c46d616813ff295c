"""Linked features: which feature of one modality says something about which feature of another.

A `GuidanceGraph` holds all links of all modalities, `Links` those of two of them. What takes links takes either, or a
table.
"""

from pyromosaic.links.graph import GuidanceGraph, links_of
from pyromosaic.links.pairs import Links, links_by_name, links_by_overlap, links_from_table

__all__ = ["GuidanceGraph", "Links", "links_by_name", "links_by_overlap", "links_from_table", "links_of"]
