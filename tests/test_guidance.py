import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from pyromosaic import DiagVI, ModalitySpec, Mosaic, linkage, pbmc_mosaic, protein_gene_links, simulate
from pyromosaic.guidance import GuidanceGraph, shared_scores

pytestmark = pytest.mark.filterwarnings("ignore:the guidance graph has few links")


def make(**features) -> Mosaic:
    """Four cells a modality, with the given features."""
    specs = {name: ModalitySpec("nb") for name in features}
    adatas = {
        name: anndata.AnnData(
            np.ones((4, len(names)), np.float32),
            obs=pd.DataFrame(index=[f"{name}{i}" for i in range(4)]),
            var=pd.DataFrame(index=list(names)),
        )
        for name, names in features.items()
    }
    return Mosaic.from_anndata(adatas, specs)


@pytest.fixture
def mosaic() -> Mosaic:
    return make(rna=["A", "B", "C", "D"], adt=["a", "B", "c"])


def edges(graph) -> set:
    """Edges as names with weight and sign, whatever the order of the two ends."""
    names = graph.names
    ends = [tuple(sorted((names[i], names[j]))) for i, j in graph.edges.T]
    return set(zip(ends, graph.weight.tolist(), graph.sign.tolist(), strict=True))


def test_equal_names_are_linked(mosaic):
    graph = GuidanceGraph.from_names(mosaic)
    assert edges(graph) == {(("B", "B"), 1.0, 1.0)}
    assert graph.linked() == {"rna": 1, "adt": 1}
    three = GuidanceGraph.from_names(make(x=["A", "B"], y=["A", "B"], z=["B", "C"]))
    assert len(edges(three)) == 2 and three.edges.shape[1] == 4, "A once, B in three pairs of modalities"


def test_a_table_links_one_or_several_features_on_a_side(mosaic):
    table = pd.DataFrame({"adt": ["a", ["B", "c"], None], "rna": [["A", "C"], "D", "B"], "weight": [0.5, 1, 1]})
    graph = GuidanceGraph.from_table(mosaic, table)
    assert edges(graph) == {
        (("A", "a"), 0.5, 1.0),
        (("C", "a"), 0.5, 1.0),
        (("B", "D"), 1.0, 1.0),
        (("D", "c"), 1.0, 1.0),
    }
    signed = table.assign(sign=[-1, 1, 1])
    assert {e for e in edges(GuidanceGraph.from_table(mosaic, signed)) if e[2] < 0} == {
        (("A", "a"), 0.5, -1.0),
        (("C", "a"), 0.5, -1.0),
    }
    links = GuidanceGraph.from_table(mosaic, signed).links("adt", "rna")
    assert links.query("adt == 'a'").to_dict("list") == {
        "adt": ["a", "a"],
        "rna": ["A", "C"],
        "weight": [0.5, 0.5],
        "sign": [-1.0, -1.0],
    }


def test_custom_weights_and_signs_within_and_between_modalities(mosaic):
    ends = [(("rna", "A"), ("adt", "a")), (("rna", "A"), ("rna", "B"))]
    graph = GuidanceGraph.from_edges(mosaic, ends, weight=[0.25, 1.0], sign=[-1, 1])
    assert edges(graph) == {(("A", "a"), 0.25, -1.0), (("A", "B"), 1.0, 1.0)}
    assert graph.linked() == {"rna": 1, "adt": 1}, "only edges between modalities link them"


def test_a_ready_graph_in_either_numbering(mosaic):
    data = pytest.importorskip("torch_geometric.data").Data
    ready = data(
        edge_index=torch.tensor([[0, 4, 0], [4, 0, 0]]),
        edge_weight=torch.tensor([0.5, 0.5, 1.0]),
        edge_sign=torch.tensor([-1.0, -1.0, 1.0]),
        num_nodes=7,
    )
    graph = GuidanceGraph.from_data(mosaic, ready)
    assert edges(graph) == {(("A", "a"), 0.5, -1.0)}, "both directions are one edge, self loops go without saying"
    own = data(
        edge_index=torch.tensor([[0], [3]]),
        rna_indices=torch.tensor([3, 4, 5, 6]),
        adt_indices=torch.tensor([0, 1, 2]),
        num_nodes=7,
    )
    assert edges(GuidanceGraph.from_data(mosaic, own)) == {(("A", "a"), 1.0, 1.0)}


def test_genomic_overlap():
    mosaic = make(rna=["G", "H"], atac=["chr1:100-200", "chr1:900-1000", "chr1:5000-5100", "chr2:100-200"])
    genes = pd.DataFrame(
        {"chromosome": "chr1", "start": [500, 2000], "end": [950, 4000], "strand": ["+", "-"]}, index=["G", "H"]
    )
    graph = GuidanceGraph.from_overlap(mosaic, ("rna", "atac"), genes, promoter=400)
    assert {e[0] for e in edges(graph)} == {("G", "chr1:100-200"), ("G", "chr1:900-1000")}
    graph = GuidanceGraph.from_overlap(mosaic, ("rna", "atac"), genes, promoter=1500)
    assert ("H", "chr1:5000-5100") in {tuple(sorted(e[0])) for e in edges(graph)}, "upstream of a gene on the - strand"


def test_a_matrix_of_links(mosaic):
    matrix = np.zeros((4, 3))
    matrix[0, 0], matrix[2, 2] = 0.5, -1
    assert edges(GuidanceGraph.from_matrix(mosaic, "rna", "adt", matrix)) == {
        (("A", "a"), 1.0, 1.0),
        (("C", "c"), 1.0, -1.0),
    }
    weighted = GuidanceGraph.from_matrix(mosaic, "rna", "adt", matrix, weighted=True)
    assert (("A", "a"), 0.5, 1.0) in edges(weighted)
    transposed = GuidanceGraph.from_matrix(mosaic, "adt", "rna", matrix.T, weighted=True)
    assert edges(transposed) == edges(weighted)


def test_graphs_are_merged_and_come_back_from_json(mosaic):
    names = GuidanceGraph.from_names(mosaic)
    other = GuidanceGraph.from_edges(mosaic, [(("rna", "A"), ("adt", "a"))], weight=0.5, sign=-1)
    both = names.merge(other)
    assert edges(both) == edges(names) | edges(other)
    assert edges(GuidanceGraph.of(both.to_json(), mosaic.schema)) == edges(both)


def test_bad_graphs_are_refused_in_one_sentence(mosaic):
    data = pytest.importorskip("torch_geometric.data").Data
    link = [(("rna", "A"), ("adt", "a"))]
    cases = [
        (lambda: GuidanceGraph.from_names(make(x=["A"], y=["B"])), "'x', 'y' have no feature names in common"),
        (lambda: GuidanceGraph.from_names(make(x=["A"])), "at least 2 modalities; found 'x'"),
        (
            lambda: GuidanceGraph.from_table(mosaic, pd.DataFrame({"rna": ["A", "X"], "adt": ["a", "a"]})),
            "1 features of the links are not in the data: 'X' \\(rna\\)",
        ),
        (
            lambda: GuidanceGraph.from_table(mosaic, pd.DataFrame({"gene": ["A"], "adt": ["a"]})),
            "a column for each of at least 2 modalities, out of 'rna', 'adt'; found the columns 'gene', 'adt'",
        ),
        (lambda: GuidanceGraph.from_edges(mosaic, link, weight=1.5), "above 0 and at most 1; found 1.5"),
        (lambda: GuidanceGraph.from_edges(mosaic, link, weight=0.0), "above 0 and at most 1; found 0"),
        (lambda: GuidanceGraph.from_edges(mosaic, link, weight=np.nan), "above 0 and at most 1; found nan"),
        (lambda: GuidanceGraph.from_edges(mosaic, link, sign=0), "must be 1 or -1; found 0"),
        (lambda: GuidanceGraph.from_edges(mosaic, link * 2, sign=[1, -1]), "'A' and 'a' has both signs"),
        (
            lambda: GuidanceGraph.from_edges(mosaic, [(("rna", "A"), ("rna", "B"))]),
            "no edge links modality 'adt' to 'rna'",
        ),
        (
            lambda: GuidanceGraph.from_data(mosaic, data(edge_index=torch.tensor([[0], [7]]), num_nodes=8)),
            "the graph has 8 nodes, but the data have 7 features",
        ),
        (
            lambda: GuidanceGraph.from_data(mosaic, data(edge_index=torch.tensor([[0], [7]]), num_nodes=7)),
            "integers from 0 to 6, one per feature; found 0 to 7",
        ),
        (
            lambda: GuidanceGraph.from_data(mosaic, data(edge_index=torch.tensor([[0], [-1]]), num_nodes=7)),
            "integers from 0 to 6, one per feature; found -1",
        ),
        (
            lambda: GuidanceGraph.from_data(
                mosaic,
                data(
                    edge_index=torch.tensor([[0], [4]]),
                    rna_indices=torch.arange(4),
                    adt_indices=torch.arange(3),
                    num_nodes=7,
                ),
            ),
            "do not match its nodes",
        ),
        (lambda: GuidanceGraph.from_data(mosaic, data(num_nodes=7)), "found none"),
        (lambda: GuidanceGraph.from_matrix(mosaic, "rna", "adt", np.ones((3, 4))), "accepted: 4 features of 'rna' × 3"),
        (lambda: DiagVI(mosaic, [("A", "a")]), "graph must be a GuidanceGraph, .*; found a list"),
        (lambda: DiagVI(make(rna=["A"], adt=["A"]), GuidanceGraph.from_names(mosaic)), "made for other features"),
    ]
    for make_graph, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            make_graph()


def test_a_third_modality_may_be_linked_through_a_second():
    mosaic = make(x=["A", "B"], y=["A", "C"], z=["C", "D"])
    assert GuidanceGraph.from_names(mosaic).linked() == {"x": 1, "y": 2, "z": 1}


def test_a_thin_graph_is_warned_about_with_counts():
    names = [f"g{i}" for i in range(40)]
    mosaic = make(rna=names, adt=names[:30])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GuidanceGraph.from_names(mosaic)
    with pytest.warns(UserWarning, match="few links: it links 3 of 40 rna features, 3 of 30 adt features"):
        GuidanceGraph.from_table(mosaic, pd.DataFrame({"rna": names[:3], "adt": names[:3]}))


@pytest.mark.filterwarnings("ignore:.*links are left out")
@pytest.mark.filterwarnings("ignore:column .batch. has no value in common")
def test_shared_scores_do_not_see_pairs():
    """Shuffling the cells of one modality shuffles its scores, and nothing else."""
    table = protein_gene_links().rename(columns={"gene": "rna", "protein": "adt"})
    whole = pbmc_mosaic()
    adatas = {name: whole[name][:300] for name in ("rna", "adt")}
    order = np.random.default_rng(0).permutation(300)
    scores = []
    for adt in (adatas["adt"], adatas["adt"][order]):
        mosaic = Mosaic.from_anndata({"rna": adatas["rna"].copy(), "adt": adt.copy()}, batch_key="batch")
        graph = GuidanceGraph.from_table(mosaic, table, drop_absent=True)
        scores.append(shared_scores(mosaic, graph, 5))
    np.testing.assert_allclose(scores[0][:300], scores[1][:300], atol=1e-3)
    np.testing.assert_allclose(scores[0][300:][order], scores[1][300:], atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*links are left out")
@pytest.mark.filterwarnings("ignore:.*the right cells")
def test_features_that_never_vary_limit_the_number_of_scores():
    mdata, truth = simulate(80, {"rna": 30, "adt": 12}, patterns=["rna", "adt"], links={"adt": 1.0}, seed=0)
    adatas = {name: adata.copy() for name, adata in mdata.mod.items()}
    counts = adatas["rna"].X.toarray()
    counts[:, 4:] = 0
    adatas["rna"].X = counts + (np.arange(30) == 0)
    mosaic = Mosaic.from_anndata(adatas)
    ends = [(("rna", row.gene), ("adt", row.feature)) for row in truth.links.itertuples()]
    scores = shared_scores(mosaic, GuidanceGraph.from_edges(mosaic, ends), 10)
    assert scores.shape == (mosaic.n_cells, 4) and np.isfinite(scores).all()


def test_links_are_understood_in_every_form():
    data = pbmc_mosaic()
    mosaic = Mosaic.from_mudata(data)
    table = protein_gene_links().rename(columns={"gene": "rna", "protein": "adt"})
    links = linkage.links_from_table(mosaic, ("rna", "adt"), table)
    graph = GuidanceGraph.of(links, mosaic)
    assert graph.edges.tolist() == GuidanceGraph.from_table(mosaic, table, drop_absent=True).edges.tolist()
    found = [linkage.cca(mosaic, ("rna", "adt"), given, n_components=3) for given in (links, graph, table)]
    columns = ["rna", "adt", "weight", "sign"]
    used = [link.links.pairs[columns].sort_values(columns, ignore_index=True) for link in found]
    assert len(used[0]) == 74 and used[1].equals(used[0]) and used[2].equals(used[0])
    with pytest.raises(ValueError, match="no modality 'atac'"):
        linkage.cca(mosaic, ("rna", "atac"), graph)
