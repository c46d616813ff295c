"""Linked features: pairs of features of different modalities that carry information about each other.

A `GuidanceGraph` holds all links between all modalities, `Links` those between two of them. Functions that need links
accept either, or a table.
"""

from pyromosaic.links.graph import GuidanceGraph, links_of
from pyromosaic.links.pairs import Links, links_by_name, links_by_overlap, links_from_table

__all__ = ["GuidanceGraph", "Links", "links_by_name", "links_by_overlap", "links_from_table", "links_of"]
