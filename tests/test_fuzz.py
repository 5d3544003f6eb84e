"Twenty thousand mutated inputs: each is read right or refused in one line, in bounded time and memory. Past failures are kept in tests/corpus."
import signal
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

import neural.asset as asset_module
from neural.asset import AssetError, AssetStore, StudyAsset, vocabulary_hash
from neural.codec import fit_pq
from neural.picture import encode_tiles, thumbnail
from neural.radiograph import read_radiograph
from neural.study import NeuralError

CORPUS = Path(__file__).parent / "corpus"
fuzz = lambda n: settings(max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
WORDS = ("lung", "pneumonia")
PROVENANCE = {"vocabulary_hash": vocabulary_hash(WORDS), "keep_ratio": 0.023, "fusion": "grounding"}
BOOK = fit_pq(np.random.default_rng(0).normal(size=(300, 8)), 4)


def asset_of(i, **over):
    rng = np.random.default_rng(i)
    fields = dict(study_id=f"s{i}", track="image+report", grid=(12, 12), patches=np.sort(rng.choice(144, 3, replace=False)), relevance=rng.random(3), features=rng.normal(size=(3, 8)), concepts=[0, 1],
                  assertions=[0, 2], relations=[[1, 0, 0]], grounding=[[1, 2]], weights=[1.0], provenance=PROVENANCE)
    return StudyAsset(**{**fields, **over})


film = np.random.default_rng(3).random((1, 96, 96), np.float32)
VALID = [asset_of(0), asset_of(1, codec="f16"), asset_of(2, codec="f32"), asset_of(3, codec="pq", book=BOOK), asset_of(4, thumbnail=thumbnail(film, 400, "webp"), pixels=encode_tiles(film, [1, 2, 3], (12, 12)))]
BYTES = [a.to_bytes() for a in VALID] + [(Path(__file__).parent / "fixtures/store-v1/study.asset").read_bytes()]


@contextmanager
def within_a_second():
    "A second of processor time, not of the clock: a busy machine is no failure."
    def late(*_): raise TimeoutError("more than a second of processor time")
    old = signal.signal(signal.SIGVTALRM, late); signal.setitimer(signal.ITIMER_VIRTUAL, 1)
    try: yield
    finally: signal.setitimer(signal.ITIMER_VIRTUAL, 0); signal.signal(signal.SIGVTALRM, old)


@st.composite
def mutated(draw, originals, seal=None):
    "One of some valid files, damaged as accidents and enemies do: bits, cuts, hostile lengths, pieces of another file, deep nesting."
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        kind, at = draw(st.integers(0, 6)), draw(st.integers(0, max(len(data) - 1, 0)))
        if not data: break
        if kind == 0: data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1: del data[at:]
        elif kind == 2: n = draw(st.sampled_from([1, 2, 4, 8])); data[at : at + n] = draw(st.sampled_from([b"\xff", b"\x7f", b"\x80", b"\0"])) * n
        elif kind == 3: data[at:at] = draw(st.binary(max_size=30))
        elif kind == 4: data[at : at + 40] = draw(st.sampled_from(originals))[at : at + 40]
        elif kind == 5: data[at:at] = draw(st.sampled_from([b"[", b'{"a":', b"\x1c"])) * draw(st.sampled_from([50, 3000]))
        else: del data[at : at + draw(st.integers(1, 12))]
    return seal(bytes(data)) if seal and draw(st.booleans()) else bytes(data)


def resealed(data): return data[:-8] + asset_module._digest(data[:-8])


def read_asset(data, most):
    "The asset, or None for a clean refusal; what else happens is a failure."
    tracemalloc.reset_peak()
    start = tracemalloc.get_traced_memory()[0]
    try:
        with within_a_second(): found = StudyAsset.from_bytes(data, BOOK)
    except AssetError as e: assert "\n" not in str(e); found = None
    assert tracemalloc.get_traced_memory()[1] - start <= most
    return found


@pytest.fixture(scope="module")
def traced():
    "The memory that reading the largest valid asset takes, twice, and the size of the mutants' surplus."
    tracemalloc.start()
    for data in BYTES: StudyAsset.from_bytes(data, BOOK)
    tracemalloc.reset_peak(); start = tracemalloc.get_traced_memory()[0]
    for data in BYTES: StudyAsset.from_bytes(data, BOOK)
    yield 2 * (tracemalloc.get_traced_memory()[1] - start) + 40_000
    tracemalloc.stop()


@fuzz(15_000)
@given(data=mutated(BYTES, resealed))
def test_mutated_assets(traced, data):
    found = read_asset(data, traced)
    if found is not None: assert data in (found.to_bytes(), asset_module._bytes_1(found) if found.codec in ("int8", "f16") and not found.thumbnail and not found.pixels else b"")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    "A store of two shards, as files."
    folder = tmp_path_factory.mktemp("fuzz") / "s"
    store = AssetStore.create(folder, WORDS, dim=8, provenance=PROVENANCE)
    for start in (0, 3): store.append([asset_of(i) for i in range(start, start + 3)])
    return folder, {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@fuzz(3_000)
@given(choice=st.data())
def test_mutated_stores(shards, choice):
    folder, files = shards
    name = choice.draw(st.sampled_from(sorted(files)))
    data = choice.draw(mutated([files[name], *(f for n, f in sorted(files.items()) if n[-4:] == name[-4:])]))
    (folder / name).write_bytes(data)
    pool = pa.default_memory_pool(); before = pool.bytes_allocated()
    try:
        with within_a_second():
            try: store = AssetStore(folder); read = list(store); clean = not store.verify()
            except AssetError as e: assert "\n" not in str(e); read, clean = [], False
        assert not clean or data == files[name] or name == "store.json"
        assert all(a == asset_of(int(a.study_id[1:])) for a in read) or name == "store.json"        # store.json may name another provenance
        assert pool.bytes_allocated() - before < 50_000_000
    finally: (folder / name).write_bytes(files[name])


def dicoms():
    "Two small radiographs, plain and run-length coded."
    out = []
    for syntax in (ExplicitVRLittleEndian, RLELossless):
        ds = pydicom.Dataset(); ds.file_meta = pydicom.dataset.FileMetaDataset(); ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3", "DX"
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 16, 20, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.WindowCenter, ds.WindowWidth, ds.RescaleSlope, ds.RescaleIntercept = 2048, 4096, 1, 0
        ds.PixelData = (np.arange(320, dtype=np.uint16) * 12).tobytes()
        if syntax == RLELossless: ds.compress(RLELossless, generate_instance_uid=False)
        f = pydicom.filebase.DicomBytesIO(); pydicom.dcmwrite(f, ds, enforce_file_format=True); out.append(f.getvalue())
    return out


DICOMS = dicoms()


@fuzz(2_000)
@given(data=mutated(DICOMS))
@pytest.mark.filterwarnings("ignore")
def test_mutated_dicoms(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutant.dcm"
    path.write_bytes(data)
    try:
        with within_a_second(): image = read_radiograph(path)
    except NeuralError as e: assert "\n" not in str(e); return
    assert image.ndim == 3 and image.size < 10**8 and np.isfinite(image).all() and 0 <= image.min() and image.max() <= 1


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda p: p.name)
def test_past_failures(path, tmp_path):
    data = path.read_bytes()
    try:
        with within_a_second(): read_radiograph(path) if path.suffix == ".dcm" else StudyAsset.from_bytes(data, BOOK)
    except NeuralError as e: assert "\n" not in str(e)
