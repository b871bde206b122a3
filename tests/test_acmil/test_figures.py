"""Figures: what is drawn, by its numbers."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from acmil.figures import (
    concentration_figure,
    heatmap_figure,
    roc_figure,
    top_tiles_figure,
    training_curves_figure,
    umap_figure,
    umap_slide_figure,
)
from acmil.figures.style import length_text, round_length_um
from acmil.overlay import percentile_scale, relative_scale


def _texts_overlap(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts drawn over each other; tick labels beyond the axes' limits are never drawn."""
    FigureCanvasAgg(figure).draw()
    hidden = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]
    boxes = [(text.get_text(), text.get_window_extent().shrunk(0.95, 0.8)) for text in texts]
    return [(a, b) for i, (a, p) in enumerate(boxes) for b, q in boxes[i + 1 :] if p.overlaps(q)]


@pytest.fixture
def thumbnail():
    return np.random.default_rng(0).integers(150, 256, (300, 200, 3), dtype=np.uint8)


@pytest.fixture
def raster():
    raster = np.full((300, 200), np.nan, dtype=np.float32)
    raster[50:150, 40:120] = 5.0
    return raster


def _heatmap(thumbnail, raster, **options):
    options = {"downsample": 8.0, "mpp": 0.5, "title": "slide_1", "prediction": "model: tumour 93.0%"} | options
    return heatmap_figure(thumbnail, raster, **options)


def test_heatmap_leaves_the_background_as_it_is(thumbnail, raster):
    plain, overlay = (axes.get_images()[0].get_array() for axes in _heatmap(thumbnail, raster).axes[:2])
    np.testing.assert_array_equal(plain, thumbnail)
    empty = np.isnan(raster)
    np.testing.assert_array_equal(overlay[empty], thumbnail[empty])
    expected = 0.5 * (thumbnail[60, 60] @ [0.299, 0.587, 0.114]) + 0.5 * relative_scale().colours(np.array(5.0))
    assert np.abs(overlay[60, 60] - expected).max() <= 1


@pytest.mark.parametrize(("scale", "limits"), [(None, (0.1, 10.0)), (percentile_scale(), (0.0, 100.0))])
def test_colour_bar_has_the_limits_and_the_meaning(thumbnail, raster, scale, limits):
    figure = _heatmap(thumbnail, raster, scale=scale)
    bar = figure.axes[2]
    assert bar.get_ylim() == pytest.approx(limits)
    assert bar.get_ylabel() == (scale or relative_scale()).label
    assert "not the probability" in figure.get_supxlabel().replace("\n", " ")


def test_scale_bar_has_its_length(thumbnail, raster):
    figure = _heatmap(thumbnail, raster, mpp=0.2431, downsample=16.5)
    um_per_px = 0.2431 * 16.5
    for axes in figure.axes[:2]:
        (bar,) = [line for line in axes.lines if line.get_gid() == "scale-bar"]
        drawn_um = np.ptp(bar.get_xdata()) * um_per_px
        assert [text.get_text() for text in axes.texts] == ["200 µm"]
        assert drawn_um == pytest.approx(200.0, rel=0.01)
        assert drawn_um <= 200 * um_per_px / 4 + 1e-6


@pytest.mark.parametrize(
    ("limit", "length", "text"),
    [(260, 250, "250 µm"), (1000, 1000, "1 mm"), (4999, 2500, "2.5 mm"), (0.9, 0.5, "0.5 µm"), (200.0, 200, "200 µm")],
)
def test_round_lengths(limit, length, text):
    assert round_length_um(limit) == pytest.approx(length)
    assert length_text(round_length_um(limit)) == text


def test_outlines_are_drawn_in_thumbnail_pixels(thumbnail, raster):
    ring = np.array([[160.0, 80], [800, 80], [800, 400]])
    figure = _heatmap(thumbnail, raster, outlines=[[ring]], outline_label="lesion")
    for axes in figure.axes[:2]:
        outline = next(line for line in axes.lines if line.get_gid() != "scale-bar")
        np.testing.assert_allclose(outline.get_xydata()[:3], ring / 8.0 - 0.5)
        np.testing.assert_allclose(outline.get_xydata()[3], ring[0] / 8.0 - 0.5)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lesion"]


@pytest.mark.parametrize("shape", [(300, 200), (60, 600), (600, 60)])
def test_heatmap_texts_do_not_overlap(shape):
    thumbnail = np.full((*shape, 3), 240, np.uint8)
    figure = _heatmap(thumbnail, np.full(shape, np.nan), note="Shown: mean attention of 5 branches, 3,000 tiles.")
    assert _texts_overlap(figure) == []


@pytest.fixture
def points():
    generator = np.random.default_rng(1)
    return generator.normal(size=(240, 2)), np.exp(generator.normal(size=240))


@pytest.mark.parametrize(("n_slides", "legend"), [(8, 8), (80, 0)])
def test_umap_panels_and_slide_legend(points, n_slides, legend):
    embedding, relative = points
    slides = [f"slide_{i % n_slides:03d}" for i in range(len(embedding))]
    labels = ["tumour" if i % 2 else "normal" for i in range(len(embedding))]
    figure = umap_figure(embedding, relative_attention=relative, slides=slides, labels=labels)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels)[:2] == ["attention", "label of the slide"]
    slide_panel = next(axes for title, axes in panels.items() if title.startswith("slide"))
    shown = slide_panel.get_legend()
    assert (len(shown.get_texts()) if shown else 0) == legend
    assert _texts_overlap(figure) == []


def test_umap_draws_the_most_attended_last(points):
    embedding, relative = points
    figure = umap_figure(embedding, relative_attention=relative, slides=["a"] * len(embedding))
    drawn = figure.axes[0].collections[0]
    order = np.argsort(relative, kind="stable")
    np.testing.assert_allclose(drawn.get_offsets(), embedding[order])
    np.testing.assert_allclose(drawn.get_facecolors()[-1, :3], relative_scale().colours(relative.max()) / 255)


def test_umap_optional_panels(points):
    embedding, relative = points
    truth = ["lesion" if value > 1 else "other" for value in relative]
    figure = umap_figure(
        embedding, relative_attention=relative, slides=["a"] * 240, branches=np.arange(240) % 5, truth=truth
    )
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["attention", "known of the tile", "slide", "branch that attends most"]


def test_umap_of_one_slide_rings_the_attended(points):
    embedding, relative = points
    in_slide = np.arange(240) < 30
    figure = umap_slide_figure(
        embedding, relative_attention=relative, in_slide=in_slide, attended=relative > 1.5, title="s"
    )
    others, own = figure.axes[0].collections
    assert (len(others.get_offsets()), len(own.get_offsets())) == (210, 30)
    ringed = own.get_edgecolors()[:, 3] > 0
    assert ringed.sum() == (in_slide & (relative > 1.5)).sum()


def test_roc_curves_and_their_names():
    rates = np.linspace(0, 1, 5)
    figure = roc_figure({"tumour: AUROC 0.90 (0.80-0.95)": (rates, np.sqrt(rates))})
    chance, curve = figure.axes[0].lines
    np.testing.assert_array_equal(chance.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(curve.get_ydata(), np.sqrt(rates))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["chance", "tumour: AUROC 0.90 (0.80-0.95)"]
    assert _texts_overlap(figure) == []


def test_names_are_shown_as_they_are():
    rates = np.linspace(0, 1, 5)
    figure = roc_figure({"_high": (rates, rates), "$1$ \\frac": (rates, rates)}, title="S$1$x_y")
    figure.draw_without_rendering()  # which would read formulas
    names = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert names == ["chance", "_high", r"\$1\$ \frac"]
    assert figure.axes[0].get_title() == r"S\$1\$x_y"


def test_training_curves_go_to_their_panels():
    history = {
        "epoch": [0, 1, 2],
        "train_loss": [3.0, 2.0, 1.0],
        "val_loss": [1.0, 0.9, 0.8],
        "val_auroc": [0.5, 0.7, 0.9],
        "attention_entropy": [0.9, 0.8, 0.7],
        "attention_top10_mass": [0.1, 0.2, 0.3],
        "learning_rate": [1e-4, 5e-5, 0.0],
        "seconds": [1.0, 1.0, 1.0],
        "val_f1_macro": [np.nan, np.nan, np.nan],
    }
    figure = training_curves_figure(history, selected_epoch=1)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert len(panels) == 5
    lines = {line.get_label(): line for line in panels["loss"].lines}
    np.testing.assert_allclose(lines["val loss"].get_xydata(), [[0, 1.0], [1, 0.9], [2, 0.8]])
    assert [line.get_label() for line in panels["validation metric"].lines[:-1]] == ["val auroc"]
    assert panels["loss"].lines[-1].get_xdata() == pytest.approx([1, 1])
    assert _texts_overlap(figure) == []


def test_concentration_is_the_median_over_slides():
    curves = [np.array([0.5, 0.75, 1.0]), np.array([0.7, 0.9, 1.0]), np.array([0.6, 0.8, 0.9, 1.0])]
    figure = concentration_figure({"ACMIL": curves})
    line = figure.axes[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(line.get_ydata(), [0.6, 0.8, 1.0, 1.0])
    assert _texts_overlap(figure) == []


def test_top_tiles_are_framed_and_labelled():
    tiles = [np.full((8, 8, 3), i, np.uint8) for i in range(8)]
    values = np.linspace(12, 1, 8)
    figure = top_tiles_figure(tiles, values, tile_um=128.0, columns=6)
    assert len(figure.axes) == 12
    assert figure.axes[0].get_title() == "#1   12×"
    frame = figure.axes[7].spines["left"].get_edgecolor()
    np.testing.assert_allclose(frame[:3], relative_scale().colours(np.array(1.0)) / 255)
    assert "128 µm" in figure.get_supxlabel()
