"Radiographs: real DICOMs of every transfer syntax, hostile and damaged files, one geometry, and a cache that survives being killed."
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
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless,
                         JPEGBaseline8Bit, JPEGExtended12Bit, RLELossless)

from neural import radiograph
from neural.radiograph import (MAX_PIXELS, RadiographCache, RadiographError, box_mask, cache_radiographs, decode_films, fit_box, fit_mask, fit_square,
                               load_radiograph, patch_coverage, read_mask, read_radiograph, unfit_box)
from neural.study import Box, NeuralError


# drawings

def drawing(rows=120, columns=90, bits=12) -> np.ndarray:
    "A smooth picture whose brightest place is in the middle, as stored numbers; never larger than 7/8 of the depth."
    y, x = np.mgrid[-1:1:rows * 1j, -1:1:columns * 1j]
    return (0.8 * 2**bits * np.exp(-2 * (x**2 + y**2)) + 0.05 * 2**bits).astype(np.uint16 if bits > 8 else np.uint8)


def dataset(pixels, bits=12, syntax=ExplicitVRLittleEndian, **tags) -> pydicom.Dataset:
    "A radiograph as a DICOM data set, with a patient whom no message may name."
    ds = pydicom.Dataset(); ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3.4"
    ds.PatientName, ds.PatientID = "Secret^Patient", "SECRET-77"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PixelRepresentation = *pixels.shape[:2], 1, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PhotometricInterpretation = 8 * pixels.itemsize, bits, bits - 1, "MONOCHROME2"
    ds.PixelData = pixels.tobytes(); ds["PixelData"].VR = "OW"
    for key, value in tags.items(): setattr(ds, key, value)
    return ds


def save(path, *args, **tags) -> Path:
    dataset(*args, **tags).save_as(path, enforce_file_format=True)
    return path


def recoded(source, target, syntax) -> Path:
    "The same radiograph in another transfer syntax, by GDCM."
    reader = gdcm.ImageReader(); reader.SetFileName(str(source)); assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax(); change.SetTransferSyntax(gdcm.TransferSyntax(syntax)); change.SetInput(reader.GetImage()); assert change.Change()
    writer = gdcm.ImageWriter(); writer.SetFileName(str(target)); writer.SetFile(reader.GetFile()); writer.SetImage(change.GetOutput()); assert writer.Write()
    return target


def jpeg_of(pixels) -> bytes:
    out = io.BytesIO(); Image.fromarray(pixels).save(out, "JPEG", quality=97)
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
    "RG1_J2KI.dcm": ((1955, 1841), ((.02, .08), (.93, .99)), ((.75, .95), (.45, .55))),              # air above the shoulder; abdomen under the spine
    "RG1_JLSN.dcm": ((1955, 1841), ((.02, .08), (.93, .99)), ((.75, .95), (.45, .55))),
    "RG3_JPLL.dcm": ((1760, 1760), ((.05, .25), (.28, .33)), ((.83, .90), (.43, .50))),              # air beside a leg; heel bone
    "RG3_RLE.dcm": ((1760, 1760), ((.05, .25), (.28, .33)), ((.83, .90), (.43, .50))),
    "gdcm-CR-MONO1-10-chest.dcm": ((440, 440), ((.35, .55), (.15, .30)), ((.85, .95), (.42, .50))),  # lung; spine behind the liver
    "rsna_1517875201.850819.dcm": ((1024, 1024), ((.02, .06), (.02, .10)), ((.80, .92), (.45, .52))),  # air; spine
    "vlut_04.dcm": ((512, 512), ((.72, .78), (.11, .20)), ((.22, .28), (.12, .28))),                 # test pattern: black bar, white bar
}


@pytest.mark.parametrize("name", REAL)
def test_real_dicom(real_data, name):
    shape, dark, bright = REAL[name]
    image = read_radiograph(real_data / "real_cxr_dev/dicom" / name)
    same_contract(image)
    assert image.shape[1:] == shape
    part = lambda share: np.median(image[0][tuple(slice(*(int(round(s * n)) for s in pair)) for pair, n in zip(share, shape))])
    assert part(bright) > part(dark) + 0.3, "bone must be bright"
    assert np.ptp(image) > 0.8, "most of the grey scale is used"


def test_two_codings_of_one_real_film_agree(real_data):
    folder = real_data / "real_cxr_dev/dicom"
    assert np.array_equal(read_radiograph(folder / "RG3_JPLL.dcm"), read_radiograph(folder / "RG3_RLE.dcm"))               # both lossless
    assert np.abs(read_radiograph(folder / "RG1_J2KI.dcm") - read_radiograph(folder / "RG1_JLSN.dcm")).mean() < 2e-3       # both lossy


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
    files = [recoded(plain, tmp_path / f"{s}.dcm", getattr(gdcm.TransferSyntax, s)) for s in
             ("RLELossless", "JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "ImplicitVRLittleEndian", "ExplicitVRBigEndian")]
    ds = dataset(drawing()); ds.compress(JPEG2000Lossless); ds.save_as(tmp_path / "j2k.dcm", enforce_file_format=True); files.append(tmp_path / "j2k.dcm")
    ds = dataset(drawing()); ds.compress(RLELossless); ds.save_as(tmp_path / "bare.dcm"); files.append(tmp_path / "bare.dcm")       # without a preamble
    for path in files: assert np.array_equal(read_radiograph(path), expected), path.name


@pytest.mark.parametrize("kind", ("colour", "planes", "signed", "shallow"))
def test_lossless_syntaxes_keep_colours_and_signs(tmp_path, kind):
    eight, twelve = drawing(60, 50, 8), drawing(60, 50).astype(np.int32)
    colours, colour = np.dstack([eight, np.roll(eight, 7, 0), 255 - eight]), dict(SamplesPerPixel=3, PhotometricInterpretation="RGB", Rows=60, Columns=50)
    plain = {"colour": lambda f: save(f, colours, 8, **colour, PlanarConfiguration=0), "planes": lambda f: save(f, np.ascontiguousarray(colours.transpose(2, 0, 1)), 8, **colour, PlanarConfiguration=1),
             "signed": lambda f: save(f, (twelve - 2048 & 4095).astype(np.uint16), PixelRepresentation=1, WindowCenter=0, WindowWidth=4096), "shallow": lambda f: save(f, eight.astype(np.uint16), 8)}[kind](tmp_path / "plain.dcm")
    for s in ("JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"):
        assert np.array_equal(read_radiograph(recoded(plain, tmp_path / f"{s}.dcm", getattr(gdcm.TransferSyntax, s))), read_radiograph(plain)), s


def test_lossy_syntaxes_come_close(tmp_path):
    plain = save(tmp_path / "plain.dcm", drawing())
    for s in ("JPEG2000", "JPEGLSNearLossless"):
        assert np.abs(read_radiograph(recoded(plain, tmp_path / f"{s}.dcm", getattr(gdcm.TransferSyntax, s))) - read_radiograph(plain)).max() < 0.01
    eight = drawing(bits=8)
    baseline = save(tmp_path / "baseline.dcm", eight, 8, JPEGBaseline8Bit, PixelData=encapsulate([jpeg_of(eight)]))
    assert np.abs(read_radiograph(baseline)[0] - eight / 255).max() < 0.02
    in_pieces = save(tmp_path / "pieces.dcm", eight, 8, JPEGBaseline8Bit, PixelData=encapsulate([jpeg_of(eight)], fragments_per_frame=4))
    assert np.array_equal(read_radiograph(in_pieces), read_radiograph(baseline))


def test_twelve_bit_extended_jpeg_is_refused_not_guessed(tmp_path):
    path = recoded(save(tmp_path / "plain.dcm", drawing()), tmp_path / "extended.dcm", gdcm.TransferSyntax.JPEGExtendedProcess2_4)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == JPEGExtended12Bit
    assert "cannot be decoded" in message_of(path)


# grey values

@pytest.mark.parametrize("bits", (8, 10, 12, 15, 16))
def test_depths_and_signs(tmp_path, bits):
    pixels = drawing(bits=bits)
    unsigned = read_radiograph(save(tmp_path / "u.dcm", pixels, bits, WindowCenter=2**bits / 2, WindowWidth=2**bits))
    assert np.abs(unsigned[0] - pixels / (2**bits - 1)).max() < 1e-5
    half = pixels.astype(np.int32) - 2**(bits - 1)
    stored = (half & (2**bits - 1)).astype(pixels.dtype)                          # two's complement in the stored bits, the rest zero
    signed = read_radiograph(save(tmp_path / "s.dcm", stored, bits, PixelRepresentation=1, WindowCenter=0, WindowWidth=2**bits))
    assert np.abs(signed - unsigned).max() < 1e-5


def test_negative_films_are_turned(tmp_path):
    pixels = drawing(); window = dict(WindowCenter=1500, WindowWidth=3000)
    positive = read_radiograph(save(tmp_path / "p.dcm", pixels, **window))
    negative = read_radiograph(save(tmp_path / "n.dcm", 4095 - pixels, PhotometricInterpretation="MONOCHROME1", WindowCenter=4096 - 1500, WindowWidth=3000))
    assert np.abs(positive - negative).max() < 1e-5 and positive[0, 60, 45] > positive[0, 0, 0]


def test_rescale_comes_before_the_window(tmp_path):
    pixels = drawing()
    plain = read_radiograph(save(tmp_path / "a.dcm", pixels, WindowCenter=1500, WindowWidth=3000))
    scaled = read_radiograph(save(tmp_path / "b.dcm", pixels, RescaleSlope="2", RescaleIntercept="-1000", WindowCenter=2 * 1500 - 1000, WindowWidth=5999))
    assert np.abs(plain - scaled).max() < 1e-3
    falling = read_radiograph(save(tmp_path / "c.dcm", 4095 - pixels, RescaleSlope="-1", RescaleIntercept="4095", WindowCenter=1500, WindowWidth=3000))
    assert np.abs(plain - falling).max() < 1e-5


def lut(data, first=0, bits=12, packed=True):
    item = pydicom.Dataset(); item.LUTDescriptor = [len(data) % 65536, first, bits]
    item.LUTData = np.asarray(data, "<u2").tobytes() if packed else list(map(int, data))
    item["LUTData"].VR = "OW" if packed else "US"
    return item


@pytest.mark.parametrize("packed", (True, False))
@pytest.mark.parametrize("syntax", (ExplicitVRLittleEndian, ImplicitVRLittleEndian))
def test_tables(tmp_path, packed, syntax):
    pixels, square = drawing(), (np.arange(4096)**2 / 4095).astype(int)
    image = read_radiograph(save(tmp_path / "voi.dcm", pixels, syntax=syntax, VOILUTSequence=[lut(square, packed=packed)], WindowCenter=1, WindowWidth=2))
    assert np.abs(image[0] - square[pixels] / 4095).max() < 1e-5                    # the table is preferred to the window
    image = read_radiograph(save(tmp_path / "mod.dcm", pixels, syntax=syntax, ModalityLUTSequence=[lut(square, packed=packed)], WindowCenter=2048, WindowWidth=4096))
    assert np.abs(image[0] - square[pixels] / 4095).max() < 1e-5
    image = read_radiograph(save(tmp_path / "part.dcm", pixels, syntax=syntax, VOILUTSequence=[lut(np.arange(1001), first=1000, bits=10, packed=packed)]))
    assert np.abs(image[0] - np.clip(pixels.astype(float) - 1000, 0, 1000) / 1000).max() < 1e-5   # below and above the table


def test_table_of_65536_entries_and_a_short_one(tmp_path):
    pixels = drawing(bits=16)
    image = read_radiograph(save(tmp_path / "full.dcm", pixels, 16, VOILUTSequence=[lut(np.arange(65536), bits=16)]))
    assert np.abs(image[0] - pixels / 65535).max() < 1e-5
    item = lut(np.arange(100)); item.LUTDescriptor = [4096, 0, 12]
    assert "cannot be decoded" in message_of(save(tmp_path / "short.dcm", drawing(), VOILUTSequence=[item]))


def test_agrees_with_pydicom_where_both_apply(tmp_path):
    "The one table per file gives what pydicom's own functions give step by step."
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    for n, tags in enumerate((dict(WindowCenter=1800, WindowWidth=900), dict(WindowCenter=1800, WindowWidth=900, VOILUTFunction="SIGMOID"),
                              dict(WindowCenter=1800, WindowWidth=900, VOILUTFunction="LINEAR_EXACT"), dict(VOILUTSequence=[lut(np.arange(4096)[::-1])]))):
        ds = dataset(drawing(), **tags); path = tmp_path / f"{n}.dcm"; ds.save_as(path, enforce_file_format=True)
        theirs = np.asarray(apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds), float) / 4095
        assert np.abs(read_radiograph(path)[0] - theirs).max() < 1e-5, tags


def test_no_window_ignores_a_marker_and_a_constant_is_black(tmp_path):
    pixels = drawing(200, 200); pixels[:10, :10] = 4095
    ours = read_radiograph(save(tmp_path / "m.dcm", np.where(pixels == 4095, 4095, pixels // 4).astype(np.uint16)))
    assert ours[0, 100, 100] > 0.95, "the marker took the grey scale"
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        flat = read_radiograph(save(tmp_path / f"{kind}.dcm", np.full((20, 30), 700, np.uint16), PhotometricInterpretation=kind))
        same_contract(flat); assert np.ptp(flat) == 0
    eight = drawing(bits=8)
    assert np.abs(read_radiograph(save(tmp_path / "8.dcm", eight, 8))[0] - eight / 255).max() < 1e-6       # 8 bits are display values


def test_padding_is_black_and_sets_no_scale(tmp_path):
    pixels = drawing(); pixels[:20] = 4095
    image = read_radiograph(save(tmp_path / "pad.dcm", pixels, PixelPaddingValue=4095))
    assert image[0, :20].max() == 0 and image[0, 60, 45] == 1
    pixels = 4095 - pixels
    image = read_radiograph(save(tmp_path / "pad1.dcm", pixels, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1"))
    assert image[0, :20].max() == 0 and image[0, 60, 45] == 1


def test_colour_captures_become_luminance(tmp_path):
    eight = drawing(bits=8); rgb = np.repeat(eight[..., None], 3, 2)
    image = read_radiograph(save(tmp_path / "rgb.dcm", rgb, 8, SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB"))
    same_contract(image); assert np.abs(image[0] - eight / 255).max() < 1e-5


@pytest.mark.parametrize("tags, said", [
    (dict(WindowCenter=-30000, WindowWidth=10), "beside all of its pixels"), (dict(WindowCenter=100, WindowWidth=0), "cannot be decoded"),
    (dict(WindowCenter=100, WindowWidth=50, VOILUTFunction="CUBIC"), "cannot be decoded"), (dict(NumberOfFrames=2), "2 frames"),
    (dict(SamplesPerPixel=4), "4 channels"), (dict(PhotometricInterpretation="PALETTE COLOR"), "PALETTE COLOR"), (dict(BitsAllocated=32), "are not supported"),
    (dict(BitsStored=17), "17 bits"), (dict(PixelData=b""), "no pixel data"), (dict(Rows=0), "is no image"), (dict(Rows=500), "cannot be decoded"),
])
def test_headers_that_promise_something_else(tmp_path, tags, said):
    assert said in message_of(save(tmp_path / "odd.dcm", drawing(), **tags))


# hostile and damaged files

def peak_of(call) -> int:
    tracemalloc.start()
    try: call()
    finally: peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    return peak


def test_absurd_dimensions_are_refused_before_allocation(tmp_path):
    eight, small = drawing(bits=8), 20 * 2**20
    huge = save(tmp_path / "huge.dcm", drawing(), Rows=65535, Columns=65535)
    assert peak_of(lambda: message_of(huge)) < small
    inner = bytearray(jpeg_of(eight)); at = inner.index(b"\xff\xc0"); inner[at + 5:at + 9] = b"\xff\xff\xff\xff"      # the codestream lies, not the header
    assert peak_of(lambda: message_of(save(tmp_path / "inner.dcm", eight, 8, JPEGBaseline8Bit, PixelData=encapsulate([bytes(inner)])))) < small
    ds = dataset(drawing()); ds.compress(JPEG2000Lossless)
    j2k = bytearray(get_frame(ds.PixelData, 0, number_of_frames=1)); j2k[8:16] = struct.pack(">2L", 2**30, 2**30)
    ds.PixelData = encapsulate([bytes(j2k)]); ds.save_as(tmp_path / "j2k.dcm", enforce_file_format=True)
    assert peak_of(lambda: message_of(tmp_path / "j2k.dcm")) < small


def test_headers_that_make_a_decoder_abort_the_process_are_refused_first(tmp_path):
    "GDCM ends the process on these two; if the look before decoding went, this test would not even fail, it would die."
    path = recoded(save(tmp_path / "plain.dcm", drawing()), tmp_path / "ls.dcm", gdcm.TransferSyntax.JPEGLSLossless)
    data = bytearray(path.read_bytes()); at = data.index(b"\xff\xf7"); data[at + 4] = 234; path.write_bytes(data)
    assert "234 bits" in message_of(path)
    path = recoded(tmp_path / "plain.dcm", tmp_path / "ll.dcm", gdcm.TransferSyntax.JPEGLosslessProcess14_1)
    data = bytearray(path.read_bytes()); at = data.index(b"\xff\xc4"); data[at] = 1; path.write_bytes(data)
    assert "the picture inside 0 x 0" in message_of(path)


def test_bombs_of_every_kind(tmp_path, monkeypatch):
    small = 20 * 2**20
    row = b"\x00" * (1 + 20_000 // 8)                                                                             # PNG, 20,000 x 20,000, 1 bit, some kilobytes
    chunk = lambda kind, data: struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2L5B", 20_000, 20_000, 1, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(row * 20_000)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(png)
    assert len(png) < 100_000 and peak_of(lambda: message_of(tmp_path / "bomb.png")) < small
    assert 20_000**2 > MAX_PIXELS
    deflated = save(tmp_path / "deflated.dcm", np.zeros((2000, 2000), np.uint16), syntax=DeflatedExplicitVRLittleEndian)
    assert peak_of(lambda: message_of(deflated)) < small
    monkeypatch.setattr(radiograph, "MAX_BYTES", 2**20)                                                            # so that a small file is a long one
    runs = struct.pack("<16L", 1, 64, *[0] * 14) + bytes([129, 0]) * 20_000                                        # 40 kB that unpack to 2.5 MB
    rle = save(tmp_path / "runs.dcm", drawing(bits=8), 8, RLELossless, PixelData=encapsulate([runs]))
    assert "unpacks to more" in message_of(rle)
    (tmp_path / "long.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2**20))
    assert "larger than" in message_of(tmp_path / "long.png")


def test_cut_files_are_refused_at_every_length(tmp_path):
    plain = save(tmp_path / "plain.dcm", drawing())
    eight = drawing(bits=8); Image.fromarray(eight).save(tmp_path / "a.png"); (tmp_path / "a.jpg").write_bytes(jpeg_of(eight))
    files = [plain, tmp_path / "a.png", tmp_path / "a.jpg"] + [recoded(plain, tmp_path / f"{s}.dcm", getattr(gdcm.TransferSyntax, s)) for s in ("JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless")]
    for path in files:
        whole = path.read_bytes(); cut = tmp_path / f"cut{path.suffix}"
        for share in (0, .01, .1, .4, .6, .9):
            cut.write_bytes(whole[:int(share * len(whole))])
            message_of(cut)


def test_a_compressed_picture_cut_inside_a_whole_file(tmp_path):
    plain = save(tmp_path / "plain.dcm", drawing())
    for s in ("JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"):
        ds = pydicom.dcmread(recoded(plain, tmp_path / "x.dcm", getattr(gdcm.TransferSyntax, s)))
        ds.PixelData = encapsulate([get_frame(ds.PixelData, 0, number_of_frames=1)[:-800]]); ds.save_as(tmp_path / "cut.dcm")
        message_of(tmp_path / "cut.dcm")


def test_what_is_no_radiograph_at_all(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"DICM" * 100); (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n"); (tmp_path / "c.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "d.dcm").write_bytes(bytes(128) + b"DICM"); (tmp_path / "e.gif").write_bytes(b"GIF89a" + bytes(50)); (tmp_path / "f.dcm").mkdir()
    os.mkfifo(tmp_path / "g.dcm")                                                                                  # would wait for ever if it were opened
    for path in sorted(tmp_path.iterdir()): message_of(path)
    message_of(tmp_path / "nowhere.dcm")


def mutants(data: bytes, rng: random.Random, n: int):
    for _ in range(n):
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 10))):
            at = rng.randrange(len(out)) if rng.random() < .5 else rng.randrange(min(len(out), 1400))             # half of them in the header
            how = rng.random()
            if how < .5: out[at] = rng.randrange(256)
            elif how < .7: out[at:at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(1, 9))
            elif how < .85: del out[at:at + rng.randrange(1, 64)]
            else: out[at:at + 4] = b"\xff\xff\xff\xff"
            if len(out) < 200: break
        yield bytes(out)


@pytest.mark.parametrize("seed", range(2))
def test_mutated_files_are_read_or_refused(tmp_path, seed):
    "Whatever happens to a file's bytes, it is read under the contract or refused with a RadiographError; each in a worker, for a decoder may crash."
    rng, eight = random.Random(seed), drawing(60, 50, 8)
    plain = save(tmp_path / "plain.dcm", drawing(60, 50), WindowCenter=1500, WindowWidth=3000)
    files = [plain, save(tmp_path / "tables.dcm", drawing(60, 50), VOILUTSequence=[lut(np.arange(64) * 64)], RescaleSlope="0.015625", RescaleIntercept="0"), save(tmp_path / "base.dcm", eight, 8, JPEGBaseline8Bit, PixelData=encapsulate([jpeg_of(eight)]))]
    files += [recoded(plain, tmp_path / f"{s}.dcm", getattr(gdcm.TransferSyntax, s)) for s in ("JPEG2000Lossless", "JPEGLSLossless", "JPEGLosslessProcess14_1", "RLELossless", "ImplicitVRLittleEndian")]
    Image.fromarray(eight).save(tmp_path / "a.png"); Image.fromarray(drawing(60, 50)).save(tmp_path / "b.png"); (tmp_path / "c.jpg").write_bytes(jpeg_of(eight))
    files += [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.jpg"]
    jobs = []
    for path in files:
        for n, data in enumerate(mutants(path.read_bytes(), rng, 20)):
            jobs.append((len(jobs), tmp_path / f"{path.stem}-{n}.bin")); jobs[-1][1].write_bytes(data)
    results = dict(decode_films(jobs, 32, workers=2))                                                              # anything but a RadiographError would surface here
    assert len(results) == len(jobs) >= 200
    read = [r for r in results.values() if not isinstance(r, str)]
    assert 20 < len(read) < len(jobs) - 20
    assert all(r.shape == (32, 32) and r.dtype == np.uint8 for r in read)
    assert not [r for r in results.values() if isinstance(r, str) and ("\n" in r or "Secret" in r or "SECRET" in r)]


# PNG and JPEG

def test_pictures_of_eight_and_sixteen_bits(tmp_path):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16); sixteen = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for name, pixels, scale in (("8.png", eight, 255), ("16.png", sixteen, 65535), ("12.png", sixteen[:16], 4095)):
        Image.fromarray(pixels).save(tmp_path / name); image = read_radiograph(tmp_path / name)
        same_contract(image); assert np.abs(image[0] - pixels / scale).max() < 1e-6
    for mode in ("RGB", "RGBA", "LA", "P", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(eight).convert("RGB" if mode == "CMYK" else mode).convert(mode).save(tmp_path / f"{mode}.{suffix}", **(dict(quality=100) if suffix == "jpg" else {}))
        image = read_radiograph(tmp_path / f"{mode}.{suffix}"); same_contract(image); assert np.abs(image[0] - eight / 255).max() < 0.03, mode
    Image.fromarray(eight > 127).save(tmp_path / "1.png"); assert set(np.unique(read_radiograph(tmp_path / "1.png"))) == {0, 1}
    Image.fromarray(np.zeros((9, 7), np.uint16)).save(tmp_path / "0.png"); assert read_radiograph(tmp_path / "0.png").max() == 0


def test_the_name_does_not_decide(tmp_path):
    save(tmp_path / "film.png", drawing()); assert read_radiograph(tmp_path / "film.png").shape == (1, 120, 90)


# geometry

@pytest.mark.parametrize("shape, size", [((300, 200), 96), ((200, 300), 96), ((333, 257), 100), ((40, 60), 144), ((64, 64), 64), ((2000, 3), 50)])
def test_mask_of_a_box_is_the_fitted_box(shape, size):
    box = Box("Pneumonia", shape[1] // 4, shape[0] // 3, max(1, shape[1] // 3), max(1, shape[0] // 5))
    x, y, w, h = fit_box(box, shape, size)
    p = np.arange(size); overlap = lambda a, n: np.clip(np.minimum(p + 1, a + n) - np.maximum(p, a), 0, 1)
    assert np.abs(fit_mask(box_mask([box], shape), size) - np.outer(overlap(y, h), overlap(x, w))).max() < 1e-5
    assert np.allclose(unfit_box((x, y, w, h), shape, size), (box.x, box.y, box.w, box.h))
    assert patch_coverage(fit_mask(box_mask([box], shape), size)).sum() == pytest.approx(144 * w * h / size**2, rel=1e-4)


def test_film_and_mask_take_the_same_road():
    mask = np.zeros((300, 200), bool); mask[60:180, 20:90] = True
    assert np.abs(fit_square(mask[None].astype(np.float32), 77)[0] - fit_mask(mask, 77)).max() < 1e-6


def test_fitting_keeps_mean_aspect_and_range():
    image = np.random.default_rng(0).random((1, 517, 311), np.float32); fitted = fit_square(image, 128)
    same_contract(fitted)
    assert fitted.sum() / (128 * round(128 * 311 / 517)) == pytest.approx(float(image.mean()), abs=1e-4)
    columns = np.flatnonzero(fitted[0].max(0)); assert len(columns) == 77 and columns[0] == (128 - 77) // 2 and fitted[0].max(1).all()


def test_patches_are_row_major():
    mask = np.zeros((24, 24)); mask[2:4, 22:24] = 1                                                              # second row of patches, last column
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
    items[7][1].write_bytes(b"nothing"); items[12][1].unlink()
    return items


def counted(monkeypatch) -> list:
    "The paths that are decoded in this process from now on."
    seen, whole = [], radiograph.decode_film
    monkeypatch.setattr(radiograph, "decode_film", lambda path, size: (seen.append(Path(path).name), whole(path, size))[1])
    return seen


@pytest.mark.parametrize("workers", (0, 2))
def test_cache_is_the_films_and_names_its_failures(films, tmp_path, workers):
    cache, failures = cache_radiographs(films, tmp_path / "cache", 48, workers)
    assert [i for i, _ in failures] == ["s07", "s12"] and "neither DICOM" in failures[0][1] and "no such file" in failures[1][1]
    assert cache.ids == [i for i, _ in films if i not in ("s07", "s12")] and len(cache) == 18 and cache.size == 48
    for i, path in films:
        if i in cache.row: assert np.abs(cache[i] - load_radiograph(path, 48)).max() <= 1 / 255
    order = cache.ids[::-1]; batch = cache.batch(order)
    assert batch.shape == (18, 1, 48, 48) and batch.dtype == np.float32 and np.array_equal(batch[0], cache[order[0]])
    again = RadiographCache(tmp_path / "cache"); assert again.ids == cache.ids and again.failures == failures
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir() if p.name != ".lock") == [".json", ".npy"], "nothing is left lying about"


def test_cache_is_reused_and_follows_its_inputs(films, tmp_path, monkeypatch):
    seen = counted(monkeypatch); make = lambda items, size=32: (seen.clear(), cache_radiographs(items, tmp_path / "cache", size, 0))[1]
    make(films); assert len(seen) == 20
    cache, failures = make(films); assert seen == [] and len(failures) == 2
    changed = films[3][1]; save(changed, drawing()[::-1].copy(), WindowCenter=500, WindowWidth=1000)
    cache, _ = make(films); assert seen == [changed.name] and np.abs(cache["s03"] - load_radiograph(changed, 32)).max() <= 1 / 255
    stat = changed.stat(); data = bytearray(changed.read_bytes()); data[-500:] = bytes(500); changed.write_bytes(data); os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    make(films); assert seen == [changed.name], "same length, other time"
    save(films[12][1], drawing()); cache, failures = make(films); assert [i for i, _ in failures] == ["s07"] and seen == [films[12][1].name]
    cache, _ = make(films[::-1][:10]); assert seen == [] and cache.ids == [i for i, _ in films[::-1][:10]]
    make(films, 40); assert len(seen) == 20, "another size is another cache"
    monkeypatch.setattr(radiograph, "RECIPE", 99); make(films, 40); assert len(seen) == 20, "another way of reading is another cache"


def test_damaged_cache_is_made_again(films, tmp_path, monkeypatch):
    cache, _ = cache_radiographs(films, tmp_path / "cache", 32, 0); expected = cache.batch(cache.ids); del cache
    seen = counted(monkeypatch); file = next((tmp_path / "cache").glob("films-*.npy"))
    os.truncate(file, 3000)
    with pytest.raises(NeuralError, match="damaged"): RadiographCache(tmp_path / "cache")
    cache, _ = cache_radiographs(films, tmp_path / "cache", 32, 0); assert len(seen) == 20 and np.array_equal(cache.batch(cache.ids), expected)
    (tmp_path / "cache/ids.json").write_text('{"file": ')
    with pytest.raises(NeuralError, match="damaged"): RadiographCache(tmp_path / "cache")
    assert len(cache_radiographs(films, tmp_path / "cache", 32, 0)[0]) == 18


def test_a_foreign_list_cannot_lead_out_of_the_folder(tmp_path):
    np.save(tmp_path / "outside.npy", np.zeros((1, 4, 4), np.uint8)); (tmp_path / "cache").mkdir()
    for name in ("../outside.npy", str(tmp_path / "outside.npy"), "films-0123456789abcdef.npy/../../outside.npy"):
        (tmp_path / "cache/ids.json").write_text(json.dumps(dict(file=name, size=4, names=["a"], keys=["k"], reasons=[""])))
        with pytest.raises(NeuralError, match="damaged"): RadiographCache(tmp_path / "cache")
    np.save(tmp_path / "cache/films-0123456789abcdef.npy", np.array([[[{}]]], object), allow_pickle=True)
    (tmp_path / "cache/ids.json").write_text(json.dumps(dict(file="films-0123456789abcdef.npy", size=1, names=["a"], keys=["k"], reasons=[""])))
    with pytest.raises(NeuralError, match="damaged"): RadiographCache(tmp_path / "cache")                         # a pickle is never opened


def test_stopped_run_is_carried_on(films, tmp_path, monkeypatch):
    whole = radiograph.decode_film
    def stop_at(path, size):
        if Path(path).name == "13.dcm": raise KeyboardInterrupt
        return whole(path, size)
    monkeypatch.setattr(radiograph, "decode_film", stop_at)
    with pytest.raises(KeyboardInterrupt): cache_radiographs(films, tmp_path / "cache", 32, 0)
    with pytest.raises(NeuralError, match="no cache of radiographs"): RadiographCache(tmp_path / "cache")           # half a cache is none
    journal, part = next((tmp_path / "cache").glob("*.journal")), next((tmp_path / "cache").glob("*.part"))
    with open(journal, "a") as f: f.write('[9, "", 12')                                                             # a line that was being written
    with open(part, "r+b") as f: f.seek(128 + 2 * 32 * 32 + 5); f.write(b"rubbish")                                 # and a film that was never finished
    monkeypatch.setattr(radiograph, "decode_film", whole); seen = counted(monkeypatch)
    cache, failures = cache_radiographs(films, tmp_path / "cache", 32, 0)
    assert "2.png" in seen and len(seen) < 20 and len(failures) == 2
    for i in cache.ids: assert np.abs(cache[i] - load_radiograph(dict(films)[i], 32)).max() <= 1 / 255


def test_killed_process_leaves_no_worker_and_no_cache(films, tmp_path):
    script = ("import sys, time, pathlib, neural.radiograph as r\n"
              "folder = pathlib.Path(sys.argv[1]); whole = r.decode_film\n"
              "def slow(path, size): time.sleep(.25); return whole(path, size)\n"
              "r.decode_film = slow\n"
              "r.cache_radiographs([(p.stem, p) for p in sorted(folder.glob('*.[dp][cn][mg]'))], folder/'cache', 32, 2)\n")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE)
    journal = lambda: sum(p.read_text().count("]") for p in (tmp_path / "cache").glob("*.journal")) if (tmp_path / "cache").is_dir() else 0
    for _ in range(600):
        if journal() or process.poll() is not None: break
        time.sleep(.02)
    children = [int(c) for t in Path(f"/proc/{process.pid}/task").iterdir() for c in (t / "children").read_text().split()]
    process.send_signal(signal.SIGKILL); process.wait()
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
    def crash(path, size): return os.kill(os.getpid(), signal.SIGKILL) if parent_process() and Path(path).name in ("4.png", "15.dcm") else whole(path, size)
    monkeypatch.setattr(radiograph, "decode_film", crash)
    cache, failures = cache_radiographs(films, tmp_path / "cache", 32, 2)
    assert {i for i, _ in failures} == {"s04", "s07", "s12", "s15"} and "crashed" in dict(failures)["s04"] and len(cache) == 16


def test_two_processes_do_not_fill_one_folder(films, tmp_path):
    (tmp_path / "cache").mkdir()
    with FileLock(tmp_path / "cache/.lock"), pytest.raises(NeuralError, match="another process is filling"): cache_radiographs(films, tmp_path / "cache", 32, 0)


def test_full_disk_is_said(films, tmp_path, monkeypatch):
    class Full:
        def __init__(self, file): self.file = file
        def __getattr__(self, name): return getattr(self.file, name)
        def write(self, data): raise OSError(28, "No space left on device")
    start = radiograph.Draft.__init__
    def full(self, *args): start(self, *args); self.file = Full(self.file)
    monkeypatch.setattr(radiograph.Draft, "__init__", full)
    with pytest.raises(NeuralError, match="No space left on device.*make room"): cache_radiographs(films, tmp_path / "cache", 32, 0)


def test_cache_travels_to_a_worker_without_its_films(films, tmp_path):
    cache, _ = cache_radiographs(films, tmp_path / "cache", 64, 0); sent = pickle.dumps(cache)
    assert len(sent) < 1000 and np.array_equal(pickle.loads(sent)["s01"], cache["s01"])


def test_quiet_in_a_pipe(films, tmp_path, capfd):
    cache_radiographs(films, tmp_path / "cache", 32, 2)
    assert capfd.readouterr() == ("", "")


def test_importing_is_light():
    "Workers and the command line pay for what they use: no torch, no plotting."
    code = "import sys, neural.radiograph; print([m for m in ('torch', 'matplotlib', 'pandas', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_real_pictures_are_cached_as_they_are(real_data, tmp_path):
    items = [(p.stem, p) for p in sorted((real_data / "real_cxr_dev/openi256").glob("*.jpg"))[:60]]
    cache, failures = cache_radiographs(items, tmp_path / "cache", 128)
    assert len(cache) == 60 and failures == []
    for i, path in items[::15]: assert np.abs(cache[i] - load_radiograph(path, 128)).max() <= 1 / 255


def test_a_jpeg_2000_film_decoded_coarsely_equals_one_decoded_whole(tmp_path):
    ds = dataset(drawing(1024, 896), WindowCenter=2048, WindowWidth=4096); ds.save_as(tmp_path / "plain.dcm", enforce_file_format=True)
    ds.compress(JPEG2000Lossless); ds.save_as(tmp_path / "j2k.dcm", enforce_file_format=True)
    assert [read_radiograph(tmp_path / "j2k.dcm", size).shape[1] for size in (0, 512, 256, 128, 64)] == [1024, 1024, 512, 256, 128]
    for size in (256, 200, 96): assert np.abs(load_radiograph(tmp_path / "j2k.dcm", size) - load_radiograph(tmp_path / "plain.dcm", size)).max() < 1e-2
    ds.PixelPaddingValue = 0; ds.save_as(tmp_path / "padded.dcm", enforce_file_format=True)
    assert read_radiograph(tmp_path / "padded.dcm", 96).shape[1] == 1024, "padding must not be blended with its neighbours"
