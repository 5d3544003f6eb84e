"A paper that comes later: its stage and its network appear everywhere, and no file that was there before is changed."
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from torch import nn

from neural.docs import with_unlisted
from neural.image_model import _NETS, ImageModel, load_image_model, register_net, save_image_model
from neural.record import read_record
from neural.results import HEADLINE, card_markdown, collect_cards
from neural.study import NeuralError

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}

NETWORK = '''
"Strips: a network of one level that looks at patches of four pixels."
from torch import nn
from neural.image_model import register_net


class Strips(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width, self.look = width, nn.Conv2d(1, width, 4, 4)

    def levels(self, x):
        return {4: self.look(x).relu()}


@register_net("strips")
def strips(config):
    return Strips(config["widths"][0][0])
'''
DRAW = '''
import numpy as np
from neural.record import begin, record
run, begun = begin(run, "10_draw", globals(), {})
rng = np.random.default_rng(seed)
y = np.arange(80) % 2
films = rng.random((80, 16, 16)) * 0.5 + 0.3 * y[:, None, None]
np.savez(run / "films.npz", films=films.astype("float32"), y=y)
(run / "aside.txt").write_text("read by nobody")
record("10_draw", run, {"films": len(y)}, **begun)
'''
TEACH = '''
import numpy as np
import torch
from torch.nn import functional as F
from neural import strips
from neural.image_model import ImageModel, load_image_model, save_image_model
from neural.record import begin, record, run_command
from neural.results import Costs, System, count_parameters, predicted, report_card, write_card
from neural.study import make_folder
from neural.train import Training, fit
run, begun = begin(run, "60_strips", globals(), {"10_draw": ["films.npz"]})
held = np.load(run / "films.npz")
films, y = torch.as_tensor(held["films"])[:, None], torch.as_tensor(held["y"]).float()
torch.manual_seed(seed)
model = ImageModel(("Edema",), 16, ((8,),), net="strips")

def batches(epoch, generator):
    return [(films[:40], y[:40])]

def loss(model, batch):
    return {"label": F.binary_cross_entropy_with_logits(model.logits(batch[0])[:, 0], batch[1])}

optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
fit(model, batches, loss, optimiser, Training(20, seed=seed, progress=False))
save_image_model(model, run / "strips")
p = load_image_model(run / "strips").logits(films[40:])[:, 0].sigmoid().detach().numpy()
ids = [f"s{i}" for i in range(40, 80)]
system = System("strips network", "60_strips", "image-only")
said = predicted(system, seed, "test", "Edema", ids, {i: i for i in ids}, held["y"][40:], p)
costs = {system: Costs(parameters=count_parameters(model))}
card = report_card(said, costs, command=run_command(run, "60_strips"))
write_card(make_folder(run / "tables") / "60_strips_card.csv", card)
record("60_strips", run, {"parameters": count_parameters(model)}, **begun)
'''


def write_stage(path: Path, body: str, parameters="seed: int = 0  # of everything drawn"):
    "A stage notebook as its author would write it."
    tagged = new_code_cell(f'run: str = "."  # run folder\n{parameters}', metadata={"tags": ["parameters"]})
    title = new_markdown_cell(f"# {path.stem.split('_')[1].title()}\n\n> A stage of a paper that comes later.")
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[title, tagged, new_code_cell(body.strip())], metadata=KERNEL), path)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    "A checkout with one stage, to which a later paper has added a module and a stage, and nothing else."
    root = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "neural", root / "neural", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", root)
    write_stage(root / "nbs/paper/10_draw.ipynb", DRAW)
    home = new_markdown_cell("# Home\n\n> One page.")
    nbformat.write(new_notebook(cells=[home], metadata=KERNEL), root / "nbs/index.ipynb")
    listed = "[index.ipynb, {section: Stages, contents: [paper/10_draw.ipynb]}]"
    (root / "nbs/_quarto.yml").write_text(f"project: {{type: website}}\nwebsite:\n  sidebar:\n    contents: {listed}\n")
    (root / "neural/strips.py").write_text(NETWORK)
    write_stage(root / "nbs/paper/60_strips.ipynb", TEACH)
    return root


def call(house: Path, *words, module="neural.cli") -> str:
    "A command of the checkout's own library, as a shell would call it: all that it says."
    code = f"from {module} import main; main()"
    env = {**os.environ, "PYTHONPATH": str(house)}
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=house, env=env, capture_output=True, text=True)
    return done.stdout + done.stderr


def ran(said: str) -> list[str]:
    "Names of the stages that were not skipped."
    return re.findall(r"(?m)^(\d+_\w+) +[\d.]+ s ", said)


@pytest.fixture(scope="module")
def finished(house) -> Path:
    "The run folder after the first call."
    said = call(house, "run", "--run", "r", *["--strict"] * (sys.platform == "linux"))
    assert ran(said) == ["10_draw", "60_strips"], said
    return house / "r"


# where a new stage and a new network appear

def test_a_new_stage_is_run_and_listed(house, finished):
    assert set(read_record(finished, "60_strips")["parameters"]) >= {"seed"}
    assert "there are 10_draw, 60_strips" in call(house, "run", "61", "--run", "r")


def test_its_row_is_in_the_results_table_with_what_it_costs(finished):
    card = collect_cards(finished)
    rows = card[(card.metric == HEADLINE) & (card.target == "Edema")]
    assert rows.system.tolist() == ["strips network"] and rows.value.item() > 0.9
    assert rows.parameters.item() == 8 * 16 + 8 + 8 + 1
    assert "| strips network | 60_strips | image-only |" in card_markdown(rows)
    assert rows.command.item() == read_record(finished, "60_strips")["command"]


def test_it_is_left_alone_until_its_own_module_changes(house, finished):
    assert ran(call(house, "run", "--run", "r")) == []
    module = house / "neural/strips.py"
    module.write_text(NETWORK.replace("that looks", "that still looks"))
    assert ran(said := call(house, "run", "--run", "r")) == ["60_strips"] and "(library)" in said


def test_its_page_is_in_the_docs_and_nothing_was_listed_for_it(house):
    before = (house / "nbs/_quarto.yml").read_bytes()
    said = call(house, "--out", "pages", module="neural.docs")
    assert said.startswith("3 pages with 0 figures"), said
    page = BeautifulSoup((house / "pages/index.html").read_text(), "html.parser")
    links = {a["href"]: a.get_text().strip() for a in page.select("a[href]")}
    assert (house / "pages/paper/strips.html").is_file() and "Strips" in links["paper/strips.html"]
    assert "paper/strips.html" in (house / "pages/search.json").read_text()
    assert (house / "nbs/_quarto.yml").read_bytes() == before


def test_a_page_without_a_number_has_to_be_listed():
    contents = ["index.ipynb", {"section": "Stages", "contents": ["paper/10_draw.ipynb"]}]
    named = ["paper/10_draw.ipynb", "index.ipynb"]
    assert with_unlisted(contents, named) == contents
    more = with_unlisted(contents, [*named, "paper/60_strips.ipynb", "api/46_strips.ipynb"])
    assert more == [*contents, {"section": "More", "contents": ["api/46_strips.ipynb", "paper/60_strips.ipynb"]}]
    with pytest.raises(NeuralError, match="paper/notes.ipynb is not in the sidebar"):
        with_unlisted(contents, [*named, "paper/notes.ipynb"])


# a network that is found by its name

class Cells(nn.Module):
    "A mean grey for each cell of four pixels, in two channels."
    width = 2

    def levels(self, x):
        return {4: nn.functional.avg_pool2d(x, 4).repeat(1, 2, 1, 1)}


@pytest.fixture
def cells():
    "A network of another module, registered for one test."
    register_net("cells")(lambda config: Cells())
    yield "cells"
    _NETS.pop("cells", None)


def test_a_registered_network_has_the_face_of_all(cells, tmp_path):
    model = ImageModel(("a", "b"), 16, net=cells, sharpness=0.0).eval()
    nn.init.normal_(model.head.weight)
    films = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        grey = (nn.functional.avg_pool2d(films, 4).flatten(1) - 0.45) / 0.25
        wanted = grey[..., None] * model.head.weight.sum(1)
        torch.testing.assert_close(model.patch_logits(films), wanted)
        torch.testing.assert_close(model.logits(films), wanted.mean(1))
        save_image_model(model, tmp_path / "model")
        assert torch.equal(load_image_model(tmp_path / "model")(films), model(films))
    _NETS.pop(cells)
    with pytest.raises(NeuralError, match="no network is called 'cells': import the module"):
        load_image_model(tmp_path / "model")
    with pytest.raises(NeuralError, match="choose one of levels, efficientnet-lite0"):
        ImageModel(("a",), 16, net=cells)


@pytest.mark.parametrize("name", ["levels", "efficientnet-lite0", "cells", "Cells", "two words", "-", ""])
def test_a_network_needs_a_name_of_its_own(cells, name):
    before = dict(_NETS)
    with pytest.raises(NeuralError, match="a name of its own"):
        register_net(name)(lambda config: torch.nn.Identity())
    assert _NETS == before


# the page that tells how

def test_the_page_runs_and_ends_as_committed(tmp_path):
    page = nbformat.read(ROOT / "nbs/contribute.ipynb", 4)
    told = [output["data"]["text/plain"] for output in page.cells[-1].outputs]
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(page, kernel_name="python3", timeout=300, resources=where).execute()
    assert [output["data"]["text/plain"] for output in page.cells[-1].outputs] == told != []
    assert "[2, 0, 2]" in told[0] and "own-patch network" in told[0]
    assert list(tmp_path.iterdir()) == [], "the page leaves nothing behind"
