"""Files of Cell Ranger, AnnData and MuData are read as they were written, and as scanpy and muon read them."""

import gzip
import os
import warnings

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse
from small import warned

import pyromosaic
from pyromosaic import Mosaic, read
from pyromosaic.data.tables import kept_apart

RNG = np.random.default_rng(0)
KINDS = np.repeat(["Gene Expression", "Antibody Capture", "Peaks", "CRISPR Guide Capture"], [30, 6, 12, 2])
NAMES = np.array(
    [*(f"gene{i}" for i in range(26)), "CD4", "TBCE", "TBCE", "nan"]
    + ["CD4", "CD8A", "IgD", "CD14", "CD3", "CD19"]
    + [f"chr1:{1000 * i}-{1000 * i + 500}" for i in range(12)]
    + ["guide1", "guide2"]
)
IDS = np.array([f"ID{i:05}" for i in range(50)])
GENOME = np.where(np.isin(KINDS, ["Gene Expression", "Peaks"]), "GRCh38", "")
BARCODES = np.array(["".join(letters) + "-1" for letters in RNG.choice(list("ACGT"), (20, 16))])
COUNTS = RNG.poisson(2.0, (20, 50)) * (RNG.random((20, 50)) < 0.7)
MODALITIES = {"rna": "Gene Expression", "adt": "Antibody Capture", "atac": "Peaks", "crispr": "CRISPR Guide Capture"}
UNIQUE = {"rna": [*NAMES[:28], "TBCE-1", "nan"]}


def write_v3(path, counts=COUNTS, cells=BARCODES, genome=GENOME, keep=slice(None), **replaced):
    """What Cell Ranger 3 and later write."""
    x = sparse.csr_matrix(counts[:, keep])
    with h5py.File(path, "w") as file:
        file.attrs["filetype"], file.attrs["version"] = "matrix", 2
        group = file.create_group("matrix")
        whole = {"barcodes": cells.astype("S30"), "data": x.data.astype("i4"), "indices": x.indices.astype("i8")}
        whole |= {"indptr": x.indptr.astype("i8"), "shape": np.array(x.shape[::-1], "i4")}
        whole |= {f"features/{name}": values[keep].astype("S") for name, values in features(genome).items()}
        whole["features/_all_tag_keys"] = np.array(["genome"], "S")
        for name, values in (whole | replaced).items():
            if values is not None:
                compression = {} if name == "shape" else {"compression": "gzip", "chunks": True, "maxshape": (None,)}
                group.create_dataset(name, data=values, **compression)
    return path


def features(genome):
    return {"id": IDS, "name": NAMES, "feature_type": KINDS, "genome": genome}


def write_v2(path, genomes):
    """What Cell Ranger 2 wrote: a group for each genome."""
    with h5py.File(path, "w") as file:
        for name, (counts, barcodes, genes) in genomes.items():
            x, group = sparse.csr_matrix(counts), file.create_group(name)
            group["barcodes"], group["shape"] = barcodes.astype("S18"), np.array(x.shape[::-1], "i4")
            group["data"], group["indices"], group["indptr"] = x.data.astype("i4"), x.indices.astype("i8"), x.indptr
            group["gene_names"], group["genes"] = NAMES[genes].astype("S"), IDS[genes].astype("S")
    return path


def write_folder(folder, prefix="", compressed=True, table="features.tsv", keep=slice(None), columns=3, counts=COUNTS):
    """A folder of Cell Ranger, STARsolo, and of series in GEO."""
    folder.mkdir(exist_ok=True, parents=True)
    rows = zip(IDS[keep], NAMES[keep], KINDS[keep], strict=True)
    lines = ["\t".join(row[:columns]) for row in rows]
    if table == "peaks.bed":
        lines = [name.replace(":", "\t").replace("-", "\t") for name in NAMES[keep]]
    io.mmwrite(folder / "m.mtx", sparse.csr_matrix(counts[:, keep]).T)
    matrix = (folder / "m.mtx").read_bytes()
    (folder / "m.mtx").unlink()
    texts = {table: "\n".join(lines).encode() + b"\n", "barcodes.tsv": "\n".join(BARCODES).encode() + b"\n"}
    for name, text in (texts | {"matrix.mtx": matrix}).items():
        if compressed:
            with gzip.open(folder / f"{prefix}{name}.gz", "wb") as file:
                file.write(text)
        else:
            (folder / f"{prefix}{name}").write_bytes(text)
    return folder


def one_anndata():
    var = pd.DataFrame({"gene_ids": IDS, "feature_types": KINDS}, index=NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return anndata.AnnData(sparse.csr_matrix(COUNTS.astype("f4")), pd.DataFrame(index=BARCODES), var)


def one_mudata():
    with kept_apart(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = one_anndata()
        parts = {name: whole[:, KINDS == kind].copy() for name, kind in MODALITIES.items()}
        parts["rna"].var_names = UNIQUE["rna"]
        parts["adt"] = parts["adt"][:15].copy()
        mdata = mudata.MuData(parts)
    mdata.obs["donor"] = np.resize(["d1", "d2"], mdata.n_obs)
    return mdata


def check(mdata, names=MODALITIES, n_cells=20):
    """All counts, names and tables as they were written."""
    assert list(mdata.mod) == list(names)
    for name in names:
        adata, own = mdata[name], KINDS == MODALITIES[name]
        assert adata.obs_names.name is None and adata.var_names.name is None
        assert not adata.is_view and adata.X.format == "csr" and adata.X.dtype == np.float32
        np.testing.assert_array_equal(adata.X.toarray(), COUNTS[:n_cells, own])
        assert list(adata.obs_names) == list(BARCODES[:n_cells])
        assert list(adata.var_names) == list(UNIQUE.get(name, NAMES[own]))
        assert list(adata.var["gene_ids"]) == list(IDS[own])


# Layouts


@pytest.mark.parametrize("ending", ["h5", "whatever"])
def test_cell_ranger_3(tmp_path, ending):
    mdata = read(write_v3(tmp_path / f"filtered_feature_bc_matrix.{ending}"))
    check(mdata)
    assert set(mdata["rna"].var["genome"]) == {"GRCh38"} and "sample" not in mdata["rna"].obs
    specs = {"rna": "nb", "adt": "nb_mixture", "atac": "bernoulli"}
    assert list(Mosaic.from_mudata(mdata, specs).modalities) == list(specs)
    only = read(write_v3(tmp_path / "one.h5", keep=KINDS == "Peaks"))
    check(only, ["atac"])


def test_extra_columns_of_features_are_kept(tmp_path):
    more = {"features/pattern": np.where(KINDS == "Antibody Capture", "5PNNNNNNNNNN(BC)", "").astype("S")}
    mdata = read(write_v3(tmp_path / "a.h5", **more))
    assert set(mdata["adt"].var["pattern"]) == {"5PNNNNNNNNNN(BC)"}


def test_cell_ranger_2(tmp_path):
    genes = np.arange(30)
    mdata = read(write_v2(tmp_path / "a.h5", {"GRCh38": (COUNTS[:, :30], BARCODES, genes)}))
    check(mdata, ["rna"])
    assert set(mdata["rna"].var["genome"]) == {"GRCh38"}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("prefix", ["", "GSM123_donor1_"])
def test_folders(tmp_path, compressed, prefix):
    folder = write_folder(tmp_path / "a", prefix, compressed)
    check(read(folder))
    check(read(str(folder / f"{prefix}matrix.mtx{'.gz' * compressed}")))
    old = write_folder(tmp_path / "b", prefix, compressed, "genes.tsv", slice(30), 2)
    check(read(old), ["rna"])
    regions = write_folder(tmp_path / "c", prefix, compressed, "peaks.bed", KINDS == "Peaks")
    mdata = read(regions)
    assert list(mdata.mod) == ["atac"] and list(mdata["atac"].var_names) == list(NAMES[KINDS == "Peaks"])
    np.testing.assert_array_equal(mdata["atac"].X.toarray(), COUNTS[:, KINDS == "Peaks"])


def test_a_matrix_that_lies_there_twice_is_read_once(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "a")
    write_folder(folder, compressed=False, counts=COUNTS + 1)
    calls = []
    monkeypatch.setattr(io, "mmread", lambda path, read=io.mmread: calls.append(path) or read(path))
    check(read(folder))  # the compressed one, which Cell Ranger wrote
    assert len(calls) == 1


def test_output_folder_of_cell_ranger(tmp_path):
    write_v3(tmp_path / "raw_feature_bc_matrix.h5", COUNTS + 1)
    write_folder(tmp_path / "filtered_feature_bc_matrix", counts=COUNTS + 2)
    write_v3(tmp_path / "filtered_feature_bc_matrix.h5")
    check(read(tmp_path))
    old = tmp_path / "old"
    write_folder(old / "filtered_gene_bc_matrices" / "hg19", "", False, "genes.tsv", slice(30), 2)
    for folder in (old, old / "filtered_gene_bc_matrices"):
        mdata = read(folder)
        check(mdata, ["rna"])
        assert set(mdata["rna"].var["genome"]) == {"hg19"}


@pytest.mark.parametrize("store", ["h5", "zarr"])
def test_anndata_and_mudata(tmp_path, store):
    single, several = one_anndata(), one_mudata()
    with warnings.catch_warnings(), kept_apart():
        warnings.simplefilter("ignore")
        if store == "h5":
            single.write_h5ad(tmp_path / "single")
            several.write(tmp_path / "several.h5mu")
            (tmp_path / "several.h5mu").rename(tmp_path / "several")
        else:
            single.write_zarr(tmp_path / "single")
            several.write_zarr(tmp_path / "several")
    check(read(tmp_path / "single"))
    mdata = read(tmp_path / "several")
    assert list(mdata.mod) == list(MODALITIES) and mdata["adt"].n_obs == 15
    assert list(mdata["rna"].var_names) == UNIQUE["rna"] and list(mdata.obs["donor"]) == list(several.obs["donor"])
    for name in MODALITIES:
        np.testing.assert_array_equal(mdata[name].X.toarray(), several[name].X.toarray())


def test_repeated_names_of_features_in_a_mudata(tmp_path):
    mdata = one_mudata()
    with warnings.catch_warnings(), kept_apart():
        warnings.simplefilter("ignore")
        mdata["rna"].var_names = NAMES[:30]
        mdata.update()
        mdata.write(tmp_path / "a.h5mu")
    found = read(tmp_path / "a.h5mu")
    assert list(found["rna"].var_names) == UNIQUE["rna"] and list(found.obs["donor"]) == list(mdata.obs["donor"])


def test_data_that_do_not_say_their_features(tmp_path):
    adata = one_anndata()[:, :26].copy()
    del adata.var["feature_types"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    plain = write_folder(tmp_path / "b", keep=slice(26), columns=1)  # as CITE-seq-Count writes
    for path in (tmp_path / "a.h5ad", plain):
        with pytest.raises(
            ValueError, match="does not say what its features are; pass .* modality='rna' .*--as rna.*, or"
        ):
            read(path)
        mdata = read(path, modality="prot")
        assert list(mdata.mod) == ["prot"] and np.array_equal(mdata["prot"].X.toarray(), COUNTS[:, :26])
    assert list(mdata["prot"].var_names) == list(IDS[:26])
    write_v3(tmp_path / "c.h5")
    with pytest.raises(ValueError, match=r"says what its features are \(rna, adt, atac, crispr\); leave out modality"):
        read(tmp_path / "c.h5", modality="rna")


# Genomes, cells, droplets


def test_several_genomes(tmp_path):
    genome = np.where(np.arange(50) < 10, "mm10", GENOME)
    path = write_v3(tmp_path / "a.h5", genome=genome)
    check(read(path))
    human = read(path, genome="GRCh38")
    assert {name: adata.n_vars for name, adata in human.mod.items()} == {"rna": 20, "adt": 6, "atac": 12, "crispr": 2}
    assert list(read(path, genome="mm10").mod) == ["rna", "adt", "crispr"]
    with pytest.raises(ValueError, match="has no genome 'hg19'; it has GRCh38, mm10"):
        read(path, genome="hg19")

    halves = {
        "hg19": (COUNTS[:, :20], BARCODES, np.arange(20)),
        "mm10": (COUNTS[:, 20:30], BARCODES, np.arange(20, 30)),
    }
    old = write_v2(tmp_path / "b.h5", halves)
    check(read(old), ["rna"])
    assert read(old, genome="hg19")["rna"].shape == (20, 20)
    halves["hg19"] = (COUNTS[5:, :20], BARCODES[5:], np.arange(20))
    old = write_v2(tmp_path / "c.h5", halves)
    with pytest.raises(ValueError, match="has other cells for each genome; pass one as genome: hg19, mm10"):
        read(old)
    assert read(old, genome="hg19")["rna"].shape == (15, 20)
    with pytest.raises(ValueError, match="no genome 'GRCh38'; it has hg19, mm10"):
        read(old, genome="GRCh38")


@pytest.mark.parametrize("layout", ["h5", "folders"])
def test_genomes_of_cell_ranger_2_keep_order_and_unique_names(tmp_path, layout):
    """Genes of the second genome come after those of the first; a symbol that both have gets an ending there."""
    genes = {"hg19": np.r_[20:30], "mm10": np.r_[5, 28:19:-1]}
    if layout == "h5":
        path = write_v2(tmp_path / "a.h5", {name: (COUNTS[:, own], BARCODES, own) for name, own in genes.items()})
    else:
        path = tmp_path / "filtered_gene_bc_matrices"
        for name, own in genes.items():
            write_folder(path / name, "", False, "genes.tsv", own, 2)
    found = read(path)["rna"]
    own = np.r_[genes["hg19"], genes["mm10"]]
    np.testing.assert_array_equal(found.X.toarray(), COUNTS[:, own])
    assert found.X.format == "csr" and found.X.dtype == np.float32
    assert list(found.var["gene_ids"]) == list(IDS[own]) and list(found.obs_names) == list(BARCODES)
    assert list(found.var["genome"]) == ["hg19"] * 10 + ["mm10"] * 10
    assert list(found.var["feature_types"]) == ["Gene Expression"] * 20
    first, twice = [f"gene{i}" for i in range(20, 26)], [f"gene{i}-1" for i in range(25, 19, -1)]
    second = ["gene5", "TBCE-2", "TBCE-3", "CD4-1", *twice]
    assert list(found.var_names) == [*first, "CD4", "TBCE", "TBCE-1", "nan", *second]
    for name in genes:
        one = read(path, genome=name)["rna"]
        np.testing.assert_array_equal(one.X.toarray(), COUNTS[:, genes[name]])
        assert list(one.var["gene_ids"]) == list(IDS[genes[name]])


SAMPLES = {
    "wells": (lambda i, code: f"{code}-{1 + i % 2}", ["1", "2"]),
    "prefixes": (lambda i, code: f"s{i % 2}_{code}-1", ["s0", "s1"]),
    "endings": (lambda i, code: f"{code}-1_{'xy'[i % 2]}", ["1_x", "1_y"]),
    "both": (lambda i, code: f"s{i % 2}#{code}-{i % 2}", ["s0_0", "s1_1"]),
    "none": (lambda i, code: code, None),
    "no barcode": (lambda i, code: f"cell_{i}", None),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_in_the_names_of_cells(tmp_path, kind):
    name, samples = SAMPLES[kind]
    barcodes = np.array([name(i, code.removesuffix("-1")) for i, code in enumerate(BARCODES)])
    mdata = read(write_v3(tmp_path / "a.h5", cells=barcodes))
    assert list(mdata.obs_names) == list(barcodes)
    for adata in mdata.mod.values():
        assert ("sample" in adata.obs) == (samples is not None)
        if samples is not None:
            assert list(adata.obs["sample"]) == list(np.resize(samples, 20))
    if samples is not None:
        specs = {"rna": "nb", "adt": "nb_mixture"}
        assert list(Mosaic.from_mudata(mdata, specs, batch_key="sample").schema["rna"].categories["sample"]) == samples


BESIDE = {
    "the suffix of a well": lambda names: names + "-1",
    "a prefix": lambda names: "donor1_" + names,
    "another ending": lambda names: names + "-1_2",
}


@pytest.mark.parametrize("kind", BESIDE)
def test_the_same_barcodes_under_other_names_are_said(kind):
    plain = pd.Index(BARCODES).str.removesuffix("-1")
    mdata = read_pair(plain, BESIDE[kind](plain))
    adatas = dict(mdata.mod)
    for register in (
        lambda: Mosaic.from_mudata(mdata, {"rna": "nb", "adt": "nb_mixture"}),
        lambda: Mosaic.from_anndata(adatas, {"rna": "nb", "adt": "nb_mixture"}, match_cells=True),
    ):
        (said,) = warned(register)[1]
        assert "modalities 'rna' and 'adt' have no cell in common by name, but 20 by barcode, e.g. " in said
        assert plain[0] in said
    assert warned(lambda: Mosaic.from_anndata(adatas, {"rna": "nb", "adt": "nb_mixture"}))[1] == []
    other = pd.Index(["".join(letters) for letters in np.random.default_rng(9).choice(list("ACGT"), (20, 16))])
    for names in (plain, other, plain + ":adt"):
        first = plain + ":rna" if names is not plain and names[0].endswith("adt") else plain
        apart = read_pair(first, names)
        assert warned(lambda apart=apart: Mosaic.from_mudata(apart, {"rna": "nb", "adt": "nb_mixture"}))[1] == []


def read_pair(first, second):
    """RNA and antibodies of cells with these names."""
    x = 1 + RNG.poisson(3, (20, 12)).astype("f4")
    parts = {"rna": (x, first, "g"), "adt": (x[:, :6], second, "p")}
    with kept_apart():
        return mudata.MuData(
            {
                name: anndata.AnnData(
                    x, pd.DataFrame(index=cells), pd.DataFrame(index=[f"{of}{i}" for i in range(x.shape[1])])
                )
                for name, (x, cells, of) in parts.items()
            }
        )


@pytest.mark.parametrize("layout", ["h5", "folder"])
def test_raw_matrices_are_said_to_be_raw(tmp_path, layout):
    empty = np.where(np.arange(20)[:, None] < 15, np.arange(50) == 0, COUNTS)

    def write(name, counts):
        if layout == "h5":
            return write_v3(tmp_path / f"{name}.h5", counts)
        return write_folder(tmp_path / name, counts=counts)

    mdata, (said,) = warned(lambda: read(write("a", empty)))
    assert "looks like a raw matrix: 15 of its 20 barcodes have fewer than 10 counts" in said
    assert mdata.n_obs == 20  # all are read
    (said,) = warned(lambda: read(write("sample_raw_feature_bc_matrix", COUNTS)))[1]
    assert "looks like a raw matrix: 0 of its 20" in said
    (tmp_path / "raw_data").mkdir()
    write_v3(tmp_path / "raw_data" / "cells.h5")
    assert warned(lambda: read(tmp_path / "raw_data" / "cells.h5"))[1] == []


def test_nothing_is_held_twice(tmp_path):
    """A modality holds its own features, not those of the file, and the file is closed."""
    mdata = read(write_v3(tmp_path / "a.h5"))
    for name, adata in mdata.mod.items():
        assert adata.X.nnz == len(adata.X.data) == np.count_nonzero(COUNTS[:, KINDS == MODALITIES[name]])
        assert adata.X.data.base is None or adata.X.data.base.nbytes == adata.X.data.nbytes
        assert adata.X.indices.dtype == np.int32
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["matrix"]
    assert mdata["rna"].X.sum() == COUNTS[:, :30].sum()


# Damaged and wrong files

WRONG = {
    "nothing": (lambda p: p, "there is no file"),
    "text": (
        lambda p: p.write_text("gene,cell\n") and p,
        "cannot be read; accepted: a .h5 file of Cell Ranger, a folder",
    ),
    "an empty folder": (lambda p: p.mkdir() or p, "has no matrix.mtx, and none of a zarr store; accepted"),
    "fewer features": (
        lambda p: write_v3(p, **{"shape": np.array([49, 20])}),
        "the matrix has 49 × 20 entries, and there are 50 features and 20 barcodes; accepted: features × barcodes$",
    ),
    "the other way round": (lambda p: write_v3(p, **{"shape": np.array([20, 50])}), "it is the other way round$"),
    "no barcodes": (lambda p: write_v3(p, barcodes=None), "/matrix has no 'barcodes'; it is not"),
    "no features": (
        lambda p: write_v3(p, **{f"features/{name}": None for name in (*features(GENOME), "_all_tag_keys")}),
        "matrix has no features; it is not a whole file",
    ),
    "an index out of range": (
        lambda p: write_v3(p, indices=np.full(np.count_nonzero(COUNTS), 50)),
        r"the matrix cannot be read \(a sparse matrix is damaged: its indices run from 50 to 50",
    ),
    "too few counts": (lambda p: write_v3(p, data=np.ones(3, "i4")), r"the matrix cannot be read \("),
    "rows out of order": (
        lambda p: write_v3(p, indptr=np.r_[0, 5, 3, np.full(18, np.count_nonzero(COUNTS))]),
        r"the matrix cannot be read \(a sparse matrix is damaged",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_get_a_sentence(tmp_path, kind):
    make, said = WRONG[kind]
    path = tmp_path / "file"
    replaced = make(path)
    with pytest.raises(ValueError, match=said) as caught:
        read(replaced)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_something_else(tmp_path):
    with h5py.File(tmp_path / "molecule_info.h5", "w") as file:
        file["barcode_idx"], file["count"] = np.arange(3), np.arange(3)
    with pytest.raises(ValueError, match="molecule_info.h5 holds barcode_idx, count, no counts; accepted"):
        read(tmp_path / "molecule_info.h5")


@pytest.mark.parametrize("member", ["data", "indices", "barcodes", "features/name"])
def test_an_unreadable_member_of_an_h5(tmp_path, member):
    path = write_v3(tmp_path / "a.h5")
    with h5py.File(path) as file:
        chunk = file[f"matrix/{member}"].id.get_chunk_info(0)
    with open(path, "r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)
    with pytest.raises(ValueError, match=rf"a.h5: /matrix/?.*{member.split('/')[-1]} cannot be read \("):
        read(path)


@pytest.mark.parametrize("kind", ["h5", "h5ad", "h5mu"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_files_that_are_cut_off(tmp_path, kind, share):
    path = tmp_path / f"a.{kind}"
    with warnings.catch_warnings(), kept_apart():
        warnings.simplefilter("ignore")
        {"h5": write_v3, "h5ad": one_anndata().write_h5ad, "h5mu": one_mudata().write}[kind](path)
    n = path.stat().st_size
    os.truncate(path, left := int(share * n))
    with pytest.raises(ValueError, match=rf"a.{kind}: it cannot be read \(only {left:,} of its {n:,} bytes are left\)"):
        read(path)


@pytest.mark.parametrize("member", ["matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"])
def test_an_unreadable_or_missing_member_of_a_folder(tmp_path, member):
    folder = write_folder(tmp_path / "a")
    content = (folder / member).read_bytes()
    (folder / member).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{member}: it cannot be read \\("):
        read(folder)
    (folder / member).unlink()
    with pytest.raises(ValueError, match="no matrix.mtx|no features.tsv or genes.tsv or peaks.bed|no barcodes.tsv"):
        read(folder)


def test_a_matrix_that_fits_neither_barcodes_nor_features(tmp_path):
    folder = write_folder(tmp_path / "a", compressed=False)
    lines = (folder / "barcodes.tsv").read_text().splitlines()
    (folder / "barcodes.tsv").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="the matrix has 50 × 20 entries, and there are 50 features and 19 barcodes"):
        read(folder)
    (folder / "barcodes.tsv").write_text("\n".join([*lines[:-1], lines[0]]))
    with pytest.raises(ValueError, match=f"the cell '{BARCODES[0]}' occurs more than once in modality 'rna'"):
        read(folder)


def test_several_samples_in_one_folder(tmp_path):
    write_folder(tmp_path / "a", "GSM1_")
    write_folder(tmp_path / "a", "GSM2_", counts=COUNTS + 1)
    with pytest.raises(ValueError, match="holds 2 matrices; pass the path of one, e.g. .*GSM1_matrix.mtx.gz"):
        read(tmp_path / "a")
    check(read(tmp_path / "a" / "GSM1_matrix.mtx.gz"))


@pytest.mark.parametrize("suffix", ["h5ad", "h5mu"])
def test_damaged_files_of_other_packages(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with warnings.catch_warnings(), kept_apart():
        warnings.simplefilter("ignore")
        one_anndata().write_h5ad(path) if suffix == "h5ad" else one_mudata().write(path)
    group = "" if suffix == "h5ad" else "mod/rna/"
    with h5py.File(path, "a") as file:
        del file[f"{group}X/indices"]
    with pytest.raises(ValueError, match=rf"a.{suffix}: it cannot be read \("):
        read(path)
    with pytest.raises(ValueError, match="MuData, which says" if suffix == "h5mu" else "cannot be read"):
        with warnings.catch_warnings(), kept_apart():
            warnings.simplefilter("ignore")
            if suffix == "h5mu":
                one_mudata().write(path)
        read(path, modality="rna")


# On the command line


@pytest.mark.parametrize("layout", ["h5", "folder", "h5ad"])
def test_commands_take_files_of_instruments(tmp_path, layout, monkeypatch):
    from typer.testing import CliRunner

    from pyromosaic.cli import app

    keep = np.isin(KINDS, ["Gene Expression", "Antibody Capture", "Peaks"])
    if layout == "h5":
        path = write_v3(tmp_path / "filtered_feature_bc_matrix.h5", keep=keep)
    elif layout == "folder":
        path = write_folder(tmp_path / "filtered_feature_bc_matrix", keep=keep)
    else:
        path = tmp_path / "a.h5ad"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one_anndata()[:, keep].write_h5ad(path)
    said = CliRunner().invoke(app, ["check", str(path)])
    assert said.exit_code == 0, said.output
    for line in ("rna: 20 cells × 30 features, nb", "adt: 20 cells × 6 features", "atac: 20 cells × 12 features"):
        assert line in said.output
    out = tmp_path / "result.h5mu"
    said = CliRunner().invoke(app, ["integrate", str(path), "--out", str(out), "--epochs", "1"])
    assert said.exit_code == 0, said.output
    assert {"rna", "adt", "atac", "rna_imputed"} <= set(read(out).mod)
    (tmp_path / "empty").mkdir()
    wrong = CliRunner().invoke(app, ["check", str(tmp_path / "empty")])
    assert wrong.exit_code == 2 and "has no matrix.mtx" in wrong.output


# Beside scanpy and muon


def same(ours, theirs, names=None):
    x = theirs.X.toarray() if sparse.issparse(theirs.X) else theirs.X
    np.testing.assert_array_equal(ours.X.toarray(), x)
    assert list(ours.obs_names) == list(theirs.obs_names)
    assert list(ours.var_names) == [str(n) for n in (theirs.var_names if names is None else names)]
    for column in set(ours.var) & set(theirs.var):
        assert list(ours.var[column].astype(str)) == list(theirs.var[column].astype(str))


@pytest.mark.filterwarnings("ignore")
def test_scanpy_and_muon_read_the_same(tmp_path):
    scanpy, muon = (pytest.importorskip(name, exc_type=ImportError) for name in ("scanpy", "muon"))
    theirs_of = {"rna": "rna", "adt": "prot", "atac": "atac", "crispr": "CRISPR Guide Capture"}
    h5, folder = write_v3(tmp_path / "a.h5"), write_folder(tmp_path / "folder")
    old = write_folder(tmp_path / "old", "", False, "genes.tsv", slice(29), 2)
    of_h5, of_folder = muon.read_10x_h5(h5, extended=False), muon.read_10x_mtx(folder, extended=False)
    for name, other in theirs_of.items():
        of_h5[other].var_names_make_unique()
        same(read(h5)[name], of_h5[other])
        # scanpy makes names unique over all types, and takes a gene called nan for a missing value
        same(read(folder)[name], of_folder[other], read(folder)[name].var_names)
    genes = scanpy.read_10x_h5(h5)
    genes.var_names_make_unique()
    same(read(h5)["rna"], genes)
    same(read(old)["rna"], scanpy.read_10x_mtx(old))
    v2 = write_v2(tmp_path / "v2.h5", {"hg19": (COUNTS[:, :30], BARCODES, np.arange(30))})
    genes = scanpy.read_10x_h5(v2)
    genes.var_names_make_unique()
    same(read(v2)["rna"], genes)
    halves = {"hg19": np.r_[:20], "mm10": np.r_[20:30]}
    v2 = write_v2(tmp_path / "both.h5", {name: (COUNTS[:, own], BARCODES, own) for name, own in halves.items()})
    for name, own in halves.items():
        write_folder(tmp_path / "both" / name, "", False, "genes.tsv", own, 2)
        for path in (v2, tmp_path / "both"):
            genes = scanpy.read_10x_h5(v2, genome=name) if path == v2 else scanpy.read_10x_mtx(path / name)
            genes.var_names_make_unique()
            same(read(path, genome=name)["rna"], genes)
            np.testing.assert_array_equal(read(path)["rna"][:, own].X.toarray(), genes.X.toarray())
    v3 = write_v3(tmp_path / "mixed.h5", genome=np.where(np.arange(50) < 10, "mm10", GENOME))
    for name in ("GRCh38", "mm10"):
        genes = scanpy.read_10x_h5(v3, genome=name)
        genes.var_names_make_unique()
        same(read(v3, genome=name)["rna"], genes, read(v3, genome=name)["rna"].var_names if name == "mm10" else None)
    series = write_folder(tmp_path / "series", "GSM1_")
    genes = scanpy.read_10x_mtx(series, prefix="GSM1_")
    same(read(series)["rna"], genes, read(series)["rna"].var_names)
    one_mudata().write(tmp_path / "a.h5mu")
    one_mudata().write_zarr(tmp_path / "a.zarr")
    for path, whole in (
        ("a.h5mu", muon.read(str(tmp_path / "a.h5mu"))),
        ("a.zarr", muon.read_zarr(tmp_path / "a.zarr")),
    ):
        assert list(read(tmp_path / path).obs_names) == list(whole.obs_names)
        for name in MODALITIES:
            same(read(tmp_path / path)[name], whole[name])
    one_anndata().write_zarr(tmp_path / "one.zarr")
    split = anndata.read_zarr(tmp_path / "one.zarr")
    for name, kind in MODALITIES.items():
        same(read(tmp_path / "one.zarr")[name], split[:, KINDS == kind], read(tmp_path / "one.zarr")[name].var_names)
    one_anndata().write_h5ad(tmp_path / "a.h5ad")
    split = mudata.MuData(anndata.read_h5ad(tmp_path / "a.h5ad"))
    for name, other in theirs_of.items():
        split[other].var_names_make_unique()
        same(read(tmp_path / "a.h5ad")[name], split[other])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", [2, 3])
def test_what_cellbender_writes(tmp_path, version):
    written_by = pytest.importorskip("cellbender.remove_background.data.io", exc_type=ImportError)
    keep = np.arange(50) < 30 if version == 2 else np.arange(50) >= 0
    of = {"feature_types": KINDS[keep], "genomes": GENOME[keep]} if version == 3 else {}
    matrix = sparse.csc_matrix(COUNTS[:, keep])
    written_by.write_matrix_to_cellranger_h5(
        version, str(tmp_path / "a.h5"), NAMES[keep], BARCODES, matrix, gene_ids=IDS[keep], **of
    )
    check(read(tmp_path / "a.h5"), ["rna"] if version == 2 else MODALITIES)


def test_read_is_a_name_of_the_package():
    assert pyromosaic.read is pyromosaic.data.read and "read" in pyromosaic.__all__
