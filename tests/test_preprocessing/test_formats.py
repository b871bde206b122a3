"""Feature files of other tools: exact layouts, round trips, and what is missing stays missing."""

import math
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from acmil.preprocessing.feature_file import FeatureFileError, FeatureMeta, open_feature_file, write_feature_file
from acmil.preprocessing.formats import FormatError, Geometry, detect_format, read_slides
from acmil.preprocessing.formats.acmil_reference import ReferenceSlide, write_reference
from acmil.preprocessing.formats.clam import write_clam, write_clam_pt
from acmil.preprocessing.formats.stamp import write_stamp
from acmil.preprocessing.formats.trident import write_trident

N, D = 5, 3
GEOMETRY = Geometry(
    tile_px=256,
    tile_level0_px=512,
    overlap_px=0,
    level0_width=40000,
    level0_height=30000,
    level0_mpp=0.25,
    tile_mpp=0.5,
    level0_magnification=40.0,
    target_magnification=20.0,
)


def numbers(n=N, d=D, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(n, d)).astype(dtype)


def corners(n=N):
    return np.stack([np.arange(n) * 512, np.full(n, 1024)], axis=1)


def read(path):
    (slide,) = read_slides(path)
    return slide


def layout(path):
    """Name -> (shape, dtype, attributes) of every object in an HDF5 file; "/" is the file itself."""
    found = {}
    with h5py.File(path) as file:
        found["/"] = dict(file.attrs)
        file.visititems(
            lambda name, item: found.update(
                {
                    name: (item.shape, item.dtype.str, dict(item.attrs))
                    if isinstance(item, h5py.Dataset)
                    else dict(item.attrs)
                }
            )
        )
    return found


# ---- what the tools' own readers look for ----


def test_trident_layout(tmp_path):
    path = tmp_path / "features_uni_v1" / "s1.h5"
    path.parent.mkdir()
    write_trident(path, slide_id="s1", features=numbers(), coords=corners(), geometry=GEOMETRY, encoder="uni_v1")
    folder = str(path.parent)
    assert layout(path) == {
        "/": {},
        "features": ((N, D), "<f4", {"name": "s1", "savetodir": folder, "encoder": "uni_v1"}),
        "coords": (
            (N, 2),
            "<i8",
            {
                "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20,
                "overlap": 0, "name": "s1", "savetodir": folder, "level0_width": 40000, "level0_height": 30000,
            },
        ),
    }  # fmt: skip


def test_clam_layout(tmp_path):
    write_clam(
        tmp_path / "s1.h5",
        slide_id="s1",
        features=numbers(dtype=np.float16),
        coords=corners(),
        geometry=GEOMETRY,
        encoder="x",
    )
    assert layout(tmp_path / "s1.h5") == {"/": {}, "features": ((N, D), "<f4", {}), "coords": ((N, 2), "<i4", {})}
    write_clam_pt(tmp_path / "s1.pt", features=numbers(dtype=np.float16))
    tensor = torch.load(tmp_path / "s1.pt", weights_only=True)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), numbers(dtype=np.float16).astype(np.float32))


def test_stamp_layout(tmp_path):
    path = tmp_path / "s1.h5"
    write_stamp(path, slide_id="s1", features=numbers(), coords=corners(), geometry=GEOMETRY, encoder="ctranspath")
    attributes = {
        "stamp_version": "2.1.0", "extractor": "ctranspath", "unit": "um", "tile_size_um": 128.0, "tile_size_px": 256,
        "code_hash": "", "feat_type": "tile",
    }  # fmt: skip
    assert layout(path) == {"/": attributes, "feats": ((N, D), "<f2", {}), "coords": ((N, 2), "<f4", {})}
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["coords"][...], corners() * 0.25)


def test_reference_layout(tmp_path):
    path = tmp_path / "patch_feats_pretrain_medical_ssl.h5"
    slides = [
        ReferenceSlide(name, numbers(), corners(), {"label": np.int64(k)})
        for k, name in enumerate(("tumor_001", "normal_001"))
    ]
    assert write_reference(path, iter(slides)) == 2
    assert layout(path) == {
        "/": {},
        "normal_001": {"label": 1},
        "normal_001/coords": ((N, 2), "<i8", {}),
        "normal_001/feat": ((N, D), "<f2", {}),
        "tumor_001": {"label": 0},
        "tumor_001/coords": ((N, 2), "<i8", {}),
        "tumor_001/feat": ((N, D), "<f2", {}),
    }


# ---- round trips ----

features_and_coords = array_shapes(min_dims=2, max_dims=2, max_side=6).flatmap(
    lambda shape: st.tuples(
        arrays(np.float16, shape, elements=st.floats(-6e4, 6e4, width=16)),
        arrays(np.int64, (shape[0], 2), elements=st.integers(0, 400_000)),
    )
)
geometries = st.builds(
    Geometry,
    tile_px=st.integers(32, 1024),
    tile_level0_px=st.integers(32, 4096),
    overlap_px=st.integers(0, 31),
    level0_width=st.integers(1, 400_000),
    level0_height=st.integers(1, 400_000),
    level0_mpp=st.floats(0.1, 2.0),
    level0_magnification=st.sampled_from([None, 20.0, 40.0, 2.5]),
    target_magnification=st.sampled_from([None, 10.0, 20.0]),
).map(lambda geometry: geometry.completed(Geometry(), where=""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("formats")


@settings(max_examples=30)
@given(content=features_and_coords, geometry=geometries, encoder=st.sampled_from(["", "uni_v1"]))
def test_trident_round_trip(folder, content, geometry, encoder):
    features, coords = content
    write_trident(folder / "s.h5", slide_id="s", features=features, coords=coords, geometry=geometry, encoder=encoder)
    slide = read(folder / "s.h5")
    np.testing.assert_array_equal(slide.features(), features)
    assert slide.features().dtype == features.dtype
    np.testing.assert_array_equal(slide.level0_coords(slide.geometry), coords)
    assert (slide.slide_id, slide.encoder, slide.format) == ("s", encoder, "trident")
    assert slide.geometry.completed(Geometry(level0_mpp=geometry.level0_mpp), where="") == geometry


@settings(max_examples=30)
@given(content=features_and_coords, geometry=geometries)
def test_stamp_round_trip(folder, content, geometry):
    features, coords = content
    write_stamp(folder / "t.h5", slide_id="t", features=features, coords=coords, geometry=geometry, encoder="uni")
    slide = read(folder / "t.h5")
    np.testing.assert_array_equal(slide.features(), features)
    back = slide.geometry.completed(Geometry(level0_mpp=geometry.level0_mpp), where="")
    np.testing.assert_array_equal(slide.level0_coords(back), coords)  # px -> µm in float32 -> px
    assert (back.tile_px, back.tile_level0_px) == (geometry.tile_px, geometry.tile_level0_px)
    assert back.tile_mpp == pytest.approx(geometry.tile_mpp)
    assert slide.encoder == "uni"


@settings(max_examples=20)
@given(content=features_and_coords)
def test_clam_and_reference_round_trips(folder, content):
    features, coords = content
    write_clam(folder / "u.h5", slide_id="u", features=features, coords=coords, geometry=GEOMETRY, encoder="")
    write_clam_pt(folder / "u.pt", features=features)
    write_reference(folder / "patch_feats_pretrain_x.h5", [ReferenceSlide("u", features, coords, {"label": "a"})])
    for name in ("u.h5", "u.pt", "patch_feats_pretrain_x.h5"):
        slide = read(folder / name)
        assert slide.slide_id == "u"
        np.testing.assert_array_equal(slide.features(), features)
        if name != "u.pt":
            np.testing.assert_array_equal(slide.level0_coords(slide.geometry), coords)
        assert slide.geometry == Geometry()
    assert (slide.extras, slide.encoder) == ({"label": "a"}, "x")


# ---- what is in the files, and what is not ----


def write_h5(path, datasets, *, file_attrs=None, coords_attrs=None):
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            file.create_dataset(name, data=data, maxshape=(None, *data.shape[1:]), chunks=(1, *data.shape[1:]))
        file.attrs.update(file_attrs or {})
        if coords_attrs:
            file["coords"].attrs.update(coords_attrs)
    return path


def test_older_trident_files_state_less(tmp_path):
    path = tmp_path / "features_conch_v15" / "s1.h5"
    path.parent.mkdir()
    attributes = {"patch_size": 512, "level0_magnification": 40, "target_magnification": 20, "overlap": "None"}
    slide = read(write_h5(path, {"features": numbers()[None], "coords": corners()[None]}, coords_attrs=attributes))
    np.testing.assert_array_equal(slide.features(), numbers())  # (1, N, D) on disk
    assert slide.geometry == Geometry(
        tile_px=512, tile_level0_px=1024, level0_magnification=40.0, target_magnification=20.0
    )
    assert slide.encoder == "conch_v15"
    assert slide.notes == (
        "encoder is the folder's name", "not stated: overlap_px, level0_width, level0_height, level0_mpp, tile_mpp",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, Geometry()),
        (
            {"patch_size": 256, "patch_level": 0, "downsample": (1.0, 1.0), "level_dim": (4000, 3000)},
            Geometry(tile_px=256, tile_level0_px=256, level0_width=4000, level0_height=3000),
        ),
        (
            {"patch_size": 256, "patch_level": 1, "downsample": (4.0001, 4.0), "level_dim": (1000, 750)},
            Geometry(tile_px=256, tile_level0_px=1024),
        ),
        ({"patch_size": 256, "patch_level": 1}, Geometry(tile_px=256)),
        ({"patch_size": 256, "patch_level": 0, "custom_downsample": 2}, Geometry()),
    ],
)
def test_clam_attributes(tmp_path, attributes, expected):
    slide = read(write_h5(tmp_path / "a.h5", {"features": numbers(), "coords": corners()}, coords_attrs=attributes))
    assert (slide.format, slide.geometry) == ("clam", expected)
    np.testing.assert_array_equal(slide.level0_coords(expected), corners())


def test_stamp_versions(tmp_path):
    coords = corners().astype(np.float32) / 2  # a step of 256
    data = {"feats": numbers(dtype=np.float16), "coords": coords}
    new = read(
        write_h5(tmp_path / "new.h5", data, file_attrs={"tile_size_um": 256.0, "tile_size_px": 224, "unit": "um"})
    )
    old = read(write_h5(tmp_path / "old.h5", data, file_attrs={"tile_size": 256.0, "unit": "um"}))
    for slide, tile in ((new, Geometry(tile_px=224, tile_mpp=256 / 224)), (old, Geometry())):
        assert (slide.coords_unit, slide.geometry) == ("um", tile)
        np.testing.assert_array_equal(slide.level0_coords(Geometry(level0_mpp=0.5)), coords * 2)
        assert slide.level0_coords(Geometry()) is None
    historic = read(write_h5(tmp_path / "v1.h5", {"feats": numbers(), "coords": corners() // 512 * 224}))
    np.testing.assert_array_equal(historic.level0_coords(Geometry(level0_mpp=0.5)), corners() // 512 * 512)
    assert historic.geometry == Geometry(tile_px=224, tile_mpp=256 / 224)


def test_the_real_stamp_named_file_loads_and_its_missing_geometry_is_reported(shared_data):
    slide = read(shared_data / "features_stamp" / "TCGA-AD-6964-01Z-00-DX1" / "features.h5")
    assert (slide.format, slide.n_tiles, slide.n_features, slide.dtype) == ("stamp", 777, 512, np.float32)
    features = slide.features()
    assert (features.min(), features.max()) == (pytest.approx(-4.006, abs=1e-3), pytest.approx(0.884, abs=1e-3))
    assert slide.notes == ("unit of coords not stated", "no geometry stated", "encoder not stated")
    assert slide.level0_coords(Geometry(level0_mpp=0.25)) is None
    np.testing.assert_array_equal(slide.coords[375], (22016, 11776))
    stated = slide.level0_coords(Geometry(level0_mpp=0.25), coords_mpp=0.5)
    np.testing.assert_array_equal(stated[375], (44032, 23552))


def test_our_own_file_is_read_as_ours_although_trident_would_read_it(tmp_path):
    unknown = {
        name: math.nan if "mpp" in name else -1 for name in ("level0_width", "level0_height", "level0_mpp", "tile_mpp")
    }
    meta = FeatureMeta(
        slide_id="s", encoder="uni", encoder_digest="", preprocessing_digest="", tile_px=256, tile_level0_px=512,
        overlap_px=0, **unknown,
    )  # fmt: skip
    coords = np.full((N, 2), -1)
    write_feature_file(
        tmp_path / "s.h5", features=numbers(), coords=coords, tissue_fraction=np.full(N, np.nan), meta=meta
    )
    with h5py.File(tmp_path / "s.h5") as file:
        assert file.attrs["unknown"] == "level0_width, level0_height, level0_mpp, tile_mpp"
        assert "level0_mpp" not in file.attrs
        assert "level0_width" not in file["coords"].attrs
    opened = open_feature_file(tmp_path / "s.h5")
    assert opened.meta.unknown == tuple(unknown)
    assert (opened.meta.level0_width, math.isnan(opened.meta.tile_mpp), opened.has_coords()) == (-1, True, False)
    slide = read(tmp_path / "s.h5")
    assert (slide.format, slide.coords, slide.geometry) == (
        "acmil",
        None,
        Geometry(tile_px=256, tile_level0_px=512, overlap_px=0),
    )
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        del file["coords"].attrs["patch_size"]  # not named as unknown: damage
    with pytest.raises(FeatureFileError, match="'patch_size'"):
        read(tmp_path / "s.h5")


def test_geometry_is_filled_in_and_never_contradicted():
    known = Geometry(tile_px=224, tile_mpp=256 / 224)
    full = known.completed(Geometry(level0_mpp=0.25, level0_width=10, overlap_px=0), where="a.h5")
    assert (full.tile_level0_px, full.level0_width, full.missing()) == (1024, 10, ("level0_height",))
    from_sides = Geometry(tile_px=256, tile_level0_px=512).completed(Geometry(level0_mpp=0.26), where="")
    assert from_sides.tile_mpp == pytest.approx(0.52)
    with pytest.raises(FormatError, match=r"tile_px must be what the file says, 224, got 256 \(a\.h5\)"):
        known.completed(Geometry(tile_px=256), where="a.h5")
    assert known.completed(Geometry(tile_mpp=1.143), where="").tile_mpp == 256 / 224


# ---- refused ----


class Trap:
    """Unpickles to a call that leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_tensor_file_is_not_run(tmp_path):
    torch.save({"features": Trap(tmp_path / "sprung")}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(FormatError, match=name):
            read(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("keep", [10, 100, 0.5, -7])
def test_cut_files(tmp_path, keep):
    write_clam_pt(tmp_path / "a.pt", features=numbers(200, 40))
    write_clam(
        tmp_path / "a.h5", slide_id="a", features=numbers(200, 40), coords=corners(200), geometry=GEOMETRY, encoder=""
    )
    for path in (tmp_path / "a.pt", tmp_path / "a.h5"):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
        with pytest.raises(FormatError, match=r"truncated, damaged .*" + path.name):
            read(path).features()


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"features": numbers(), "coords": corners(4)}, r"coords must be numbers \(5, 2\), .* got int64 \(4, 2\)"),
        ({"features": numbers()[0], "coords": corners()}, r"features must be \(N, D\) .* got shape \(3,\)"),
        ({"feats": numbers()[:0], "coords": corners()}, r"at least 1, got shape \(0, 3\)"),
        ({"features": corners(), "coords": corners()}, "floating-point numbers .* of int64"),
        ({"feats": numbers(), "coords": corners() * np.nan}, "coords must be finite"),
        ({"coords": corners()}, "embed the tiles first"),
        ({"imgs": numbers()}, "found 'imgs' in it"),
    ],
)
def test_wrong_contents(tmp_path, datasets, message):
    with pytest.raises(FormatError, match=rf"(?s){message}.*") as caught:
        read(write_h5(tmp_path / "wrong.h5", datasets))
    assert "wrong.h5" in str(caught.value)


def test_features_of_whole_slides_and_other_things(tmp_path):
    path = write_h5(tmp_path / "p.h5", {"feats": numbers(1)}, file_attrs={"feat_type": "patient"})
    with pytest.raises(FormatError, match="feat_type must be 'tile', got 'patient'"):
        read(path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(FormatError, match=r"one tensor, got list .*list\.pt"):
        read(tmp_path / "list.pt")
    torch.save(torch.zeros(4), tmp_path / "vector.pt")
    with pytest.raises(FormatError, match=r"got shape \(4,\) of torch\.float32"):
        read(tmp_path / "vector.pt")
    with pytest.raises(FormatError, match=r"found none .*none\.h5"):
        read(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(FormatError, match=r"another kind of file.*text\.h5"):
        detect_format(tmp_path / "text.h5")


def test_half_precision_tensors_are_read(tmp_path):
    torch.save(torch.arange(6, dtype=torch.bfloat16).reshape(1, 2, 3), tmp_path / "a.pt")
    slide = read(tmp_path / "a.pt")
    assert (slide.format, slide.n_tiles, slide.n_features, slide.dtype) == ("clam-pt", 2, 3, np.float32)
    np.testing.assert_array_equal(slide.features(), np.arange(6).reshape(2, 3))


def test_writers_refuse_what_the_format_cannot_say(tmp_path):
    path, given_ = tmp_path / "a.h5", {"slide_id": "a", "features": numbers(), "encoder": ""}
    with pytest.raises(FormatError, match="trident must state coords, tile_px, tile_level0_px"):
        write_trident(path, coords=None, geometry=Geometry(), **given_)
    with pytest.raises(FormatError, match="stamp must state level0_mpp"):
        write_stamp(path, coords=corners(), geometry=Geometry(tile_px=1, tile_mpp=1.0), **given_)
    with pytest.raises(FormatError, match="clam must state coords"):
        write_clam(path, coords=None, geometry=Geometry(), **given_)
    with pytest.raises(FormatError, match=r"finite in float16, .* largest is 70000"):
        write_stamp(
            path, coords=corners(), geometry=GEOMETRY, **(given_ | {"features": numbers() * 0 + np.float32(7e4)})
        )
    assert list(tmp_path.iterdir()) == []
