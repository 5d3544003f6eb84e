"Shared fixtures: where the real data lies, if it is here at all, and a small phantom cohort made once."
import os
import sys
from pathlib import Path

import pytest


def find_real_data() -> Path | None:
    "The folder of real test data: NEURAL_REAL_DATA, else `../shared/data` beside the checkout, else None."
    named = os.environ.get("NEURAL_REAL_DATA")
    if named: return Path(named)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return beside if beside.is_dir() else None


@pytest.fixture(scope="session")
def real_data() -> Path:
    "Real radiographs and reports; the test is skipped, with this reason, where they are not on the machine."
    found = find_real_data()
    if found is None: pytest.skip("real data not here: set NEURAL_REAL_DATA to its folder")
    if not (found / "real_cxr_dev" / "manifest.csv").is_file():
        pytest.fail(f"NEURAL_REAL_DATA names a folder without real_cxr_dev/manifest.csv: {found.name}")
    return found


@pytest.fixture(scope="session")
def phantom_cohort(tmp_path_factory) -> Path:
    "Sixty small phantom studies in the MIMIC-CXR layout, written once for the whole test session."
    from neural.cohort import write_cohort
    out = tmp_path_factory.mktemp("phantom") / "cohort"
    write_cohort(out, studies=60, size=256, seed=7, workers=2)
    return out


@pytest.fixture(scope="module", autouse=True)
def one_main():
    "A shell that runs notebooks puts itself in the place of `__main__`; processes begun later ask for the real one."
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


FIRST = ["test_fuzz.py", "test_by_hand.py", "test_matrix.py", "test_cli.py", "test_docs.py", "test_pipeline.py",
         "test_warmstart.py", "test_contribute.py", "test_cluster.py", "test_page.py"]


def pytest_collection_modifyitems(items):
    """The mutants come first: how much memory a reader takes is told best before other tests have left theirs about.
    Then the longest files, longest first, so that no worker is left alone with one of them at the end; but Ray, which
    gives up after half a minute, starts when the small run of `make test` has left the cores to the tests."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
