"""The folder of `--out`: one message for all commands."""

import pytest

from acmil.preprocessing.output_folder import OutputError, make_output_folder, output_folder


def test_a_folder_is_made_with_those_above_it_and_kept(tmp_path):
    folder = tmp_path / "a" / "b"
    assert make_output_folder(folder) == folder
    (folder / "file").write_text("kept")
    make_output_folder(folder)
    assert (folder / "file").read_text() == "kept"


@pytest.mark.parametrize("inside", ["", "job", "deep/job"])
def test_a_file_in_the_way_is_named_with_the_mend(tmp_path, inside):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(OutputError) as caught:
        make_output_folder(file / inside)
    assert str(caught.value) == (
        f"out must be a folder, got a path where the file {file} is ({file / inside}). "
        "Choose another --out, or move the file away."
    )
    assert file.read_text() == "kept"


def test_what_the_system_refuses_is_said_with_the_mend(tmp_path):
    with pytest.raises(OutputError, match=r"could not be made: File name too long \(.*\)\. Choose another --out\."):
        make_output_folder(tmp_path / ("x" * 300))


def test_a_new_folder_that_stays_empty_is_removed_and_another_is_not(tmp_path):
    with pytest.raises(KeyError), output_folder(tmp_path / "new" / "out"):
        raise KeyError
    assert not (tmp_path / "new" / "out").exists()
    (tmp_path / "mine").mkdir()
    with output_folder(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()
    with output_folder(tmp_path / "out"):
        (tmp_path / "out" / "a.txt").touch()
    assert (tmp_path / "out" / "a.txt").is_file()
