"""Radiographs: real DICOMs of every transfer syntax, hostile and damaged files, one geometry, and a cache that survives
being killed."""
import io
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from multiprocessing import parent_process
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from filelock import FileLock
from PIL import Image
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian,
                         JPEG2000Lossless, JPEGBaseline8Bit, JPEGExtended12Bit, RLELossless)

from neural import radiograph
from neural.radiograph import (MAX_PIXELS, RadiographCache, RadiographError, box_mask, cache_radiographs, decode_films,
                               fit_box, fit_mask, fit_square, load_radiograph, patch_coverage, read_mask,
                               read_radiograph, unfit_box)
from neural.study import Box, NeuralError


# drawings

def drawing(rows=120, columns=90, bits=12) -> np.ndarray:
    "A smooth picture whose brightest place is in the middle, as stored numbers; never larger than 7/8 of the depth."
    y, x = np.mgrid[-1:1:rows * 1j, -1:1:columns * 1j]
    return (0.8 * 2**bits * np.exp(-2 * (x**2 + y**2)) + 0.05 * 2**bits).astype(np.uint16 if bits > 8 else np.uint8)


def dataset(pixels, bits=12, syntax=ExplicitVRLittleEndian, **tags) -> pydicom.Dataset:
    "A radiograph as a DICOM data set, with a patient whom no message may name."
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3.4"
    ds.PatientName, ds.PatientID = "Secret^Patient", "SECRET-77"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PixelRepresentation = *pixels.shape[:2], 1, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PhotometricInterpretation = (
        8 * pixels.itemsize, bits, bits - 1, "MONOCHROME2")
    ds.PixelData = pixels.tobytes()
    ds["PixelData"].VR = "OW"
    for key, value in tags.items(): setattr(ds, key, value)
    return ds


def save(path, *args, **tags) -> Path:
    dataset(*args, **tags).save_as(path, enforce_file_format=True)
    return path


def recoded(source, target, syntax) -> Path:
    "The same radiograph in another transfer syntax, by GDCM."
    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return target


def jpeg_of(pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=97)
    return out.getvalue()


def message_of(path, name=None) -> str:
    "The one line a file is refused with."
    with pytest.raises(RadiographError) as caught: read_radiograph(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith((name or Path(path).name) + ": ") and ";" in text, text
    assert "Secret" not in text and "SECRET" not in text
    assert caught.value.__cause__ is None and caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def same_contract(image):
    assert image.dtype == np.float32 and image.ndim == 3 and image.shape[0] == 1
    assert np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1


# real files

REAL = {  # file: shape, and what is dark and bright in it when looked at (row slice, column slice, as shares)
    # air above the shoulder; abdomen under the spine
    "RG1_J2KI.dcm": ((1955, 1841), ((.02, .08), (.93, .99)), ((.75, .95), (.45, .55))),
    "RG1_JLSN.dcm": ((1955, 1841), ((.02, .08), (.93, .99)), ((.75, .95), (.45, .55))),
    # air beside a leg; heel bone
    "RG3_JPLL.dcm": ((1760, 1760), ((.05, .25), (.28, .33)), ((.83, .90), (.43, .50))),
    "RG3_RLE.dcm": ((1760, 1760), ((.05, .25), (.28, .33)), ((.83, .90), (.43, .50))),
    # lung; spine behind the liver
    "gdcm-CR-MONO1-10-chest.dcm": ((440, 440), ((.35, .55), (.15, .30)), ((.85, .95), (.42, .50))),
    "rsna_1517875201.850819.dcm": ((1024, 1024), ((.02, .06), (.02, .10)), ((.80, .92), (.45, .52))),  # air; spine
    # test pattern: black bar, white bar
    "vlut_04.dcm": ((512, 512), ((.72, .78), (.11, .20)), ((.22, .28), (.12, .28))),
}


@pytest.mark.parametrize("name", REAL)
def test_real_dicom(real_data, name):
    shape, dark, bright = REAL[name]
    image = read_radiograph(real_data / "real_cxr_dev/dicom" / name)
    same_contract(image)
    assert image.shape[1:] == shape
    part = lambda share: np.median(
        image[0][tuple(slice(*(int(round(s * n)) for s in pair)) for pair, n in zip(share, shape))])
    assert part(bright) > part(dark) + 0.3, "bone must be bright"
    assert np.ptp(image) > 0.8, "most of the grey scale is used"


def test_two_codings_of_one_real_film_agree(real_data):
    folder = real_data / "real_cxr_dev/dicom"
    # both lossless
    assert np.array_equal(read_radiograph(folder / "RG3_JPLL.dcm"), read_radiograph(folder / "RG3_RLE.dcm"))
    # both lossy
    assert np.abs(read_radiograph(folder / "RG1_J2KI.dcm") - read_radiograph(folder / "RG1_JLSN.dcm")).mean() < 2e-3


def test_real_pictures_and_masks(real_data):
    root = real_data / "real_cxr_dev"
    some = [sorted((root / d).iterdir())[0] for d in ("openi256", "openi_large", "nih1024", "covid_notes")]
    for path in some: same_contract(read_radiograph(path))
    masks = sorted((root / "masks").rglob("*.png")) or sorted(root.rglob("masks/*.png"))
    for path in masks[:5]: assert read_mask(path).dtype == bool and 0 < read_mask(path).mean() < 1


# transfer syntaxes

def test_every_lossless_syntax_gives_the_same_picture(tmp_path):
    plain = save(tmp_path / "plain.dcm", drawing())
    expected = read_radiograph(plain)
    files = [
        recoded(plain, tmp_path / f"{s}.dcm", getattr(gdcm.TransferSyntax, s))
        for s in ("RLELossless", "JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless",
                  "JPEG2000Lossless", "ImplicitVRLittleEndian", "ExplicitVRBigEndian")
    ]
    ds = dataset(drawing())
    ds.compress(JPEG2000Lossless)
    ds.save_as(tmp_path / "j2k.dcm", enforce_file_format=True)
    files.append(tmp_path / "j2k.dcm")
    # without a preamble
    ds = dataset(drawing())
    ds.compress(RLELossless)
    ds.save_as(tmp_path / "bare.dcm")
    files.append(tmp_path / "bare.dcm")
    for path in files: assert np.array_equal(read_radiograph(path), expected), path.name


@pytest.mark.parametrize("kind", ("colour", "planes", "signed", "shallow"))
def test_lossless_syntaxes_keep_colours_and_signs(tmp_path, kind):
    eight, twelve = drawing(60, 50, 8), drawing(60, 50).astype(np.int32)
    colours, colour = np.dstack([eight, np.roll(eight, 7, 0), 255 - eight]), dict(
        SamplesPerPixel=3, PhotometricInterpretation="RGB", Rows=60, Columns=50)
    plain = {
        "colour": lambda f: save(f, colours, 8, **colour, PlanarConfiguration=0),
        "planes": lambda f: save(
            f, np.ascontiguousarray(colours.transpose(2, 0, 1)), 8, **colour, PlanarConfiguration=1),
        "signed": lambda f: save(
            f, (twelve - 2048 & 4095).astype(np.uint16), PixelRepresentation=1, WindowCenter=0, WindowWidth=4096),
        "shallow": lambda f: save(f, eight.astype(np.uint16), 8),
    }[kind](tmp_path / "plain.dcm")
    for s in ("JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"):
        assert np.array_equal(read_radiograph(recoded(plain, tmp_path / f"{s}.dcm", getattr(gdcm.TransferSyntax, s))),
                              read_radiograph(plain)), s


def test_lossy_syntaxes_come_close(tmp_path):
    plain = save(tmp_path / "plain.dcm", drawing())
    for s in ("JPEG2000", "JPEGLSNearLossless"):
        assert (
            np.abs(read_radiograph(recoded(plain, tmp_path / f"{s}.dcm", getattr(gdcm.TransferSyntax, s)))
                   - read_radiograph(plain)).max()
            < 0.01
        )
    eight = drawing(bits=8)
    baseline = save(tmp_path / "baseline.dcm", eight, 8, JPEGBaseline8Bit, PixelData=encapsulate([jpeg_of(eight)]))
    assert np.abs(read_radiograph(baseline)[0] - eight / 255).max() < 0.02
    in_pieces = save(tmp_path / "pieces.dcm", eight, 8, JPEGBaseline8Bit,
                     PixelData=encapsulate([jpeg_of(eight)], fragments_per_frame=4))
    assert np.array_equal(read_radiograph(in_pieces), read_radiograph(baseline))


def test_twelve_bit_extended_jpeg_is_refused_not_guessed(tmp_path):
    path = recoded(
        save(tmp_path / "plain.dcm", drawing()), tmp_path / "extended.dcm", gdcm.TransferSyntax.JPEGExtendedProcess2_4)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == JPEGExtended12Bit
    assert "TransferSyntaxUID JPEG Extended is not read with 12 bits" in message_of(path)


# grey values

@pytest.mark.parametrize("bits", (8, 10, 12, 15, 16))
def test_depths_and_signs(tmp_path, bits):
    pixels = drawing(bits=bits)
    unsigned = read_radiograph(save(tmp_path / "u.dcm", pixels, bits, WindowCenter=2**bits / 2, WindowWidth=2**bits))
    assert np.abs(unsigned[0] - pixels / (2**bits - 1)).max() < 1e-5
    half = pixels.astype(np.int32) - 2**(bits - 1)
    # two's complement in the stored bits, the rest zero
    stored = (half & (2**bits - 1)).astype(pixels.dtype)
    signed = read_radiograph(
        save(tmp_path / "s.dcm", stored, bits, PixelRepresentation=1, WindowCenter=0, WindowWidth=2**bits))
    assert np.abs(signed - unsigned).max() < 1e-5


def test_negative_films_are_turned(tmp_path):
    pixels = drawing()
    window = dict(WindowCenter=1500, WindowWidth=3000)
    positive = read_radiograph(save(tmp_path / "p.dcm", pixels, **window))
    negative = read_radiograph(
        save(tmp_path / "n.dcm", 4095 - pixels, PhotometricInterpretation="MONOCHROME1", WindowCenter=4096 - 1500,
             WindowWidth=3000)
    )
    assert np.abs(positive - negative).max() < 1e-5 and positive[0, 60, 45] > positive[0, 0, 0]


def test_rescale_comes_before_the_window(tmp_path):
    pixels = drawing()
    plain = read_radiograph(save(tmp_path / "a.dcm", pixels, WindowCenter=1500, WindowWidth=3000))
    scaled = read_radiograph(
        save(tmp_path / "b.dcm", pixels, RescaleSlope="2", RescaleIntercept="-1000", WindowCenter=2 * 1500 - 1000,
             WindowWidth=5999)
    )
    assert np.abs(plain - scaled).max() < 1e-3
    falling = read_radiograph(
        save(tmp_path / "c.dcm", 4095 - pixels, RescaleSlope="-1", RescaleIntercept="4095", WindowCenter=1500,
             WindowWidth=3000)
    )
    assert np.abs(plain - falling).max() < 1e-5


def lut(data, first=0, bits=12, packed=True):
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(data) % 65536, first, bits]
    item.LUTData = np.asarray(data, "<u2").tobytes() if packed else list(map(int, data))
    item["LUTData"].VR = "OW" if packed else "US"
    return item


@pytest.mark.parametrize("packed", (True, False))
@pytest.mark.parametrize("syntax", (ExplicitVRLittleEndian, ImplicitVRLittleEndian))
def test_tables(tmp_path, packed, syntax):
    pixels, square = drawing(), (np.arange(4096)**2 / 4095).astype(int)
    image = read_radiograph(
        save(tmp_path / "voi.dcm", pixels, syntax=syntax, VOILUTSequence=[lut(square, packed=packed)], WindowCenter=1,
             WindowWidth=2)
    )
    # the table is preferred to the window
    assert np.abs(image[0] - square[pixels] / 4095).max() < 1e-5
    image = read_radiograph(
        save(tmp_path / "mod.dcm", pixels, syntax=syntax, ModalityLUTSequence=[lut(square, packed=packed)],
             WindowCenter=2048, WindowWidth=4096)
    )
    assert np.abs(image[0] - square[pixels] / 4095).max() < 1e-5
    image = read_radiograph(
        save(tmp_path / "part.dcm", pixels, syntax=syntax,
             VOILUTSequence=[lut(np.arange(1001), first=1000, bits=10, packed=packed)])
    )
    # below and above the table; white is that of its ten bits
    assert np.abs(image[0] - np.clip(pixels.astype(float) - 1000, 0, 1000) / 1023).max() < 1e-5


def test_table_of_65536_entries_and_a_short_one(tmp_path):
    pixels = drawing(bits=16)
    image = read_radiograph(save(tmp_path / "full.dcm", pixels, 16, VOILUTSequence=[lut(np.arange(65536), bits=16)]))
    assert np.abs(image[0] - pixels / 65535).max() < 1e-5
    item = lut(np.arange(100))
    item.LUTDescriptor = [4096, 0, 12]
    assert "VOILUTSequence: LUTData is shorter" in message_of(
        save(tmp_path / "short.dcm", drawing(), VOILUTSequence=[item]))


def test_agrees_with_pydicom_where_both_apply(tmp_path):
    "The one table per file gives what pydicom's own functions give step by step."
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    for n, tags in enumerate((dict(WindowCenter=1800, WindowWidth=900),
                              dict(WindowCenter=1800, WindowWidth=900, VOILUTFunction="SIGMOID"),
                              dict(WindowCenter=1800, WindowWidth=900, VOILUTFunction="LINEAR_EXACT"),
                              dict(VOILUTSequence=[lut(np.arange(4096)[::-1])]))):
        ds = dataset(drawing(), **tags)
        path = tmp_path / f"{n}.dcm"
        ds.save_as(path, enforce_file_format=True)
        theirs = np.asarray(apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds), float) / 4095
        assert np.abs(read_radiograph(path)[0] - theirs).max() < 1e-5, tags


def test_no_window_ignores_a_marker_and_a_constant_is_black(tmp_path):
    pixels = drawing(200, 200)
    pixels[:10, :10] = 4095
    ours = read_radiograph(save(tmp_path / "m.dcm", np.where(pixels == 4095, 4095, pixels // 4).astype(np.uint16)))
    assert ours[0, 100, 100] > 0.95, "the marker took the grey scale"
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        flat = read_radiograph(
            save(tmp_path / f"{kind}.dcm", np.full((20, 30), 700, np.uint16), PhotometricInterpretation=kind))
        same_contract(flat)
        assert np.ptp(flat) == 0
    eight = drawing(bits=8)
    # 8 bits are display values
    assert np.abs(read_radiograph(save(tmp_path / "8.dcm", eight, 8))[0] - eight / 255).max() < 1e-6


def test_padding_is_black_and_sets_no_scale(tmp_path):
    pixels = drawing()
    pixels[:20] = 4095
    image = read_radiograph(save(tmp_path / "pad.dcm", pixels, PixelPaddingValue=4095))
    assert image[0, :20].max() == 0 and image[0, 60, 45] == 1
    pixels = 4095 - pixels
    image = read_radiograph(
        save(tmp_path / "pad1.dcm", pixels, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1"))
    assert image[0, :20].max() == 0 and image[0, 60, 45] == 1


def test_colour_captures_become_luminance(tmp_path):
    eight = drawing(bits=8)
    rgb = np.repeat(eight[..., None], 3, 2)
    image = read_radiograph(
        save(tmp_path / "rgb.dcm", rgb, 8, SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB"))
    same_contract(image)
    assert np.abs(image[0] - eight / 255).max() < 1e-5


@pytest.mark.parametrize(
    "tags, said",
    [(dict(WindowCenter=-30000, WindowWidth=10), "beside all of its pixels"),
     (dict(WindowCenter=100, WindowWidth=0), "WindowWidth 0"),
     (dict(WindowCenter=100, WindowWidth=50, VOILUTFunction="CUBIC"), "VOILUTFunction CUBIC"),
     (dict(NumberOfFrames=2), "NumberOfFrames is 2"), (dict(SamplesPerPixel=4), "SamplesPerPixel is 4"),
     (dict(PhotometricInterpretation="PALETTE COLOR"), "PhotometricInterpretation PALETTE COLOR"),
     (dict(BitsAllocated=32), "BitsAllocated is 32"), (dict(BitsStored=17), "BitsStored is 17"),
     (dict(PixelData=b""), "no pixel data"), (dict(Rows=0), "Rows and Columns"), (dict(Rows=500), "Rows, Columns")],
)
def test_headers_that_promise_something_else(tmp_path, tags, said):
    assert said in message_of(save(tmp_path / "odd.dcm", drawing(), **tags))


# every attribute that could shape the picture

AS = lambda vr, value: (vr, value)      # an attribute written as no library would write it
WIDE = dict(WindowCenter=2048, WindowWidth=4096)
RGB = dict(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)


def film(path, pixels=None, bits=12, syntax=ExplicitVRLittleEndian, **tags) -> Path:
    "A film with a window; None takes an attribute away, a pair is written as it stands."
    ds = dataset(drawing() if pixels is None else pixels, bits, syntax)
    for key, value in {**WIDE, **tags}.items():
        if value is None: ds.pop(key, None)
        elif isinstance(value, tuple):
            ds.add_new(key if isinstance(key, int) else pydicom.datadict.tag_for_keyword(key), *value)
        else: setattr(ds, key, value)
    ds.save_as(path, enforce_file_format="SOPClassUID" in ds)
    return path


def darker(image, base): assert image.mean() < base.mean() - 0.02
def brighter(image, base): assert image.mean() > base.mean() + 0.02
def turned(image, base): assert np.abs(image - (1 - base)).max() < 1e-3
def same(image, base): assert np.abs(image - base).max() < 1e-5


def overlay(bit=15, deep=16): return {0x60000100: AS("US", deep), 0x60000102: AS("US", bit)}


COLOURED = np.repeat(drawing(bits=8)[..., None], 3, 2)
HIGH, MARKED = drawing() << 4, drawing().copy()
MARKED[20:50, 10:60] |= 0x8000
SIGNED = (drawing().astype(np.int16) - 2048).astype(np.uint16)
SQUARED = (np.arange(4096)**2 / 4095).astype(int)
# attribute: (its values and what belongs to them, what comes of it: a look at the picture, or words of the refusal)
CASES = {
    "TransferSyntaxUID": [(dict(syntax=ImplicitVRLittleEndian), same),
                          (dict(syntax="1.2.840.10008.1.2.4.201", PixelData=encapsulate([b"1234"])), "is not read")],
    "Rows": [(dict(Rows=60), "less than PixelData"), (dict(Rows=121), "more than PixelData"),
             (dict(Rows=None), "missing"), (dict(Rows=0), "0 x 90")],
    "Columns": [(dict(Columns=89), "less than PixelData"), (dict(Columns=91), "more than PixelData"),
                (dict(Columns=None), "missing")],
    "NumberOfFrames": [(dict(NumberOfFrames="1"), same), (dict(NumberOfFrames="0"), "is 0"),
                       (dict(NumberOfFrames="2"), "is 2"), (dict(NumberOfFrames=AS("LO", "one")), "not a number")],
    "SamplesPerPixel": [(dict(SamplesPerPixel=None), same), (dict(SamplesPerPixel=0), "is 0"),
                        (dict(SamplesPerPixel=3), "is 3"), (dict(SamplesPerPixel=AS("US", [1, 1])), "2 values")],
    "PhotometricInterpretation": [
        (dict(PhotometricInterpretation="MONOCHROME1"), turned), (dict(PhotometricInterpretation=None), "missing"),
        (dict(PhotometricInterpretation="PALETTE COLOR"), "PALETTE"), (dict(RGB, SamplesPerPixel=1), "RGB"),
        (dict(RGB, pixels=COLOURED, bits=8, PhotometricInterpretation="YBR_RCT"), "YBR_RCT")],
    "PlanarConfiguration": [(dict(RGB, pixels=COLOURED, bits=8, PlanarConfiguration=2), "is 2"),
                            (dict(RGB, pixels=COLOURED, bits=8, PlanarConfiguration=None), "missing")],
    "BitsAllocated": [(dict(BitsAllocated=8, BitsStored=8, HighBit=7), "less than PixelData"),
                      (dict(BitsAllocated=32), "is 32"), (dict(BitsAllocated=None), "missing"),
                      (dict(BitsAllocated=12), "is 12")],
    "BitsStored": [(dict(BitsStored=17), "is 17"), (dict(BitsStored=0), "is 0"), (dict(BitsStored=None), "missing"),
                   (dict(BitsStored=10, HighBit=9), "belong to the picture"), (dict(BitsStored=16, HighBit=15), same)],
    "HighBit": [(dict(pixels=HIGH, HighBit=15), same), (dict(HighBit=None), same), (dict(HighBit=15), "beside these"),
                (dict(HighBit=10), "impossible"), (dict(HighBit=16), "impossible")],
    "PixelRepresentation": [(dict(pixels=SIGNED, PixelRepresentation=1, WindowCenter=0), same),
                            (dict(pixels=SIGNED), "carry a sign"), (dict(PixelRepresentation=None), "missing"),
                            (dict(PixelRepresentation=2), "is 2")],
    "PixelPaddingValue": [
        (dict(PixelPaddingValue=4095), same),
        (dict(PixelPaddingValue=int(drawing()[60, 45])),
         lambda i, b: same(np.where(drawing() == drawing()[60, 45], b, i), b) or same(i[i == 0], 0)
         or same(i[0, 60, 45], 0),),
        (dict(pixels=SIGNED, PixelRepresentation=1, WindowCenter=0, PixelPaddingValue=AS("US", 65536 - 2048)), same),
        (dict(PixelPaddingValue=AS("LO", "a")), "not a number"),
        (dict(PixelPaddingValue=0, PixelPaddingRangeLimit=4095), "whole picture"),
        (dict(pixels=MARKED, PixelPaddingValue=int(MARKED[30, 30])), "does not fit"),
    ],
    "PixelPaddingRangeLimit": [(dict(PixelPaddingValue=0, PixelPaddingRangeLimit=1500), darker),
                               (dict(PixelPaddingValue=1500, PixelPaddingRangeLimit=0), darker),
                               (dict(PixelPaddingRangeLimit=7), "PixelPaddingValue")],
    "ModalityLUTSequence": [(dict(ModalityLUTSequence=[lut(SQUARED)]), darker),
                            (dict(ModalityLUTSequence=[lut(SQUARED)], RescaleSlope="2"), "exclude"),
                            (dict(ModalityLUTSequence=[pydicom.Dataset()]), "LUTDescriptor"),
                            (dict(ModalityLUTSequence=[]), same)],
    "RescaleSlope": [(dict(RescaleSlope="0.5"), darker), (dict(RescaleSlope="-1", RescaleIntercept="4095"), turned),
                     (dict(RescaleSlope="0"), "zero"), (dict(RescaleSlope=AS("LO", "NaN")), "finite"),
                     (dict(RescaleSlope=AS("LO", "1,5")), "not a number"), (dict(RescaleSlope="1"), same)],
    "RescaleIntercept": [(dict(RescaleIntercept="-400"), darker), (dict(RescaleIntercept=AS("LO", "inf")), "finite"),
                         (dict(RescaleIntercept=AS("LO", "-1,0")), "not a number"), (dict(RescaleIntercept="0"), same)],
    "VOILUTSequence": [(dict(VOILUTSequence=[lut(SQUARED)]), darker),
                       (dict(VOILUTSequence=[lut(SQUARED), lut(SQUARED[::-1])]), darker),
                       (dict(VOILUTSequence=[lut([7] * 4096)]), "beside"),
                       (dict(VOILUTSequence=[lut(SQUARED, bits=40)]), "40 bits"), (dict(VOILUTSequence=[]), same)],
    "WindowCenter": [(dict(WindowCenter=3000), darker), (dict(WindowCenter=[2048, 9]), same),
                     (dict(WindowCenter=None), "missing"), (dict(WindowCenter=AS("LO", "2047,5")), "not a number"),
                     (dict(WindowCenter=AS("LO", "NaN")), "finite"), (dict(WindowCenter=-9000), "beside")],
    "WindowWidth": [(dict(WindowWidth=[4096, 9]), same), (dict(WindowCenter=1000, WindowWidth=200), brighter),
                    (dict(WindowWidth=0), "no LINEAR window"), (dict(WindowWidth=-5), "no LINEAR window"),
                    (dict(WindowWidth=None), "missing"), (dict(WindowWidth=AS("LO", "4096,0")), "not a number")],
    "VOILUTFunction": [(dict(VOILUTFunction="LINEAR"), same), (dict(VOILUTFunction="SIGMOID"), brighter),
                       (dict(VOILUTFunction="CUBIC"), "CUBIC"), (dict(VOILUTFunction=AS("LO", "a b^c")), "no code")],
    "OverlayBitPosition": [(dict(overlay(), pixels=MARKED), same), (dict(pixels=MARKED), same),
                           (dict(overlay(5)), "inside"), (dict(overlay(0, 1)), same)],
    "PixelData": [(dict(PixelData=None), "no pixel data"), (dict(PixelData=b""), "no pixel data")],
    "SOPClassUID": [(dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1"), same),
                    (dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.2"), "CT"),
                    (dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.11.1", PixelData=None), "Presentation State"),
                    (dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1.1"), "Processing")],
    "Modality": [(dict(Modality="DX"), same), (dict(Modality=""), same), (dict(Modality="CT"), "CT"),
                 (dict(Modality="MG"), "MG")],
    "PresentationIntentType": [(dict(PresentationIntentType="FOR PRESENTATION"), same),
                               (dict(PresentationIntentType="FOR PROCESSING"), "raw")],
    "PresentationLUTShape": [
        (dict(PresentationLUTShape="IDENTITY"), same),
        (dict(PresentationLUTShape="INVERSE", PhotometricInterpretation="MONOCHROME1"), turned),
        (dict(PresentationLUTShape="INVERSE"), "contradict"),
        (dict(PresentationLUTShape="IDENTITY", PhotometricInterpretation="MONOCHROME1"), "contradict"),
        (dict(PresentationLUTShape="LIN OD"), "contradict")],
    "PresentationLUTSequence": [(dict(PresentationLUTSequence=[lut(SQUARED)]), "not supported"), ({}, same)],
    "PatientOrientation": [
        (dict(PatientOrientation=["L", "F"]), same), (dict(PatientOrientation=["AL", "FL"]), same),
        (dict(PatientOrientation=""), same), (dict(PatientOrientation=["R", "F"]), "exchanged"),
        (dict(PatientOrientation=["L", "H"]), "head"), (dict(PatientOrientation=["F", "R"]), "side")],
    "BodyPartExamined": [(dict(BodyPartExamined="EXTREMITY", PatientOrientation=["R", "F"]), same),
                         (dict(BodyPartExamined="CHEST"), same),
                         (dict(BodyPartExamined="CHEST", PatientOrientation=["R", "F"]), "PatientOrientation")],
    "PixelAspectRatio": [(dict(PixelAspectRatio=["1", "1"]), same), (dict(PixelAspectRatio=["5", "4"]), "not square")],
    "PixelSpacing": [(dict(PixelSpacing=["0.1", "0.1"]), same), (dict(PixelSpacing=["0", "0"]), same),
                     (dict(PixelSpacing=["0.1", "0.2"]), "not square"),
                     (dict(PixelSpacing=AS("LO", ["0,1", "0,1"])), "not a number")],
    "ImagerPixelSpacing": [(dict(ImagerPixelSpacing=["0.168", "0.1681"]), same),
                           (dict(ImagerPixelSpacing=["0.3", "0.1"]), "not square")],
    "NominalScannedPixelSpacing": [(dict(NominalScannedPixelSpacing=["0.1", "0.1"]), same),
                                   (dict(NominalScannedPixelSpacing=["0.1", "0.11"]), "not square")],
    "SharedFunctionalGroupsSequence": [(dict(SharedFunctionalGroupsSequence=[pydicom.Dataset()]), "not supported"),
                                       ({}, same)],
    "PerFrameFunctionalGroupsSequence": [(dict(PerFrameFunctionalGroupsSequence=[pydicom.Dataset()]), "not supported"),
                                         ({}, same)],
    "FloatPixelData": [(dict(FloatPixelData=bytes(4 * 120 * 90), PixelData=None), "not supported"), ({}, same)],
    "DoubleFloatPixelData": [(dict(DoubleFloatPixelData=bytes(8 * 120 * 90), PixelData=None), "not supported"),
                             ({}, same)],
    "PixelDataProviderURL": [(dict(PixelDataProviderURL="https://somewhere", PixelData=None), "not supported"),
                             ({}, same)],
    "RescaleType": [(dict(RescaleType="OD"), same)],
    "WindowCenterWidthExplanation": [(dict(WindowCenterWidthExplanation="HARD"), same)],
    "LUTExplanation": [(dict(LUTExplanation="a table"), same)],
    "SmallestImagePixelValue": [(dict(SmallestImagePixelValue=4000), same)],
    "LargestImagePixelValue": [(dict(LargestImagePixelValue=1), same)],
    "PixelIntensityRelationship": [(dict(PixelIntensityRelationship="LOG"), same)],
    "PixelIntensityRelationshipSign": [(dict(PixelIntensityRelationshipSign=-1), same)],
    "LossyImageCompression": [(dict(LossyImageCompression="01"), same)],
    "LossyImageCompressionRatio": [(dict(LossyImageCompressionRatio="90"), same)],
    "LossyImageCompressionMethod": [(dict(LossyImageCompressionMethod="ISO_10918_1"), same)],
    "BurnedInAnnotation": [(dict(BurnedInAnnotation="YES"), same)],
    "OverlayData": [(
        {0x60003000: AS("OW", b"\xff" * 1350), 0x60000010: AS("US", 120), 0x60000011: AS("US", 90), **overlay(0, 1)},
        same)],
    "ShutterShape": [(dict(ShutterShape="RECTANGULAR", ShutterLeftVerticalEdge=20), same)],
    "ShutterPresentationValue": [(dict(ShutterPresentationValue=65535), same)],
    "FieldOfViewRotation": [(dict(FieldOfViewRotation="90"), same)],
    "FieldOfViewHorizontalFlip": [(dict(FieldOfViewHorizontalFlip="YES"), same)],
    "ViewPosition": [(dict(ViewPosition="LL"), same)],
    "ImageLaterality": [(dict(ImageLaterality="R"), same)],
    "ImageType": [(dict(ImageType=["DERIVED", "SECONDARY"]), same)],
    "ICCProfile": [(dict(ICCProfile=b"abcd"), same)],
    "PixelPresentation": [(dict(PixelPresentation="COLOR"), same)],
    "ReferencedPresentationStateSequence": [(dict(ReferencedPresentationStateSequence=[pydicom.Dataset()]), same)],
    "ConversionType": [(dict(ConversionType="DF"), same)],
}


@pytest.mark.parametrize("key", [*radiograph.READ, *radiograph.REFUSED, *radiograph.IRRELEVANT])
def test_every_attribute_does_what_its_row_says(tmp_path, key):
    base, seen = read_radiograph(film(tmp_path / "base.dcm")), set()
    for n, (tags, said) in enumerate(CASES[key]):
        path = (film(tmp_path / f"{n}.dcm", **{k: v for k, v in tags.items() if isinstance(k, str)})
                if not any(isinstance(k, int) for k in tags) else film_with(tmp_path / f"{n}.dcm", tags))
        if callable(said):
            said(read_radiograph(path), base)
            seen.add("same" if said is same else "read")
            continue
        told = message_of(path)
        seen.add("refused")
        assert (said in told and ("PatientOrientation" if key == "BodyPartExamined" else key) in told
                and "copy the file" not in told), told
    if key in radiograph.REFUSED:
        assert seen >= {"refused", "same"}
    elif key in radiograph.READ:
        assert seen & {"read", "refused"}
    else:
        assert seen == {"same"}


def film_with(path, tags) -> Path:
    "A film with attributes that have a number for a name."
    film(path, **{k: v for k, v in tags.items() if isinstance(k, str)})
    ds = pydicom.dcmread(path)
    for tag, value in tags.items():
        if isinstance(tag, int): ds.add_new(tag, *value)
    ds.save_as(path)
    return path


def test_the_table_and_its_cases_are_one():
    assert set(CASES) == {*radiograph.READ, *radiograph.REFUSED, *radiograph.IRRELEVANT}


CODED = ("JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless")


def compressed(path, target, syntax) -> Path:
    "A film recoded with all the bits of its words, and then the depth that its header had."
    ds = pydicom.dcmread(path)
    depth = {k: ds[k].value for k in ("BitsStored", "HighBit", "PixelRepresentation")}
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = ds.BitsAllocated, ds.BitsAllocated - 1, 0
    ds.save_as(target)
    ds = pydicom.dcmread(recoded(target, target, getattr(gdcm.TransferSyntax, syntax)))
    for key, value in depth.items(): setattr(ds, key, value)
    ds.save_as(target)
    return target


@pytest.mark.parametrize("syntax", CODED)
@pytest.mark.parametrize(
    "kind", ("overlay", "announced", "high", "signed", "wrong depth", "wrong sign", "wrong high bit"))
def test_plain_and_compressed_films_agree_on_their_bits(tmp_path, kind, syntax):
    tags = {"overlay": dict(pixels=MARKED), "announced": dict(overlay(), pixels=MARKED),
            "high": dict(pixels=HIGH, HighBit=15),
            "signed": dict(pixels=SIGNED, PixelRepresentation=1, WindowCenter=0), "wrong depth": dict(bits=9),
            "wrong sign": dict(pixels=SIGNED), "wrong high bit": dict(HighBit=15)}[kind]
    plain = film_with(tmp_path / "plain.dcm", tags)
    coded = compressed(plain, tmp_path / "coded.dcm", syntax)
    if not kind.startswith("wrong"):
        assert np.array_equal(read_radiograph(plain), read_radiograph(film(tmp_path / "base.dcm"))) and np.array_equal(
            read_radiograph(coded), read_radiograph(plain))
        return
    key = {"wrong depth": "BitsStored", "wrong sign": "PixelRepresentation", "wrong high bit": "HighBit"}[kind]
    assert key in message_of(plain) and key in message_of(coded)


def test_a_picture_inside_that_contradicts_its_header(tmp_path):
    twice = dataset(drawing())
    twice.compress(JPEG2000Lossless)
    frame = get_frame(twice.PixelData, 0, number_of_frames=1)
    for n, (tags, said) in enumerate((
        (dict(PixelData=encapsulate([frame, frame])), "NumberOfFrames"), (dict(Rows=121), "Rows, Columns"),
        (dict(BitsAllocated=8, BitsStored=8, HighBit=7), "BitsAllocated"),
        (dict(PixelRepresentation=1, BitsStored=16, HighBit=15), "PixelRepresentation is 1"))):
        ds = dataset(drawing(), syntax=JPEG2000Lossless, PixelData=encapsulate([frame]))
        for key, value in tags.items(): setattr(ds, key, value)
        ds.save_as(tmp_path / f"{n}.dcm", enforce_file_format=True)
        assert said in (told := message_of(tmp_path / f"{n}.dcm")) and "copy the file" not in told
    signed = bytearray(frame)
    signed[42] |= 128
    dataset(drawing(), syntax=JPEG2000Lossless, PixelData=encapsulate([bytes(signed)])).save_as(
        tmp_path / "s.dcm", enforce_file_format=True)
    assert "PixelRepresentation is 0" in message_of(tmp_path / "s.dcm")
    for syntax in (JPEGBaseline8Bit, RLELossless):
        dataset(drawing(), syntax=syntax, PixelData=encapsulate([frame])).save_as(
            tmp_path / "t.dcm", enforce_file_format=True)
        assert "copy the file" not in message_of(tmp_path / "t.dcm")
    segments = dataset(drawing())
    segments.compress(RLELossless)
    for tags, said in ((dict(BitsAllocated=8, BitsStored=8, HighBit=7), "2"), (dict(Rows=60), "less than"),
                       (dict(Rows=200), "more than")):
        for key, value in tags.items(): setattr(segments, key, value)
        segments.save_as(tmp_path / "r.dcm", enforce_file_format=True)
        assert said in (told := message_of(tmp_path / "r.dcm")) and "copy the file" not in told
        segments.Rows, segments.BitsAllocated, segments.BitsStored, segments.HighBit = 120, 16, 12, 11


@pytest.mark.parametrize(
    "kind", ("big endian", "big endian, 8 bits in words", "big endian, table", "big endian, padding"))
def test_big_endian_films(tmp_path, kind):
    tags = {
        "big endian": {}, "big endian, table": dict(VOILUTSequence=[lut(SQUARED, packed=False)]),
        "big endian, padding": dict(PixelPaddingValue=int(drawing()[0, 0])),
        "big endian, 8 bits in words": dict(pixels=drawing(bits=8), bits=8, WindowCenter=128, WindowWidth=256)}[kind]
    plain = film(tmp_path / "plain.dcm", **tags)
    assert np.array_equal(
        read_radiograph(recoded(plain, tmp_path / "big.dcm", gdcm.TransferSyntax.ExplicitVRBigEndian)),
        read_radiograph(plain))


@pytest.mark.parametrize("told", ("RGB", "YBR_FULL", "YBR_FULL_422"))
@pytest.mark.parametrize("written", ("JFIF", "Adobe RGB", "named RGB", "numbered RGB"))
def test_a_jpeg_in_colour_is_read_by_what_it_says_of_itself(tmp_path, told, written):
    "Red, green and blue that are not alike: a second change of colours, or a forgotten one, moves the luminance."
    eight = drawing(bits=8)
    colours = np.dstack([eight, 255 - eight, np.roll(eight, 20, 0)])
    out = io.BytesIO()
    Image.fromarray(colours).save(
        out, "JPEG", quality=98, subsampling=0, **({} if written == "JFIF" else dict(keep_rgb=True)))
    data = out.getvalue()
    if written.endswith("ed RGB"):
        at = data.index(b"\xff\xee")
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2:at + 4], "big"):]
    if written == "numbered RGB":
        data = bytearray(data)
        frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
        for n in range(3): data[frame + 10 + 3 * n] = data[scan + 5 + 2 * n] = n + 1
    path = save(tmp_path / "c.dcm", colours, 8, JPEGBaseline8Bit, PixelData=encapsulate([bytes(data)]),
                SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation=told)
    # nothing in it says otherwise
    if written == "numbered RGB" and told != "RGB": return same_contract(read_radiograph(path))
    assert np.abs(read_radiograph(path)[0] - colours @ [.299, .587, .114] / 255).max() < 0.03


def test_a_file_that_cannot_be_opened_gives_the_systems_reason(tmp_path, monkeypatch):
    path = save(tmp_path / "a.dcm", drawing())
    for error, said in ((PermissionError(13, "Permission denied"), "Permission denied; ask its owner"),
                        (OSError(5, "Input/output error"), "Input/output error; the disk"),
                        (MemoryError(), "memory ran out")):
        def fail(*_, error=error, **__): raise error
        monkeypatch.setattr(radiograph, "open", fail, raising=False)
        with pytest.raises(radiograph.MachineError, match=said) as caught: read_radiograph(path)
        assert "copy the file" not in str(caught.value)


# hostile and damaged files

def peak_of(call) -> int:
    tracemalloc.start()
    try: call()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_absurd_dimensions_are_refused_before_allocation(tmp_path):
    eight, small = drawing(bits=8), 20 * 2**20
    huge = save(tmp_path / "huge.dcm", drawing(), Rows=65535, Columns=65535)
    assert peak_of(lambda: message_of(huge)) < small
    # the codestream lies, not the header
    inner = bytearray(jpeg_of(eight))
    at = inner.index(b"\xff\xc0")
    inner[at + 5:at + 9] = b"\xff\xff\xff\xff"
    assert (
        peak_of(
            lambda: message_of(
                save(tmp_path / "inner.dcm", eight, 8, JPEGBaseline8Bit, PixelData=encapsulate([bytes(inner)])))
        )
        < small
    )
    ds = dataset(drawing())
    ds.compress(JPEG2000Lossless)
    j2k = bytearray(get_frame(ds.PixelData, 0, number_of_frames=1))
    j2k[8:16] = struct.pack(">2L", 2**30, 2**30)
    ds.PixelData = encapsulate([bytes(j2k)])
    ds.save_as(tmp_path / "j2k.dcm", enforce_file_format=True)
    assert peak_of(lambda: message_of(tmp_path / "j2k.dcm")) < small


def test_headers_that_make_a_decoder_abort_the_process_are_refused_first(tmp_path):
    "GDCM ends the process on these two; if the look before decoding went, this test would not even fail, it would die."
    path = recoded(save(tmp_path / "plain.dcm", drawing()), tmp_path / "ls.dcm", gdcm.TransferSyntax.JPEGLSLossless)
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xf7")
    data[at + 4] = 234
    path.write_bytes(data)
    assert "234 bits" in message_of(path)
    path = recoded(tmp_path / "plain.dcm", tmp_path / "ll.dcm", gdcm.TransferSyntax.JPEGLosslessProcess14_1)
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc4")
    data[at] = 1
    path.write_bytes(data)
    assert "the picture inside 0 x 0" in message_of(path)


def test_bombs_of_every_kind(tmp_path, monkeypatch):
    small = 20 * 2**20
    # PNG, 20,000 x 20,000, 1 bit, some kilobytes
    row = b"\x00" * (1 + 20_000 // 8)
    chunk = lambda kind, data: struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
    png = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2L5B", 20_000, 20_000, 1, 0, 0, 0, 0))
           + chunk(b"IDAT", zlib.compress(row * 20_000)) + chunk(b"IEND", b""))
    (tmp_path / "bomb.png").write_bytes(png)
    assert len(png) < 100_000 and peak_of(lambda: message_of(tmp_path / "bomb.png")) < small
    assert 20_000**2 > MAX_PIXELS
    deflated = save(tmp_path / "deflated.dcm", np.zeros((2000, 2000), np.uint16), syntax=DeflatedExplicitVRLittleEndian)
    assert peak_of(lambda: message_of(deflated)) < small
    # so that a small file is a long one
    monkeypatch.setattr(radiograph, "MAX_BYTES", 2**20)
    # 40 kB that unpack to 2.5 MB
    runs = struct.pack("<16L", 1, 64, *[0] * 14) + bytes([129, 0]) * 20_000
    rle = save(tmp_path / "runs.dcm", drawing(bits=8), 8, RLELossless, PixelData=encapsulate([runs]))
    assert "less than PixelData holds" in message_of(rle)
    (tmp_path / "long.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2**20))
    assert "larger than" in message_of(tmp_path / "long.png")


def test_cut_files_are_refused_at_every_length(tmp_path):
    plain = save(tmp_path / "plain.dcm", drawing())
    eight = drawing(bits=8)
    Image.fromarray(eight).save(tmp_path / "a.png")
    (tmp_path / "a.jpg").write_bytes(jpeg_of(eight))
    files = [plain, tmp_path / "a.png", tmp_path / "a.jpg"] + [
        recoded(plain, tmp_path / f"{s}.dcm", getattr(gdcm.TransferSyntax, s))
        for s in ("JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless")]
    for path in files:
        whole = path.read_bytes()
        cut = tmp_path / f"cut{path.suffix}"
        for share in (0, .01, .1, .4, .6, .9):
            cut.write_bytes(whole[:int(share * len(whole))])
            message_of(cut)


def test_a_compressed_picture_cut_inside_a_whole_file(tmp_path):
    plain = save(tmp_path / "plain.dcm", drawing())
    for s in ("JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"):
        ds = pydicom.dcmread(recoded(plain, tmp_path / "x.dcm", getattr(gdcm.TransferSyntax, s)))
        ds.PixelData = encapsulate([get_frame(ds.PixelData, 0, number_of_frames=1)[:-800]])
        ds.save_as(tmp_path / "cut.dcm")
        message_of(tmp_path / "cut.dcm")


def grain(bits=8) -> np.ndarray:
    "A drawing with grain, so that its data are spread over the file as a film's are."
    return drawing(300, 260, bits) + np.random.default_rng(0).integers(0, 2 ** (bits - 4), (300, 260)).astype(
        np.uint16 if bits > 8 else np.uint8)


def half_of(jpeg: bytes, share: float) -> bytes:
    "A JPEG that broke off, and was given an end mark."
    assert jpeg.rstrip(b"\0").endswith(b"\xff\xd9")
    return jpeg[:int(share * len(jpeg))].rstrip(b"\xff") + b"\xff\xd9"


def jpeg_with(pixels, **how) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **how)
    return out.getvalue()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize(
    "how", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 7}, {"optimize": True}])
@pytest.mark.parametrize("colour", [False, True])
def test_half_a_jpeg_with_an_end_mark_is_no_whole_one(tmp_path, how, colour, share):
    pixels = np.stack([grain()] * 3, -1) if colour else grain()
    whole = jpeg_with(pixels, **how)
    (tmp_path / "whole.jpg").write_bytes(whole)
    read_radiograph(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes(half_of(whole, share))
    assert (message_of(tmp_path / "half.jpg")
            == "half.jpg: the JPEG ends before its picture does; copy the file again or leave it out")
    photo = "YBR_FULL_422" if colour else "MONOCHROME2"
    # not what the syntax stands for
    if "progressive" in how: return
    for frame, right in ((whole, True), (half_of(whole, share), False)):
        path = save(tmp_path / "x.dcm", pixels, 8, JPEGBaseline8Bit, PixelData=encapsulate([frame]),
                    PhotometricInterpretation=photo, SamplesPerPixel=3 if colour else 1, PlanarConfiguration=0)
        if right:
            read_radiograph(path)
        else:
            assert (
                message_of(path) == "x.dcm: PixelData ends before its picture does; copy the file again or leave it out"
            )


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize(
    "kind", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "JPEG2000"])
def test_half_a_compressed_picture_with_an_end_mark_is_no_whole_one(tmp_path, kind, share):
    ds = pydicom.dcmread(
        recoded(save(tmp_path / "plain.dcm", grain(12)), tmp_path / "x.dcm", getattr(gdcm.TransferSyntax, kind)))
    read_radiograph(tmp_path / "x.dcm")
    ds.PixelData = encapsulate([half_of(get_frame(ds.PixelData, 0, number_of_frames=1).rstrip(b"\0"), share)])
    ds.save_as(tmp_path / "half.dcm")
    message_of(tmp_path / "half.dcm")


@pytest.mark.parametrize("grey", [127, 128])
def test_a_jpeg_that_ends_in_middle_grey_by_itself_is_whole(tmp_path, grey):
    pixels = grain()
    pixels[-40:] = grey
    for how in ({}, {"progressive": True}, {"restart_marker_rows": 2}):
        # and bytes behind its end
        (tmp_path / "a.jpg").write_bytes(jpeg_with(pixels, **how) + bytes(7))
        assert abs(read_radiograph(tmp_path / "a.jpg")[0, -1, -1] - grey / 255) < 3e-3
    lossless = save(tmp_path / "b.dcm", np.full((64, 48), 2048, np.uint16))
    read_radiograph(recoded(lossless, tmp_path / "c.dcm", gdcm.TransferSyntax.JPEGLosslessProcess14_1))


def test_a_small_picture_inside_another_s_header_is_not_where_it_ends(tmp_path):
    # with scan and end mark of its own
    thumbnail = b"Exif\0\0" + jpeg_with(grain()[:16, :16])
    whole = jpeg_with(grain())
    whole = whole[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail + whole[2:]
    (tmp_path / "a.jpg").write_bytes(whole)
    read_radiograph(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(half_of(whole, .7))
    assert "ends before its picture does" in message_of(tmp_path / "a.jpg")


def test_what_is_no_radiograph_at_all(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"DICM" * 100)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "c.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "d.dcm").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "e.gif").write_bytes(b"GIF89a" + bytes(50))
    (tmp_path / "f.dcm").mkdir()
    # would wait for ever if it were opened
    os.mkfifo(tmp_path / "g.dcm")
    for path in sorted(tmp_path.iterdir()): message_of(path)
    message_of(tmp_path / "nowhere.dcm")


def mutants(data: bytes, rng: random.Random, n: int):
    for _ in range(n):
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 10))):
            # half of them in the header
            at = rng.randrange(len(out)) if rng.random() < .5 else rng.randrange(min(len(out), 1400))
            how = rng.random()
            if how < .5: out[at] = rng.randrange(256)
            elif how < .7: out[at:at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(1, 9))
            elif how < .85: del out[at:at + rng.randrange(1, 64)]
            else: out[at:at + 4] = b"\xff\xff\xff\xff"
            if len(out) < 200: break
        yield bytes(out)


@pytest.mark.parametrize("seed", range(2))
def test_mutated_files_are_read_or_refused(tmp_path, seed):
    """Whatever happens to a file's bytes, it is read under the contract or refused with a RadiographError; each in a
    worker, for a decoder may crash."""
    rng, eight = random.Random(seed), drawing(60, 50, 8)
    plain = save(tmp_path / "plain.dcm", drawing(60, 50), WindowCenter=1500, WindowWidth=3000)
    files = [
        plain,
        save(tmp_path / "tables.dcm", drawing(60, 50), VOILUTSequence=[lut(np.arange(64) * 64)],
             RescaleSlope="0.015625", RescaleIntercept="0"),
        save(tmp_path / "base.dcm", eight, 8, JPEGBaseline8Bit, PixelData=encapsulate([jpeg_of(eight)])),
    ]
    files += [
        recoded(plain, tmp_path / f"{s}.dcm", getattr(gdcm.TransferSyntax, s))
        for s in ("JPEG2000Lossless", "JPEGLSLossless", "JPEGLosslessProcess14_1", "RLELossless",
                  "ImplicitVRLittleEndian")
    ]
    Image.fromarray(eight).save(tmp_path / "a.png")
    Image.fromarray(drawing(60, 50)).save(tmp_path / "b.png")
    (tmp_path / "c.jpg").write_bytes(jpeg_of(eight))
    files += [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.jpg"]
    jobs = []
    for path in files:
        for n, data in enumerate(mutants(path.read_bytes(), rng, 20)):
            jobs.append((len(jobs), tmp_path / f"{path.stem}-{n}.bin"))
            jobs[-1][1].write_bytes(data)
    # anything but a RadiographError would surface here
    results = dict(decode_films(jobs, 32, workers=2))
    assert len(results) == len(jobs) >= 200
    read = [r for r in results.values() if not isinstance(r, str)]
    assert 20 < len(read) < len(jobs) - 20
    assert all(r.shape == (32, 32) and r.dtype == np.uint8 for r in read)
    assert not [r for r in results.values() if isinstance(r, str) and ("\n" in r or "Secret" in r or "SECRET" in r)]


# PNG and JPEG

def test_pictures_of_eight_and_sixteen_bits(tmp_path):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    sixteen = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for name, pixels, scale in (("8.png", eight, 255), ("16.png", sixteen, 65535), ("12.png", sixteen[:16], 4095)):
        Image.fromarray(pixels).save(tmp_path / name)
        image = read_radiograph(tmp_path / name)
        same_contract(image)
        assert np.abs(image[0] - pixels / scale).max() < 1e-6
    for mode in ("RGB", "RGBA", "LA", "P", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(eight).convert("RGB" if mode == "CMYK" else mode).convert(mode).save(
            tmp_path / f"{mode}.{suffix}", **(dict(quality=100) if suffix == "jpg" else {}))
        image = read_radiograph(tmp_path / f"{mode}.{suffix}")
        same_contract(image)
        assert np.abs(image[0] - eight / 255).max() < 0.03, mode
    Image.fromarray(eight > 127).save(tmp_path / "1.png")
    assert set(np.unique(read_radiograph(tmp_path / "1.png"))) == {0, 1}
    Image.fromarray(np.zeros((9, 7), np.uint16)).save(tmp_path / "0.png")
    assert read_radiograph(tmp_path / "0.png").max() == 0


@pytest.mark.parametrize("kind", ("JPEG", "PNG"))
@pytest.mark.parametrize("orientation", (0, 1, 2, 3, 4, 5, 6, 7, 8, 9))
def test_a_turned_picture_is_seen_as_viewers_show_it(tmp_path, kind, orientation):
    "Pillow's own turn is the judge; what is mirrored is refused, an orientation that does not exist is none."
    from PIL import ImageOps
    upright = np.zeros((40, 60), np.uint8)
    upright[5:15, 8:40] = 200
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / f"a.{kind.lower()}"
    Image.fromarray(upright).save(path, kind, exif=exif, **(dict(quality=100) if kind == "JPEG" else {}))
    if orientation in (2, 4, 5, 7):
        assert "EXIF orientation" in (told := message_of(path)) and "copy the file" not in told
        return
    with Image.open(path) as im: expected = np.asarray(ImageOps.exif_transpose(im), np.float32) / 255
    assert np.array_equal(read_radiograph(path)[0], expected) and read_radiograph(path).shape[1:] == (
        (60, 40) if orientation in (6, 8) else (40, 60))


def test_pictures_that_would_be_read_as_something_else(tmp_path):
    import imagecodecs
    eight, sixteen = drawing(bits=8), drawing(bits=12)
    Image.fromarray(eight).save(tmp_path / "apng.png", save_all=True, append_images=[Image.fromarray(255 - eight)])
    for name, pixels in (("deep.png", np.dstack([sixteen] * 3)),
                         ("clear.png", np.dstack([sixteen, sixteen * 0 + 65535]))):
        (tmp_path / name).write_bytes(imagecodecs.png_encode(pixels))
    (tmp_path / "twelve.jpg").write_bytes(imagecodecs.jpeg8_encode(sixteen, bitspersample=12))
    (tmp_path / "lossless.jpg").write_bytes(imagecodecs.jpeg8_encode(sixteen, lossless=True, bitspersample=12))
    (tmp_path / "ls.jpg").write_bytes(imagecodecs.jpegls_encode(sixteen))
    out = io.BytesIO()
    Image.fromarray(eight).convert("RGB").convert("CMYK").save(out, "JPEG")
    ink = out.getvalue()
    at = ink.index(b"\xff\xee")
    (tmp_path / "ink.jpg").write_bytes(ink[:at] + ink[at + 2 + int.from_bytes(ink[at + 2:at + 4], "big"):])
    for name, said in (("apng.png", "2 pictures"), ("deep.png", "16 bits in colour"), ("clear.png", "transparency"),
                       ("twelve.jpg", "12 bits"), ("lossless.jpg", "coding that is not read"),
                       ("ls.jpg", "coding that is not read"), ("ink.jpg", "CMYK")):
        told = message_of(tmp_path / name)
        assert said in told and "copy the file" not in told, told


def test_interlaced_pictures_and_a_colour_that_is_transparent(tmp_path):
    eight = drawing(16, 16, 8)
    chunk = lambda kind, data: struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
    rows = b"".join(
        b"\0" + eight[y::dy, x::dx][r].tobytes()
        for x, y, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
                             (0, 1, 1, 2))
        for r in range(len(eight[y::dy]))
    )
    (tmp_path / "adam7.png").write_bytes(b"\x89PNG\r\n\x1a\n"
                                         + chunk(b"IHDR", struct.pack(">2L5B", 16, 16, 8, 0, 0, 0, 1))
                                         + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert np.abs(read_radiograph(tmp_path / "adam7.png")[0] - eight / 255).max() < 1e-6
    sixteen = drawing(bits=16)
    sixteen[:20] = 40_000
    Image.fromarray(sixteen).save(tmp_path / "key.png", transparency=40_000)
    image = read_radiograph(tmp_path / "key.png")[0]
    assert image[:20].max() == 0 and image[60, 45] > 0.8


def test_the_name_does_not_decide(tmp_path):
    save(tmp_path / "film.png", drawing())
    assert read_radiograph(tmp_path / "film.png").shape == (1, 120, 90)


# geometry

@pytest.mark.parametrize(
    "shape, size",
    [((300, 200), 96), ((200, 300), 96), ((333, 257), 100), ((40, 60), 144), ((64, 64), 64), ((2000, 3), 50)])
def test_mask_of_a_box_is_the_fitted_box(shape, size):
    box = Box("Pneumonia", shape[1] // 4, shape[0] // 3, max(1, shape[1] // 3), max(1, shape[0] // 5))
    x, y, w, h = fit_box(box, shape, size)
    p = np.arange(size)
    overlap = lambda a, n: np.clip(np.minimum(p + 1, a + n) - np.maximum(p, a), 0, 1)
    assert np.abs(fit_mask(box_mask([box], shape), size) - np.outer(overlap(y, h), overlap(x, w))).max() < 1e-5
    assert np.allclose(unfit_box((x, y, w, h), shape, size), (box.x, box.y, box.w, box.h))
    assert patch_coverage(fit_mask(box_mask([box], shape), size)).sum() == pytest.approx(
        144 * w * h / size**2, rel=1e-4)


def test_film_and_mask_take_the_same_road():
    mask = np.zeros((300, 200), bool)
    mask[60:180, 20:90] = True
    assert np.abs(fit_square(mask[None].astype(np.float32), 77)[0] - fit_mask(mask, 77)).max() < 1e-6


def test_fitting_keeps_mean_aspect_and_range():
    image = np.random.default_rng(0).random((1, 517, 311), np.float32)
    fitted = fit_square(image, 128)
    same_contract(fitted)
    assert fitted.sum() / (128 * round(128 * 311 / 517)) == pytest.approx(float(image.mean()), abs=1e-4)
    columns = np.flatnonzero(fitted[0].max(0))
    assert len(columns) == 77 and columns[0] == (128 - 77) // 2 and fitted[0].max(1).all()


def test_patches_are_row_major():
    # second row of patches, last column
    mask = np.zeros((24, 24))
    mask[2:4, 22:24] = 1
    assert np.flatnonzero(patch_coverage(mask)) == [23] and patch_coverage(mask)[23] == 1
    assert patch_coverage(mask, (2, 3)).shape == (6,)


# cache

@pytest.fixture
def films(tmp_path):
    "Twenty films of three kinds, two of them broken."
    items = []
    for n in range(20):
        path = tmp_path / f"{n}.{'dcm' if n % 2 else 'png'}"
        if n % 2: save(path, np.roll(drawing(), n, 0), WindowCenter=2048, WindowWidth=4096)
        else: Image.fromarray(np.roll(drawing(bits=8), n, 0)).save(path)
        items.append((f"s{n:02}", path))
    items[7][1].write_bytes(b"nothing")
    items[12][1].unlink()
    return items


def counted(monkeypatch) -> list:
    "The paths that are decoded in this process from now on."
    seen, whole = [], radiograph.decode_film
    monkeypatch.setattr(
        radiograph, "decode_film", lambda path, size: (seen.append(Path(path).name), whole(path, size))[1])
    return seen


@pytest.mark.parametrize("workers", (0, 2))
def test_cache_is_the_films_and_names_its_failures(films, tmp_path, workers):
    cache, failures = cache_radiographs(films, tmp_path / "cache", 48, workers)
    assert ([i for i, _ in failures] == ["s07", "s12"] and "neither DICOM" in failures[0][1]
            and "no such file" in failures[1][1])
    assert cache.ids == [i for i, _ in films if i not in ("s07", "s12")] and len(cache) == 18 and cache.size == 48
    for i, path in films:
        if i in cache.row: assert np.abs(cache[i] - load_radiograph(path, 48)).max() <= 1 / 255
    order = cache.ids[::-1]
    batch = cache.batch(order)
    assert batch.shape == (18, 1, 48, 48) and batch.dtype == np.float32 and np.array_equal(batch[0], cache[order[0]])
    again = RadiographCache(tmp_path / "cache")
    assert again.ids == cache.ids and again.failures == failures
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir() if p.name != ".lock") == [
        ".json", ".npy"], "nothing is left lying about"


def test_cache_is_reused_and_follows_its_inputs(films, tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    make = lambda items, size=32: (seen.clear(), cache_radiographs(items, tmp_path / "cache", size, 0))[1]
    make(films)
    assert len(seen) == 20
    cache, failures = make(films)
    assert seen == [] and len(failures) == 2
    changed = films[3][1]
    save(changed, drawing()[::-1].copy(), WindowCenter=500, WindowWidth=1000)
    cache, _ = make(films)
    assert seen == [changed.name] and np.abs(cache["s03"] - load_radiograph(changed, 32)).max() <= 1 / 255
    stat = changed.stat()
    data = bytearray(changed.read_bytes())
    data[-500:] = bytes(500)
    changed.write_bytes(data)
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    make(films)
    assert seen == [changed.name], "same length, other time"
    save(films[12][1], drawing())
    cache, failures = make(films)
    assert [i for i, _ in failures] == ["s07"] and seen == [films[12][1].name]
    cache, _ = make(films[::-1][:10])
    assert seen == [] and cache.ids == [i for i, _ in films[::-1][:10]]
    make(films, 40)
    assert len(seen) == 20, "another size is another cache"
    monkeypatch.setattr(radiograph, "RECIPE", 99)
    make(films, 40)
    assert len(seen) == 20, "another way of reading is another cache"


def test_damaged_cache_is_made_again(films, tmp_path, monkeypatch):
    cache, _ = cache_radiographs(films, tmp_path / "cache", 32, 0)
    expected = cache.batch(cache.ids)
    del cache
    seen = counted(monkeypatch)
    file = next((tmp_path / "cache").glob("films-*.npy"))
    os.truncate(file, 3000)
    with pytest.raises(NeuralError, match="damaged"): RadiographCache(tmp_path / "cache")
    cache, _ = cache_radiographs(films, tmp_path / "cache", 32, 0)
    assert len(seen) == 20 and np.array_equal(cache.batch(cache.ids), expected)
    (tmp_path / "cache/ids.json").write_text('{"file": ')
    with pytest.raises(NeuralError, match="damaged"): RadiographCache(tmp_path / "cache")
    assert len(cache_radiographs(films, tmp_path / "cache", 32, 0)[0]) == 18


def test_a_foreign_list_cannot_lead_out_of_the_folder(tmp_path):
    np.save(tmp_path / "outside.npy", np.zeros((1, 4, 4), np.uint8))
    (tmp_path / "cache").mkdir()
    for name in ("../outside.npy", str(tmp_path / "outside.npy"), "films-0123456789abcdef.npy/../../outside.npy"):
        (tmp_path / "cache/ids.json").write_text(
            json.dumps(dict(file=name, size=4, names=["a"], keys=["k"], reasons=[""])))
        with pytest.raises(NeuralError, match="damaged"): RadiographCache(tmp_path / "cache")
    np.save(tmp_path / "cache/films-0123456789abcdef.npy", np.array([[[{}]]], object), allow_pickle=True)
    (tmp_path / "cache/ids.json").write_text(
        json.dumps(dict(file="films-0123456789abcdef.npy", size=1, names=["a"], keys=["k"], reasons=[""])))
    # a pickle is never opened
    with pytest.raises(NeuralError, match="damaged"): RadiographCache(tmp_path / "cache")


def test_stopped_run_is_carried_on(films, tmp_path, monkeypatch):
    whole = radiograph.decode_film
    def stop_at(path, size):
        if Path(path).name == "13.dcm": raise KeyboardInterrupt
        return whole(path, size)
    monkeypatch.setattr(radiograph, "decode_film", stop_at)
    with pytest.raises(KeyboardInterrupt): cache_radiographs(films, tmp_path / "cache", 32, 0)
    # half a cache is none
    with pytest.raises(NeuralError, match="no cache of radiographs"): RadiographCache(tmp_path / "cache")
    journal, part = next((tmp_path / "cache").glob("*.journal")), next((tmp_path / "cache").glob("*.part"))
    # a line that was being written
    with open(journal, "a") as f: f.write('[9, "", 12')
    # and a film that was never finished
    with open(part, "r+b") as f:
        f.seek(128 + 2 * 32 * 32 + 5)
        f.write(b"rubbish")
    monkeypatch.setattr(radiograph, "decode_film", whole)
    seen = counted(monkeypatch)
    cache, failures = cache_radiographs(films, tmp_path / "cache", 32, 0)
    assert "2.png" in seen and len(seen) < 20 and len(failures) == 2
    for i in cache.ids: assert np.abs(cache[i] - load_radiograph(dict(films)[i], 32)).max() <= 1 / 255


def test_killed_process_leaves_no_worker_and_no_cache(films, tmp_path):
    script = (
        "import sys, time, pathlib, neural.radiograph as r\n"
        "folder = pathlib.Path(sys.argv[1]); whole = r.decode_film\n"
        "def slow(path, size): time.sleep(.25); return whole(path, size)\n"
        "r.decode_film = slow\n"
        "r.cache_radiographs([(p.stem, p) for p in sorted(folder.glob('*.[dp][cn][mg]'))], folder/'cache', 32, 2)\n")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE)
    journal = lambda: (sum(p.read_text().count("]") for p in (tmp_path / "cache").glob("*.journal"))
                       if (tmp_path / "cache").is_dir() else 0)
    for _ in range(600):
        if journal() or process.poll() is not None: break
        time.sleep(.02)
    children = [
        int(c) for t in Path(f"/proc/{process.pid}/task").iterdir() for c in (t / "children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal() and children and not (tmp_path / "cache/ids.json").exists()
    alive = lambda pid: Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    for _ in range(250):
        if not any(map(alive, children)): break
        time.sleep(.02)
    assert not any(map(alive, children)), "workers outlive their parent"
    items = [(p.stem, p) for p in sorted(tmp_path.glob("*.[dp][cn][mg]"))]
    assert len(cache_radiographs(items, tmp_path / "cache", 32, 0)[0]) == 18


def test_crashing_decoder_costs_one_film(films, tmp_path, monkeypatch):
    whole = radiograph.decode_film
    def crash(path, size):
        return (os.kill(os.getpid(), signal.SIGKILL) if parent_process() and Path(path).name in ("4.png", "15.dcm")
                else whole(path, size))
    monkeypatch.setattr(radiograph, "decode_film", crash)
    cache, failures = cache_radiographs(films, tmp_path / "cache", 32, 2)
    assert ({i for i, _ in failures} == {"s04", "s07", "s12", "s15"} and "crashed" in dict(failures)["s04"]
            and len(cache) == 16)


def test_two_processes_do_not_fill_one_folder(films, tmp_path):
    (tmp_path / "cache").mkdir()
    with FileLock(tmp_path / "cache/.lock"), pytest.raises(NeuralError, match="another process is filling"):
        cache_radiographs(films, tmp_path / "cache", 32, 0)


CALLS = {"open": (radiograph, "open"), "replace": (os, "replace"), "fsync": (os, "fsync"),
         "draft": (np.lib.format, "open_memmap"), "mkdir": (Path, "mkdir"), "lock": (FileLock, "acquire"),
         "delete": (Path, "unlink")}


def failing(monkeypatch, call, error, after=0):
    "One of the system's calls fails from its n-th time on, as on a full or broken disk; what is read is left alone."
    owner, name = CALLS[call]
    whole, times = getattr(owner, name, open), [0]
    def fail(*args, **options):
        if call == "open" and (args[1] if len(args) > 1 else options.get("mode", "r")) in ("r", "rb"):
            return whole(*args, **options)
        times[0] += 1
        if times[0] > after: raise error
        return whole(*args, **options)
    monkeypatch.setattr(owner, name, fail, raising=False)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "code, said",
    [(28, "No space left on device; free some space"), (5, "Input/output error; the disk"),
     (30, "Read-only file system; this place"), (37, "No locks available; this file system"),
     (122, "exceeded; your quota")],
)
def test_what_the_system_refuses_is_said_and_carried_on(films, tmp_path, monkeypatch, call, code, said):
    before = {path: path.read_bytes() for _, path in films if path.is_file()}
    # so that there is an older one to take away
    if call == "delete": cache_radiographs(films[:5], tmp_path / "cache", 32, 0)
    with monkeypatch.context() as broken:
        failing(broken, call, OSError(code, os.strerror(code)), after=call in ("replace", "delete"))
        with pytest.raises(NeuralError, match="cache: the cache cannot be filled, .*" + said) as caught:
            cache_radiographs(films, tmp_path / "cache", 32, 0)
        assert "\n" not in str(caught.value) and caught.value.__suppress_context__
    cache, failures = cache_radiographs(films, tmp_path / "cache", 32, 0)
    assert len(cache) == 18 and {path: path.read_bytes() for path in before} == before
    if call != "delete":
        assert sorted(p.suffix for p in (tmp_path / "cache").iterdir() if p.name != ".lock") == [".json", ".npy"]


class Filling:
    "A file on a disk that takes so many bytes and then, as disks do, a part of the next."
    def __init__(self, file, room): self.file, self.room = file, room
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, data):
        if not self.room: raise OSError(28, "No space left on device")
        part = bytes(data)[:self.room]
        self.room -= len(part)
        return self.file.write(part)


@pytest.mark.parametrize(
    "which, room", [("file", 0), ("file", 3000), ("file", 10_300), ("journal", 0), ("journal", 70), ("journal", 200)])
def test_a_disk_that_fills_up_within_a_film_leaves_no_torn_one(films, tmp_path, monkeypatch, which, room, capfd):
    with monkeypatch.context() as full:
        start = radiograph.Draft.__init__
        def begin(self, *args):
            start(self, *args)
            setattr(self, which, Filling(getattr(self, which), room))
        full.setattr(radiograph.Draft, "__init__", begin)
        with pytest.raises(NeuralError, match="No space left on device; free some space"):
            cache_radiographs(films, tmp_path / "cache", 32, 0)
    assert not (tmp_path / "cache/ids.json").exists()
    seen = counted(monkeypatch)
    cache, _ = cache_radiographs(films, tmp_path / "cache", 32, 0)
    assert len(cache) == 18 and (len(seen) < 20 or room < 100)
    for i in cache.ids: assert np.abs(cache[i] - load_radiograph(dict(films)[i], 32)).max() <= 1 / 255
    assert capfd.readouterr() == ("", "")


STEPS = [("fsync", 1, False), ("replace", 1, False), ("replace", 1, True), ("fsync", 2, True), ("replace", 2, False),
         ("replace", 2, True), ("unlink", 2, False)]


@pytest.mark.parametrize("name, nth, after", STEPS)
@pytest.mark.parametrize("older", (False, True))
def test_killed_at_any_step_of_publishing(films, tmp_path, name, nth, after, older, monkeypatch):
    """The process ends within the call, before or after it is done; the next run has the films, and decodes none that
    was finished."""
    script = (
        "import os, sys, pathlib, neural.radiograph as r\nfolder, name, nth, after, older = pathlib.Path(sys.argv[1]),"
        " sys.argv[2], int(sys.argv[3]), sys.argv[4] == 'True', sys.argv[5] == 'True'\nitems = [(p.stem, p) for p in"
        " sorted(folder.glob('*.[dp][cn][mg]'))]\nif older: r.cache_radiographs(items[:4], folder/'cache', 32,"
        " 0)\nwhole, times = getattr(os, name), [0]\ndef dying(*a, **k):\n    times[0] += 1\n    if times[0] == nth:"
        " after and whole(*a, **k); os._exit(9)\n    return whole(*a, **k)\nsetattr(os, name,"
        " dying)\nr.cache_radiographs(items, folder/'cache', 32, 0)\n")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), name, str(nth), str(after), str(older)],
                          capture_output=True, text=True)
    assert done.returncode in (0, 9) and done.stderr == "", done.stderr
    items = [(p.stem, p) for p in sorted(tmp_path.glob("*.[dp][cn][mg]"))]
    seen = counted(monkeypatch)
    cache, failures = cache_radiographs(items, tmp_path / "cache", 32, 0)
    assert len(cache) == 18 and len(failures) == 1 and seen == []
    for i in cache.ids: assert np.abs(cache[i] - load_radiograph(dict(items)[i], 32)).max() <= 1 / 255
    cache_radiographs(items[:3], tmp_path / "cache", 32, 0)
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir() if p.name != ".lock") == [
        ".json", ".npy"], "what a killed run left is taken away by the next that writes"


def test_a_failure_of_the_machine_is_tried_again(films, tmp_path, monkeypatch):
    whole = radiograph.read_bytes
    def refused(path):
        if path.name in ("4.png", "9.dcm"):
            with radiograph.refusing(path.name, "cannot be opened"):
                raise (PermissionError(13, "Permission denied") if path.name == "4.png" else MemoryError())
        return whole(path)
    with monkeypatch.context() as today:
        today.setattr(radiograph, "read_bytes", refused)
        _, failures = cache_radiographs(films, tmp_path / "cache", 32, 2)
    assert ([i for i, _ in failures] == ["s04", "s07", "s09", "s12"]
            and "Permission denied; ask" in dict(failures)["s04"] and "memory ran out" in dict(failures)["s09"])
    seen = counted(monkeypatch)
    cache, failures = cache_radiographs(films, tmp_path / "cache", 32, 0)
    assert sorted(seen) == ["4.png", "9.dcm"] and [i for i, _ in failures] == ["s07", "s12"] and len(cache) == 18


def test_a_finished_cache_is_read_where_nothing_can_be_written(films, tmp_path, monkeypatch):
    cache_radiographs(films, tmp_path / "cache", 32, 0)
    for call in set(CALLS) - {"draft"}: failing(monkeypatch, call, OSError(30, "Read-only file system"))
    assert len(cache_radiographs(films, tmp_path / "cache", 32, 0)[0]) == 18
    with pytest.raises(NeuralError, match="Read-only file system"):
        cache_radiographs(films[:3], tmp_path / "cache", 32, 0)


def test_what_is_not_ours_is_left_in_its_place(films, tmp_path):
    (tmp_path / "cache").mkdir()
    mine = tmp_path / "cache/films-of-2019.csv"
    mine.write_text("mine")
    (tmp_path / "cache/films-0123456789abcdef.npy").write_bytes(b"old")
    cache_radiographs(films, tmp_path / "cache", 32, 0)
    assert mine.read_text() == "mine" and not (tmp_path / "cache/films-0123456789abcdef.npy").exists()
    for n, text in enumerate(('{"patients": 12}', "[1, 2]", "ids\n")):
        (tmp_path / f"{n}").mkdir()
        (tmp_path / f"{n}/ids.json").write_text(text)
        with pytest.raises(NeuralError, match="name another folder"): cache_radiographs(films, tmp_path / f"{n}", 32, 0)
        assert (tmp_path / f"{n}/ids.json").read_text() == text and len(list((tmp_path / f"{n}").iterdir())) == 1
    with pytest.raises(NeuralError, match="File exists"): cache_radiographs(films, mine, 32, 0)
    assert mine.read_text() == "mine"


def test_journals_and_lists_of_strangers(films, tmp_path, monkeypatch):
    whole = radiograph.decode_film
    def stop_at(path, size):
        if Path(path).name == "13.dcm": raise KeyboardInterrupt
        return whole(path, size)
    monkeypatch.setattr(radiograph, "decode_film", stop_at)
    with pytest.raises(KeyboardInterrupt): cache_radiographs(films, tmp_path / "cache", 32, 0)
    journal = next((tmp_path / "cache").glob("*.journal"))
    with open(journal, "ab") as f:
        f.write(b'\n[99, "", 1]\n[-1, "", 1]\n[1]\n7\n["a", "", 1]\n[0, 5, 1]\n[true, "x", 1]\n\xff\xfe\n'
                + b"[" * 5000 + b"\n")
    monkeypatch.setattr(radiograph, "decode_film", whole)
    cache, _ = cache_radiographs(films, tmp_path / "cache", 32, 0)
    assert len(cache) == 18
    good = json.loads((tmp_path / "cache/ids.json").read_text())
    for key, value in (("names", [[]] * 20), ("size", "32"), ("reasons", [None] * 20), ("recipe", 2), ("keys", {})):
        (tmp_path / "cache/ids.json").write_text(json.dumps({**good, key: value}))
        with pytest.raises(NeuralError, match="damaged|in another way"): RadiographCache(tmp_path / "cache")
    (tmp_path / "cache/ids.json").write_text("[" * 5000)
    with pytest.raises(NeuralError, match="damaged"): RadiographCache(tmp_path / "cache")


@pytest.mark.parametrize(
    "size, workers, said",
    [(0, 0, "of 0 pixels"), (-4, 0, "of -4 pixels"), (9.5, 0, "of 9.5 pixels"), (32, -1, "-1 workers")])
def test_zero_and_less_are_no_defaults(films, tmp_path, size, workers, said):
    with pytest.raises(NeuralError, match=said): cache_radiographs(films, tmp_path / "cache", size, workers)
    assert not (tmp_path / "cache").exists()
    if size < 1:
        with pytest.raises(NeuralError, match="a square of"): load_radiograph(films[1][1], size)
    with pytest.raises(NeuralError, match="a square of -3"): read_radiograph(films[1][1], -3)
    with pytest.raises(NeuralError, match="-1 workers"): list(decode_films([], 32, -1))


def test_cache_travels_to_a_worker_without_its_films(films, tmp_path):
    cache, _ = cache_radiographs(films, tmp_path / "cache", 64, 0)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000 and np.array_equal(pickle.loads(sent)["s01"], cache["s01"])


def test_quiet_in_a_pipe(films, tmp_path, capfd):
    cache_radiographs(films, tmp_path / "cache", 32, 2)
    assert capfd.readouterr() == ("", "")


def test_importing_is_light():
    "Workers and the command line pay for what they use: no torch, no plotting."
    code = ("import sys, neural.radiograph; print([m for m in ('torch', 'matplotlib', 'pandas', 'transformers') if m in"
            " sys.modules])")
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]")


def test_real_pictures_are_cached_as_they_are(real_data, tmp_path):
    items = [(p.stem, p) for p in sorted((real_data / "real_cxr_dev/openi256").glob("*.jpg"))[:60]]
    cache, failures = cache_radiographs(items, tmp_path / "cache", 128)
    assert len(cache) == 60 and failures == []
    for i, path in items[::15]: assert np.abs(cache[i] - load_radiograph(path, 128)).max() <= 1 / 255


def test_a_jpeg_2000_film_decoded_coarsely_equals_one_decoded_whole(tmp_path):
    ds = dataset(drawing(1024, 896), WindowCenter=2048, WindowWidth=4096)
    ds.save_as(tmp_path / "plain.dcm", enforce_file_format=True)
    ds.compress(JPEG2000Lossless)
    ds.save_as(tmp_path / "j2k.dcm", enforce_file_format=True)
    assert [read_radiograph(tmp_path / "j2k.dcm", size).shape[1] for size in (0, 512, 256, 128, 64)] == [
        1024, 1024, 512, 256, 128]
    for size in (256, 200, 96):
        assert (
            np.abs(load_radiograph(tmp_path / "j2k.dcm", size) - load_radiograph(tmp_path / "plain.dcm", size)).max()
            < 1e-2)
    ds.PixelPaddingValue = 0
    ds.save_as(tmp_path / "padded.dcm", enforce_file_format=True)
    assert (
        read_radiograph(tmp_path / "padded.dcm", 96).shape[1] == 1024
    ), "padding must not be blended with its neighbours"
