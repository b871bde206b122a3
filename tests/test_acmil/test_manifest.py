"""Composing slides again: what is whole is kept, what is missing or of other options is composed."""

import pytest

from acmil.demo import planted
from acmil.demo.manifest import FILE_NAME
from acmil.demo.planted import compose_cohort


@pytest.fixture
def compose(tmp_path, monkeypatch):
    """Compose a cohort whose slides are a line of text each; returns the names of the slides that were composed."""
    source = tmp_path / "source.svs"
    source.write_bytes(b"tissue")

    def run(*, fails_after=None, **options):
        composed = []

        def pretend(source_slide, out, plan, difficulty, seed, workers):
            for slide in plan:
                if len(composed) == fails_after:
                    raise KeyboardInterrupt
                for name in slide.files:
                    (out / name).write_text(f"{slide.slide_id} {difficulty} {seed}")
                composed.append(slide.slide_id)
                yield slide

        monkeypatch.setattr(planted, "_composed", pretend)
        options = {"n_slides": 12} | options
        cohort = compose_cohort(source, tmp_path / "demo", **options)
        assert [path.read_text().split()[0] for path in cohort.slides] == [path.stem for path in cohort.slides]
        assert len(list((tmp_path / "demo" / "slides").iterdir())) == len(cohort.slides)
        return composed

    run.source = source
    return run


def test_what_is_whole_is_kept(compose, tmp_path):
    assert len(compose()) == 12
    manifest = tmp_path / "demo" / FILE_NAME
    written = manifest.stat().st_mtime_ns
    assert compose() == []
    assert manifest.stat().st_mtime_ns == written


def test_what_is_missing_truncated_or_changed_is_composed(compose, tmp_path):
    compose()
    demo = tmp_path / "demo"
    (demo / "slides" / "case01_2.tif").unlink()
    (demo / "slides" / "case03_1.tif").write_text("case03_1")
    (demo / "lesions" / "case05_2.geojson").write_text("case05_2 0.5 1")
    assert compose() == ["case01_2", "case03_1", "case05_2"]
    assert compose() == []


@pytest.mark.parametrize("options", [{"difficulty": 0.4}, {"seed": 1}, {"n_slides": 16}])
def test_other_options_compose_anew_and_leave_no_slide_over(compose, options):
    compose()
    assert len(compose(**options)) == options.get("n_slides", 12)
    assert compose(**options) == []
    assert len(compose()) == 12


def test_another_source_or_version_composes_anew(compose, monkeypatch):
    compose()
    compose.source.write_bytes(b"other tissue")
    assert len(compose()) == 12
    monkeypatch.setattr("acmil.demo.manifest.__version__", "9.9")
    assert len(compose()) == 12


def test_an_interrupted_change_of_options_is_finished_or_taken_back(compose):
    compose()
    with pytest.raises(KeyboardInterrupt):
        compose(seed=1, fails_after=3)
    assert len(compose()) == 3, "those that the interrupted call had replaced"
    with pytest.raises(KeyboardInterrupt):
        compose(seed=1, fails_after=3)
    assert len(compose(seed=1)) == 12
    assert compose(seed=1) == []


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"options": 1, "files": 2, "more": 3}'])
def test_a_manifest_that_cannot_be_read_counts_as_none(compose, tmp_path, content):
    compose()
    (tmp_path / "demo" / FILE_NAME).write_text(content)
    assert len(compose()) == 12
