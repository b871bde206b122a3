"""What the notebook of one slide calls: facts as in the file, figures by their numbers, its defaults."""

import numpy as np
import pytest

from acmil import walkthrough
from acmil.figures import slide_figure, tile_sheet_figure
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tiling import tile_grid
from acmil.preprocessing.tissue import find_tissue


@pytest.fixture(scope="module")
def laid_out(stained_slide):
    with Slide.open(stained_slide) as slide:
        tissue = find_tissue(slide)
        yield slide, tissue, tile_grid(slide, tissue, tile_px=100, tile_mpp=0.5, min_tissue=0.9)


def test_facts_are_the_files(laid_out):
    facts = walkthrough.slide_facts(laid_out[0])
    assert facts["level 0 in px"] == "1,000 x 800"
    assert facts["on the glass in mm"] == "0.50 x 0.40"
    assert facts["resolution in µm/px"] == 0.5
    assert facts["pyramid levels in px"] == "1,000 x 800; 250 x 200"
    assert facts["their downsampling"] == "1, 4"
    assert facts["objective, nominal"] == "not stated"


def test_outlines_are_drawn_where_the_tissue_is(laid_out):
    slide, tissue, _ = laid_out
    figure = walkthrough.tissue_figure(slide, tissue)
    thumbnail, outlined = figure.axes
    assert thumbnail.get_images()[0].get_array().shape == (640, 800, 3)
    assert tissue.fraction == pytest.approx(600 * 600 / (1000 * 800), abs=0.02)
    assert outlined.get_title() == f"tissue, {tissue.fraction:.0%} of the slide"
    rings = [line for line in outlined.lines if line.get_gid() != "scale-bar"]
    assert len(rings) == 1
    assert len(thumbnail.lines) == 1  # its scale bar
    x, y = rings[0].get_data()
    # the tissue is at 200 to 800 by 100 to 700 of 1000 x 800 px; the mask has pixels of 16 level-0 px
    np.testing.assert_allclose([x.min(), x.max(), y.min(), y.max()], [160, 640, 80, 560], atol=14)


def test_the_grid_is_on_the_preview(laid_out):
    (axes,) = walkthrough.grid_figure(*laid_out).axes
    assert axes.get_title() == "36 tiles"
    assert axes.get_images()[0].get_array().shape == (800, 1000, 3)


def test_tiles_are_spread_over_the_grid(laid_out):
    slide, _, grid = laid_out
    figure = walkthrough.tiles_figure(slide, grid, count=8)
    shown = [image for axes in figure.axes for image in axes.get_images()]
    assert len(shown) == 8
    x, y = grid.coords[-1].tolist()
    np.testing.assert_array_equal(shown[-1].get_array(), slide.read_tile(x, y, size_level0_px=100, out_px=100))
    assert "50 µm wide. 100 x 100 px at 0.5 µm/px" in figure.get_supxlabel().replace("\n", " ")


def test_stains_are_shown_before_and_after(laid_out):
    slide, _, grid = laid_out
    figure = walkthrough.stains_figure(slide, grid, count=3)
    images = np.stack([axes.get_images()[0].get_array() for axes in figure.axes]).reshape(3, 3, 100, 100, 3)
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["as scanned", "macenko", "reinhard"]
    changes = np.abs(images[1:].astype(int) - images[0]).mean(axis=(1, 2, 3, 4))
    assert (changes > 5).all()


def test_slide_figure_shows_the_pictures_as_they_are():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    figure = slide_figure([image, image], titles=["a", "b"], um_per_px=2.0, note="small print")
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    for axes in figure.axes:
        np.testing.assert_array_equal(axes.get_images()[0].get_array(), image)
        assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 59.5), (39.5, -0.5))
    assert figure.get_supxlabel() == "small print"


def test_rows_of_tiles_may_differ_in_length():
    tiles = np.zeros((5, 8, 8, 3), np.uint8)
    figure = tile_sheet_figure([tiles[:3], tiles[3:]], row_titles=["one", "two"], tile_um=112.0)
    assert [len(axes.get_images()) for axes in figure.axes] == [1, 1, 1, 1, 1, 0]


def test_paths_are_the_samples_unless_given(monkeypatch, tmp_path):
    monkeypatch.setenv("ACMIL_SLIDE", str(tmp_path / "mine.svs"))
    monkeypatch.setenv("ACMIL_WEIGHTS", str(tmp_path / "mine.pth"))
    assert (walkthrough.slide_path(), walkthrough.weights_path()) == (tmp_path / "mine.svs", tmp_path / "mine.pth")
    monkeypatch.delenv("ACMIL_SLIDE")
    monkeypatch.delenv("ACMIL_WEIGHTS")
    monkeypatch.setattr(walkthrough, "fetch_sample", lambda name: tmp_path / name)
    assert walkthrough.slide_path().name == "cmu-1-small-region"
    assert walkthrough.weights_path().name == "efficientnet-lite0"
