"""DICOM, HDF5 and NIfTI: pydicom's own files and files that the libraries write, as arrays of numbers."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_modality_lut, apply_windowing

from mirl.dataloaders import build_train_loader, load_images, open_source
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources import containers
from mirl.dataloaders.sources.windows import windowed
from mirl.dataloaders.tools.bench import bench_loader
from mirl.dataloaders.tools.prepare import prepare_data
from mirl.dataloaders.tools.validate import validate_data
from mirl.engine.commands import data as data_commands
from mirl.engine.configuration.config import DataConfig
from mirl.errors import UserError

RNG = np.random.default_rng(0)


def dicom(name: str, target: Path) -> Path:
    """Copies a file that comes with pydicom."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = get_testdata_file(name, download=False)
    assert path is not None
    return Path(shutil.copy(path, target))


def array(source, index: int = 0) -> np.ndarray:
    return np.load(io.BytesIO(source.read(index)), allow_pickle=False)


def test_dicom_numbers_are_rescaled_and_put_into_the_window_of_the_file(tmp_path):
    # MR_small has a window, 693_J2KI a window and a rescaling, CT_small a rescaling alone.
    for name in ("MR_small.dcm", "693_J2KI.dcm", "MR_small_RLE.dcm"):
        path = dicom(name, tmp_path / name)
        data = pydicom.dcmread(path)
        values = apply_modality_lut(data.pixel_array, data)
        shown = apply_windowing(values, data)
        low, high = (
            2.0 ** (data.BitsStored - 1) * (-1 if data.PixelRepresentation else 0),
            2.0 ** (data.BitsStored - (1 if data.PixelRepresentation else 0)),
        )
        slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
        low, high = low * slope + intercept, (high - 1) * slope + intercept
        found = array(open_source(path))
        assert found.dtype == np.float32 and found.shape == (data.Rows, data.Columns)
        np.testing.assert_allclose(found, (shown - low) / (high - low), atol=1e-6)  # float32 rounding
        assert 0.0 <= found.min() < found.max() <= 1.0
    path = dicom("CT_small.dcm", tmp_path / "CT_small.dcm")
    data = pydicom.dcmread(path)
    hounsfield = data.pixel_array.astype(np.float64) - 1024
    np.testing.assert_allclose(array(open_source(path)), (data.pixel_array + 32768.0) / 65535, atol=1e-6)
    found = array(open_source(f"{path}:window=40/400"))
    np.testing.assert_allclose(found, np.clip((hounsfield + 160) / 400, 0, 1), atol=1e-6)
    image = load_images([f"{path}:window=40/400"], image_size=(128, 128), channels=1)
    assert np.allclose(image[0, 0].numpy(), found, atol=1e-6)
    folder = tmp_path / "one"
    shutil.copytree(tmp_path, folder, ignore=lambda place, names: set(names) - {"CT_small.dcm"})
    validate_data(f"{folder}:window=40/400", manifest=tmp_path / "m.tsv", channels=1, progress=False)
    assert np.array_equal(array(open_source(tmp_path / "m.tsv")), found)
    # MONOCHROME1 shows small numbers bright.
    data.PhotometricInterpretation = "MONOCHROME1"
    data.save_as(tmp_path / "inverted.dcm")
    np.testing.assert_allclose(array(open_source(f"{tmp_path}/inverted.dcm:window=40/400")), 1 - found, atol=1e-6)


def test_window_functions_are_those_of_the_standard():
    data = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False))
    x = np.arange(0, 2000, 7)
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        data.VOILUTFunction = function
        wanted = (apply_windowing(x, data) + 32768.0) / 65535
        np.testing.assert_allclose(windowed(x, 600, 1600, function), wanted, atol=1e-6)
    assert windowed(np.array([39, 40, 41]), 40, 1).tolist() == [0, 1, 1]
    for width, function in ((0.5, "LINEAR"), (0, "SIGMOID"), (5, "CUBIC")):
        with pytest.raises(ImageError, match="its window (width|function) is"):
            windowed(x, 0, width, function)


def test_frames_colours_and_files_without_a_suffix(tmp_path):
    dicom("examples_palette.dcm", tmp_path / "a" / "IM0001")
    dicom("SC_rgb_rle_2frame.dcm", tmp_path / "a" / "two.DCM")
    dicom("rtplan.dcm", tmp_path / "b" / "plan.dcm")
    dicom("examples_ybr_color.dcm", tmp_path / "b" / "video.dcm")
    (tmp_path / "b" / "cut.dcm").write_bytes(dicom("MR_small.dcm", tmp_path / "x.bin").read_bytes()[:4000])
    (tmp_path / "x.bin").unlink()
    source = open_source(tmp_path, labels=True, every_name=True)
    names = [source.path(index).removeprefix(f"{tmp_path}/") for index in range(source.num_images)]
    assert names[:5] == ["a/IM0001", "a/two.DCM::0", "a/two.DCM::1", "b/cut.dcm", "b/video.dcm::0"] and len(names) == 34
    assert str(source.ledger) == "34 images from 35 frames of 5 DICOM files (1 left out: 1 DICOM without pixels)"
    assert source.classes == ["a", "b"] and [source.label(index) for index in (0, 2, 3, 33)] == [0, 0, 1, 1]
    assert array(source, 0).shape == (350, 800, 3) and array(source, 0).dtype == np.uint16
    two = pydicom.dcmread(tmp_path / "a" / "two.DCM").pixel_array
    assert np.array_equal(array(source, 2), two[1]) and two.dtype == np.uint8
    with pytest.raises(ImageError) as error:
        source.read(3)
    assert "\n" not in str(error.value)
    # Beside pictures they are left out, as they were before.
    (tmp_path / "a" / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert str(open_source(tmp_path).ledger) == "1 image from 6 files (5 left out: 4 .dcm, 1 DICOM)"


def test_an_enhanced_file_has_a_window_for_each_frame(tmp_path):
    data = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False))
    for keyword in ("WindowCenter", "WindowWidth"):
        delattr(data, keyword)
    stored = RNG.integers(0, 1000, (2, data.Rows, data.Columns), dtype=np.int16)
    data.NumberOfFrames, data.PixelData = 2, stored.tobytes()

    def item(**values) -> pydicom.Dataset:
        one = pydicom.Dataset()
        for keyword, value in values.items():
            setattr(one, keyword, value)
        return one

    data.PerFrameFunctionalGroupsSequence = [
        item(FrameVOILUTSequence=[item(WindowCenter=centre, WindowWidth=200, VOILUTFunction="LINEAR_EXACT")])
        for centre in (300, 700)
    ]
    data.SharedFunctionalGroupsSequence = [
        item(PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=-10, RescaleType="US")])
    ]
    data.save_as(tmp_path / "enhanced.dcm")
    source = open_source(tmp_path / "enhanced.dcm")
    for frame, centre in enumerate((300, 700)):
        wanted = np.clip((stored[frame] * 2.0 - 10 - (centre - 100)) / 200, 0, 1)
        np.testing.assert_allclose(array(source, frame), wanted, atol=1e-6)


def volume(path: Path, affine: np.ndarray, shape=(4, 5, 6), kind=np.int16, **scaling) -> np.ndarray:
    values = RNG.integers(0, 200, shape).astype(kind)
    image = nibabel.Nifti1Image(values, affine)
    if scaling:
        image.header.set_slope_inter(scaling["slope"], scaling["inter"])
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return np.asarray(nibabel.load(path).dataobj)


def test_nifti_slices_are_turned_to_one_orientation(tmp_path):
    values = volume(tmp_path / "a.nii.gz", np.diag([2, 2, 3, 1]))
    for axis, number, wanted in (
        ("axial", 4, values[:, :, 4]),
        ("coronal", 3, values[:, 3, :]),
        ("sagittal", 1, values[1]),
    ):
        source = open_source(f"{tmp_path}/a.nii.gz:axis={axis}")
        assert source.num_images == {"axial": 6, "coronal": 5, "sagittal": 4}[axis]
        found = array(source, number)
        assert source.path(number) == f"{tmp_path}/a.nii.gz:axis={axis}::{number}"
        # Rows from the last (anterior or superior) to the first, columns from the first to the last.
        assert found.dtype == np.float32 and np.array_equal(found, wanted.T[::-1])
    # The same volume with its axes stored in another order and direction gives the same slices.
    turned = nibabel.load(tmp_path / "a.nii.gz").as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nibabel.save(turned, tmp_path / "b.nii")
    one, other = open_source(tmp_path / "a.nii.gz"), open_source(tmp_path / "b.nii")
    assert turned.shape != (4, 5, 6) and other.num_images == 6
    assert all(np.array_equal(array(one, index), array(other, index)) for index in range(6))
    assert one.path(5) == f"{tmp_path}/a.nii.gz::5"
    values = volume(tmp_path / "t" / "t.nii", np.eye(4), (3, 4, 5, 2), slope=0.5, inter=-7)
    source = open_source(f"{tmp_path}/t:window=20/80")
    assert source.num_images == 10 and source.path(7) == f"{tmp_path}/t/t.nii:window=20/80::1/2"
    wanted = np.clip((values[:, :, 2, 1].astype(np.float64).T[::-1] + 20) / 80, 0, 1)
    np.testing.assert_allclose(array(source, 7), wanted, atol=1e-6)


def test_hdf5_takes_one_dataset_and_says_which_there_are(tmp_path):
    images = RNG.integers(0, 255, (6, 20, 16, 3), dtype=np.uint8)
    scans = RNG.integers(-1000, 1000, (4, 12, 10), dtype=np.int16)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = images
        file["y"] = np.arange(6) % 2
        file["note"] = "text"
    source = open_source(path, labels=True)
    assert source.num_images == 6 and source.path(4) == f"{path}::x/4" and source.classes is None
    assert np.array_equal(array(source, 4), images[4]) and source.label(3) == 1
    with h5py.File(path, "a") as file:
        file["ct/scans"] = scans
        file["ct/grades"] = [0, 2, 2, -1]
    with pytest.raises(UserError, match=r"has 2 datasets that may be images \(ct/grades \[4\], ct/scans \[4, 12, 10\]"):
        open_source(path)
    source = open_source(f"{path}:ct/scans,ct/grades,window=0/500", labels=True)
    np.testing.assert_allclose(array(source, 2), np.clip((scans[2] + 250.0) / 500, 0, 1), atol=1e-6)
    assert source.label(2) == 2
    # A name says what was chosen, so that pictures of a run and manifests read the same image.
    assert source.path(2) == f"{path}:ct/scans,ct/grades,window=0/500::ct/scans/2"
    wanted = load_images([source.path(2)], image_size=(12, 10), channels=1)
    assert np.allclose(wanted[0, 0].numpy(), array(source, 2), atol=1e-6)
    assert open_source(f"{path}:ct/scans").fingerprint() != source.fingerprint()
    report = validate_data(f"{path}:ct/scans,window=0/500", manifest=tmp_path / "m.tsv", channels=1, progress=False)
    assert report.num_images == 4 and report.value_range == (0.0, 1.0)
    listed = open_source(tmp_path / "m.tsv")
    assert listed.num_images == 4 and np.array_equal(array(listed, 2), array(source, 2))
    with pytest.raises(ImageError, match="its label is -1"):
        source.label(3)
    assert array(open_source(f"{path}:/ct/scans"), 0).dtype == np.float32
    for key, problem in (
        ("ct/grades", "no dataset 'ct/grades' of images: give one of ct/grades"),
        ("ct", "no dataset 'ct' of images"),
        ("ct/scans,y", "no dataset 'y' of 4 class numbers"),
        ("ct/scans,window=0/0", "window is '0/0': give CENTRE/WIDTH, two numbers, the width above 0"),
        ("ct/scans,axis=up", "axis is 'up': give one of sagittal, coronal, axial"),
        ("a,b,c", "'a,b,c' chooses nothing"),
        ("size=4", "'size=4' chooses nothing"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            open_source(f"{path}:{key}", labels=True)
        assert "\n" not in str(error.value)
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file["picture"] = images[0]
    assert open_source(tmp_path / "one.h5").path(0) == f"{tmp_path}/one.h5::picture"


@pytest.fixture(params=["DICOM", "NIfTI", "HDF5"])
def study(request, tmp_path) -> Path:
    """A folder of 12 images of one kind in two class folders, all grey floats but for the HDF5 ones."""
    root = tmp_path / "study"
    for label in ("ill", "well"):
        if request.param == "DICOM":
            for number in range(6):
                path = dicom("MR_small.dcm", root / label / f"{number}.dcm")
                data = pydicom.dcmread(path)
                data.PixelData = RNG.integers(0, 2000, (64, 64), dtype=np.int16).tobytes()
                data.save_as(path)
        elif request.param == "NIfTI":
            volume(root / label / "head.nii.gz", np.eye(4), (30, 20, 6), np.float32)
        else:
            (root / label).mkdir(parents=True)
            with h5py.File(root / label / "all.h5", "w") as file:
                file["x"] = RNG.random((6, 24, 20), np.float32)
    return root


def test_every_kind_trains_in_one_order_and_is_validated(study, capsys):
    settings = {"image_size": (16, 16), "seed": 3, "threads": 1, "labels": True, "channels": 1}
    settings |= {"mean": [0.5], "std": [0.25]}
    with build_train_loader(study, micro_batch=4, **settings) as loader:
        first, state, after = loader.next_micro_batch(), loader.state_dict(), loader.next_micro_batch()
        assert first.images.shape == (4, 1, 16, 16)
        whole = open_source(study, labels=True)
        assert first.labels.tolist() == [whole.label(index) for index in first.sample_ids.tolist()]
    with build_train_loader(study, micro_batch=2, rank=1, world_size=2, **settings) as loader:
        loader.load_state_dict(state)
        mine = loader.next_micro_batch()
        own = [after.positions.tolist().index(position) for position in mine.positions.tolist()]
        assert mine.images.equal(after.images[own])

    # One file is broken after the fact: a manifest leaves its images out, and is itself a data set.
    report = validate_data(study, channels=1, progress=False)
    assert report.num_images == 12 and not report.bad and report.formats == {"array": 12}
    assert report.overviews[0].counts == {"ill": 6, "well": 6} and len(report.overviews[0].mean) == 1
    bench_loader(study, image_sizes=[(16, 16)], threads=[1], micro_batch=4, seconds=0.05, channels=1)
    assert "data 12 images from 13 " in capsys.readouterr().out
    text = report.manifest.read_text()
    line = next(line for line in text.splitlines() if line.startswith("well/"))
    report.manifest.write_text(text.replace(line, line + "it is blurred"))
    source, listed = open_source(study, labels=True), open_source(report.manifest, labels=True)
    assert source.num_images == listed.num_images == 11 and listed.classes == ["ill", "well"]
    assert [source.path(n) for n in range(11)] == [listed.path(n) for n in range(11)]
    assert load_images([source.path(0), source.path(10)], image_size=(8, 8), channels=1).shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="is an array file; only pictures are re-encoded"):
        prepare_data(study, study.parent / "copy", progress=False)


def test_a_window_by_flag_is_that_of_every_place_without_one(tmp_path, capsys):
    for name in ("a.h5", "b.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            file["x"], file["other"] = RNG.integers(-900, 900, (4, 12, 10), dtype=np.int16), np.zeros((2, 2))
    places = [Path(f"{tmp_path}/a.h5:x"), Path(f"{tmp_path}/b.h5:x,window=0/9"), tmp_path / "b.h5"]
    assert [str(place).removeprefix(f"{tmp_path}/") for place in containers.with_window(places, (40, 400.5))] == [
        "a.h5:x,window=40/400.5", "b.h5:x,window=0/9", "b.h5:window=40/400.5",
    ]  # fmt: skip
    assert containers.with_window(places, ()) == places
    words = [str(places[0]), "--manifest", str(tmp_path / "m.tsv"), "--channels", "1"]
    assert data_commands.validate_data([*words, "--window", "0", "500"]) == 0
    assert "values of the arrays: 0 to 1" in capsys.readouterr().out
    assert ":x,window=0/500::x/3\t" in (tmp_path / "m.tsv").read_text()
    with pytest.raises(UserError, match="window is 0 0: give its centre and its width, above 0"):
        data_commands.validate_data([*words, "--window", "0", "0"])
    with pytest.raises(UserError, match=r"window is \(40.0,\): give its centre and its width"):
        DataConfig(window=(40.0,))
    with pytest.raises(UserError, match="has nothing that 'window=0/500' could choose"):
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "a.png").write_bytes(b"x")
        data_commands.validate_data([str(tmp_path / "p"), "--window", "0", "500"])


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    for name in ("bad.h5", "bad.nii", "bad.nii.gz"):
        (tmp_path / name).write_bytes(b"no such file" * 50)
    (tmp_path / "bad.dcm").write_bytes(b"no such file" * 50)
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3), np.float32), np.eye(4)), tmp_path / "flat.nii")
    with h5py.File(tmp_path / "numbers.h5", "w") as file:
        file["n"] = [1, 2]
    for name, problem in (
        ("bad.h5", "HDF5 file .*bad.h5 cannot be read"),
        ("bad.nii", "NIfTI file .*bad.nii cannot be read"),
        ("bad.nii.gz", "NIfTI file .*bad.nii.gz cannot be read"),
        ("flat.nii", r"holds float32 \[3, 3\]: give real numbers \[X, Y, Z\]"),
        ("numbers.h5", r"has no dataset of images, .* it has n \[2\]"),
        ("", r"holds 1 DICOM files and 2 HDF5 files and 3 NIfTI files: give a folder of one kind"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            open_source(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"none of the first 1 images can be read \(.*bad.dcm: "):
        build_train_loader(tmp_path / "bad.dcm", image_size=(8, 8), micro_batch=1, channels=1)
    with pytest.raises(UserError, match="labels were asked for, but .*bad.dcm has none"):
        open_source(tmp_path / "bad.dcm", labels=True)
    values = volume(tmp_path / "good" / "cut.nii.gz", np.eye(4))
    path = tmp_path / "good" / "cut.nii.gz"
    source = open_source(path)
    path.write_bytes(path.read_bytes()[: -len(values)])
    with pytest.raises(ImageError):
        source.read(0)
    os.unlink(path)
    with pytest.raises(ImageError, match="the file no longer exists"):
        source.read(0)

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(containers.importlib, "import_module", missing)
    for name, package in (("bad.dcm", "pydicom"), ("bad.h5", "h5py"), ("flat.nii", "nibabel")):
        with pytest.raises(UserError, match=rf"need {package} .*: pip install {package} \(in the extra medical"):
            open_source(tmp_path / name)
