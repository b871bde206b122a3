"""Lists of slides: files, folders, CSV files, and what is wrong with them."""

import os
import sys
from pathlib import Path

import pytest

from acmil.preprocessing.ledger import Ledger, Row
from acmil.preprocessing.slide_list import SlideListError, SlideSource, list_slides


@pytest.fixture
def folder(tmp_path):
    for name in (
        "b.svs",
        "a.TIFF",
        "notes.txt",
        "._b.svs",
        "deep/er/c.ndpi",
        "deep/scan.mrxs",
        "deep/scan/Data0000.dat",
    ):
        path = tmp_path / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "slides"


def test_a_folder_gives_its_slides_sorted_and_those_inside(folder):
    sources = list_slides([folder], mpp=0.5)
    assert [source.slide_id for source in sources] == ["a", "b", "c", "scan"]
    assert sources[2] == SlideSource("c", folder / "deep" / "er" / "c.ndpi", 0.5)


def test_files_are_taken_as_they_are_given(folder):
    sources = list_slides([folder / "notes.txt", folder / "a.TIFF"])
    assert sources == (SlideSource("notes", folder / "notes.txt"), SlideSource("a", folder / "a.TIFF"))


def test_a_csv_names_slides_and_states_resolutions(folder):
    table = folder.parent / "list.csv"
    table.write_text(
        f"\ufeffpath,slide_id,mpp\r\nslides/b.svs,patient_1,\r\n{folder / 'a.TIFF'},,0.25\r\n",
        encoding="utf-8",
        newline="",
    )
    assert list_slides([table], mpp=1.0) == (
        SlideSource("patient_1", folder / "b.svs", 1.0),
        SlideSource("a", folder / "a.TIFF", 0.25),
    )
    table.write_text("path,label\nslides/b.svs,tumour\n", encoding="utf-8")
    assert list_slides([table]) == (SlideSource("b", folder / "b.svs"),)


def test_lists_that_cannot_be_used_are_refused(folder):
    with pytest.raises(SlideListError, match=r"must exist, found none \(.*none\.svs\)"):
        list_slides([folder / "a.TIFF", folder / "none.svs"])
    table = folder.parent / "one_is_gone.csv"  # which will be a slide that fails
    table.write_text("path\nslides/a.TIFF\nslides/gone.svs\n", encoding="utf-8")
    assert [source.slide_id for source in list_slides([table])] == ["a", "gone"]
    with pytest.raises(SlideListError, match=r"none\.svs, .*nor\.svs\)"):
        list_slides([folder / "none.svs", folder / "nor.svs"])
    (folder / "latin.csv").write_bytes("path\nä.svs\n".encode("latin-1"))
    with pytest.raises(SlideListError, match=r"CSV text in UTF-8: .*latin\.csv.*Save it as"):
        list_slides([folder / "latin.csv"])
    with pytest.raises(SlideListError, match="must exist"):
        list_slides([folder / "none.csv"])
    (folder / "empty").mkdir()
    with pytest.raises(SlideListError, match=r"no slides found in .*empty, suffixes looked for: \.svs, \.tif,"):
        list_slides([folder / "empty"])
    (folder / "deep" / "b.tif").touch()
    with pytest.raises(SlideListError, match=r"unique, got 'b' for .*b\.svs and .*b\.tif"):
        list_slides([folder])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,label\na,1\n", "column 'path', got slide_id, label"),
        ("", "column 'path', got nothing"),
        ("path\n", "at least one slide"),
        ("path,mpp\nslides/b.svs,fine\n", r"got 'fine' \(.*list.csv, line 2\)"),
        ("path,mpp\n,0.5\n", r"path in every row.*line 2"),
        ("path,slide_id\nslides/b.svs,../b\n", "fit for a file name, got '../b'"),
        ("path\nslides/gone.svs\n", r"must exist, found none \(.*gone\.svs"),
        ("path\nslides/b.svs\nslides/b.svs\n", "unique, got 'b'"),
    ],
)
def test_csv_files_that_cannot_be_used_are_refused(folder, text, message):
    table = folder.parent / "list.csv"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(SlideListError, match=message):
        list_slides([table])


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.touch()


def test_a_folder_gives_its_plain_images_too(tmp_path):
    touch(tmp_path, "a.png", "b.JPG", "c.jpeg", "d.bmp", "e.tif", "f/g.svs", "notes.gif")
    assert [source.slide_id for source in list_slides([tmp_path])] == ["a", "b", "c", "d", "e", "g"]


def test_pictures_that_come_with_a_slide_are_left_out(tmp_path, caplog):
    touch(tmp_path, "1.svs", "1.png", "1_mask.png", "1-label.jpg", "10.png", "tma.png")
    touch(tmp_path, "hamamatsu/s.vms", "hamamatsu/s(1,0).jpg", "hamamatsu/map2.jpg")
    assert [source.slide_id for source in list_slides([tmp_path])] == ["1", "10", "s", "tma"]
    assert "5 images are not taken for slides" in caplog.text
    assert list_slides([tmp_path / "1_mask.png"])[0].slide_id == "1_mask"  # Asked for by name.


def test_pictures_of_results_are_left_out(tmp_path):
    touch(tmp_path, "slides/a.png", "slides/slides.csv", "slides/features/")
    touch(tmp_path, "job/config.yaml", "job/slides.csv", "job/features/", "job/previews/a.jpg")
    touch(tmp_path, "run/model.json", "run/config.yaml", "run/figures/history.png")
    touch(tmp_path, "evaluation/metrics.json", "evaluation/predictions.csv", "evaluation/roc.png")
    touch(tmp_path, "heatmaps/a.png", "heatmaps/a.geojson", "umap/umap.csv", "umap/umap.png")
    touch(tmp_path, "demo/index.html", "demo/summary.json", "demo/figures/b.png")
    assert [source.path for source in list_slides([tmp_path])] == [tmp_path / "slides" / "a.png"]
    with pytest.raises(SlideListError, match=r"no slides found in .*job"):
        list_slides([tmp_path / "job"])


def test_names_that_no_file_can_have_are_refused(folder):
    table = folder.parent / "list.csv"
    for name, said in ((".hidden", "fit for a file name, got '.hidden'"), ("名" * 60, "at most 160 bytes in UTF-8")):
        table.write_text(f"path,slide_id\nslides/b.svs,{name}\n", encoding="utf-8")
        with pytest.raises(SlideListError, match=said):
            list_slides([table])


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose file names are bytes")
def test_a_file_name_that_is_not_text_is_named(folder):
    Path(os.fsdecode(os.fsencode(folder) + b"/M\xfcller.svs")).touch()
    with pytest.raises(SlideListError, match=r"M\\udcfcller.svs.*Rename the file to UTF-8"):
        list_slides([folder])


@pytest.mark.skipif(sys.platform == "win32", reason="needs Linux or macOS: on Windows a link takes rights")
def test_linked_folders_are_searched_once_and_dead_links_told_of(folder, caplog):
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "d.svs").touch()
    (folder / "batch").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    (folder / "gone.svs").symlink_to(folder / "nothing.svs")
    assert [source.slide_id for source in list_slides([folder])] == ["a", "b", "d", "c", "scan"]
    assert "1 links lead nowhere" in caplog.text


def test_the_files_of_a_dicom_series_are_one_slide(shared_data, tmp_path):
    series = shared_data / "slides" / "dicom_boxes"
    if not series.is_dir():
        pytest.skip("needs slides/dicom_boxes of the data kit, which this copy of ../shared/data lacks")
    sources = list_slides([series])
    assert len(list(series.glob("*.dcm"))) > 1
    assert len(sources) == 1


def test_of_the_table_of_a_job_only_slides_with_tiles_where_they_are_needed(tmp_path, caplog):
    touch(tmp_path, "a.svs", "b.svs", "c.svs", "d.svs")
    (tmp_path / "rows").mkdir()
    ledger = Ledger(tmp_path / "slides.csv", rows=tmp_path / "rows")
    for slide_id, status in (("a", "done"), ("b", "failed"), ("c", "empty"), ("d", "failed")):
        ledger.set(Row(slide_id, f"{slide_id}.svs", status))
    ledger.write()
    caplog.set_level("INFO")
    assert [slide.slide_id for slide in list_slides([tmp_path / "slides.csv"])] == ["a", "b", "c", "d"]
    assert [slide.slide_id for slide in list_slides([tmp_path / "slides.csv"], with_tiles=True)] == ["a"]
    assert "slides.csv without tiles are left out: 1 empty, 2 failed" in caplog.text


def test_a_folder_that_cannot_be_read_is_not_left_out(folder, monkeypatch):
    plain = os.walk

    def walk(top, **options):
        options["onerror"](PermissionError(13, "Permission denied", str(folder / "deep")))
        return plain(top, **options)

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(SlideListError, match=r"must be readable.*Permission denied \(.*deep\)"):
        list_slides([folder])


@pytest.mark.parametrize("header", ["path, slide_id, mpp", "Path,Slide_ID,MPP", "path,slide id,Mpp"])
def test_columns_are_found_however_a_spreadsheet_writes_them(folder, header):
    (folder / "list.csv").write_text(f"{header}\na.TIFF,A,0.25\n")
    assert list_slides([folder / "list.csv"]) == (SlideSource("A", folder / "a.TIFF", 0.25),)


@pytest.mark.parametrize("line", ["a.TIFF,A,1,05", "a.TIFF,A"])
def test_a_row_of_another_width_than_the_header_is_refused(folder, line):
    (folder / "list.csv").write_text(f"path,slide_id,mpp\n{line}\n")
    with pytest.raises(SlideListError, match=r"must have 3 fields in every row.*line 2.*Put quotes"):
        list_slides([folder / "list.csv"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose file names are bytes")
def test_a_folder_whose_name_is_not_text_is_told_of(folder):
    strange = Path(os.fsdecode(os.fsencode(folder) + b"/lat\xe9n"))
    strange.mkdir()
    (strange / "z.svs").touch()
    with pytest.raises(SlideListError, match=r"path must be text.*Rename the folder to UTF-8"):
        list_slides([folder])


def test_of_the_table_of_a_job_only_stated_resolutions_are_stated_again(tmp_path):
    touch(tmp_path, "a.svs", "b.svs")
    (tmp_path / "rows").mkdir()
    ledger = Ledger(tmp_path / "slides.csv", rows=tmp_path / "rows")
    ledger.set(Row("a", "a.svs", "done", mpp=0.25, mpp_given=False))
    ledger.set(Row("b", "b.svs", "done", mpp=0.5, mpp_given=True))
    ledger.write()
    assert [slide.mpp for slide in list_slides([tmp_path / "slides.csv"])] == [None, 0.5]
