"""The example that pretrains a small BERT, and the examples that use its model: fine-tuning, pictures,
sweeps, comparisons of dtypes and of sensitivities."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from datasets import disable_progress_bars
from transformers import AutoModelForMaskedLM, AutoTokenizer

import grammar
import low_precision
import moments_fidelity
import noise_sweep
import pretrain
import run_glue
import sensitivity

disable_progress_bars()

pytestmark = pytest.mark.usefixtures("threads")  # the examples set torch's count

WIKI = (
    '<doc id="1" url="?curid=1" title="Empty">\nEmpty\n\n</doc>\n'
    '<doc id="2" url="?curid=2" title="Tea">\nTea\n\nTea &amp; milk.\nHistory.\n</doc>\n'
    '<doc id="3" url="?curid=3" title="Rain">\nRain\n\nIt rains.\n</doc>\n'
)
SIZES = (
    "--hidden_size",
    "16",
    "--num_hidden_layers",
    "1",
    "--num_attention_heads",
    "2",
    "--vocab_size",
    "300",
)


@pytest.fixture(scope="module")
def sentences() -> list[list[tuple[str, int]]]:
    return [list(rows) for rows in grammar.sentences(0, (400, 40))]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, sentences: list[list[tuple[str, int]]]) -> Path:
    """A model trained on thirty batches, with its record."""
    folder = tmp_path_factory.mktemp("pretrained")
    lines = [text for text, _ in sentences[0]]
    text = "\n\n".join(" ".join(lines[i : i + 20]) for i in range(0, len(lines), 20))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    files = ("--text", str(folder / "text.txt"), "--heldout_text", str(folder / "text.txt"))
    quick = ("--max_steps", "30", "--learning_rate", "1e-2", "--disable_tqdm", "true")
    pretrain.main([*files, *quick, *SIZES, "--max_seq_length", "32", "--output_dir", str(folder / "model")])
    return folder / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, sentences: list[list[tuple[str, int]]]) -> Path:
    """The grammar's sentences in the files of SST-2."""
    folder = tmp_path_factory.mktemp("data")
    for stem, rows in zip(("train", "dev"), sentences, strict=True):
        lines = [f"{text}\t{label}\n" for text, label in rows]
        (folder / f"{stem}.tsv").write_text("".join(["sentence\tlabel\n", *lines]), encoding="utf-8")
    return folder


@pytest.fixture
def finetuning(pretrained: Path, data: Path) -> list[str]:
    model = ["--model_name_or_path", str(pretrained), "--max_seq_length", "32", "--max_steps", "2"]
    task = ["--task_name", "sst2", "--data_dir", str(data), "--logging_steps", "1"]
    return [*model, *task, "--disable_tqdm", "true", "--eval_strategy", "no"]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_documents_of_a_wiki_come_without_markup_and_titles_alone(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"wiki{ending}"
    path.write_bytes(gzip.compress(WIKI.encode()) if ending else WIKI.encode())
    assert list(pretrain.documents(path)) == ["Tea\nTea & milk.\nHistory.", "Rain\nIt rains."]
    assert len(pretrain.read([str(path), str(path)])) == 4
    assert len(pretrain.read([str(path), str(path)], max_characters=len("Tea\nTea & milk.\nHistory."))) == 1


def test_documents_of_plain_text_lie_between_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("One\ntwo.\n\n\nThree.", encoding="utf-8")
    assert list(pretrain.documents(tmp_path / "text")) == ["One\ntwo.", "Three."]
    (tmp_path / "empty").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no text in .*empty"):
        pretrain.read([str(tmp_path / "empty")])


def test_it_learns_and_saves_what_transformers_loads(pretrained: Path) -> None:
    result = json.loads((pretrained / "pretraining.json").read_text())
    assert result["heldout_loss"]["after"] < result["heldout_loss"]["before"] - 0.5
    model = AutoModelForMaskedLM.from_pretrained(pretrained)
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    assert type(model).__module__.startswith("transformers.")
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.unk_token_id not in tokenizer("the dogs sleep .")["input_ids"]

    # The loss at the masked tokens alone is the loss that transformers computes.
    batch = tokenizer(
        ["the dog sleeps .", "the teacher of the students sleeps ."], padding=True, return_tensors="pt"
    )
    labels = batch["input_ids"].where(batch["input_ids"] % 2 == 0, torch.tensor(-100))
    ours = pretrain.BertForMaskedLM.from_pretrained(pretrained)
    expected, loss = (m.eval()(**batch, labels=labels).loss for m in (model, ours))
    torch.testing.assert_close(loss, expected)


def test_the_model_is_finetuned_and_drawn(
    pretrained: Path, data: Path, finetuning: list[str], tmp_path: Path
) -> None:
    result = run_glue.main([*finetuning, "--output_dir", str(tmp_path), "--seed", "3"])
    assert {run["method"] for run in result["runs"]} == {"adamw", "pats"}

    models = f"before={pretrained},AdamW={tmp_path / 'adamw-3'},PATS={tmp_path / 'pats-3'}"
    task = ["--task_name", "sst2", "--data_dir", str(data), "--max_seq_length", "32", "--seed", "3"]
    batches = ["--batches", "3", "--batch_size", "8"]
    drawn = sensitivity.main([*task, *batches, "--models", models, "--out", str(tmp_path / "drawn.png")])
    assert list(drawn) == ["before", "AdamW", "PATS"]
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "drawn.json").read_text())
    assert record["distributions"]["PATS"]["overall"]["gini"] == drawn["PATS"].overall.gini
    assert 0 < drawn["before"].overall.gini < 1


def test_a_sweep_continues_where_it_was(
    finetuning: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    options = ["--out", str(file), "--seeds", "1", "--noise_scales", "1e-3", "--plot", str(picture)]
    runs = noise_sweep.main([*options, "--methods", "adamw", "--", *finetuning])
    assert [run["method"] for run in runs] == ["adamw"]
    runs = noise_sweep.main([*options, "--methods", "adamw,pats", "--gammas", "0", "--", *finetuning])
    assert [(run["method"], run["noise_scale"], run["gamma"]) for run in runs] == [
        ("adamw", None, None),
        ("pats", 1e-3, 0.0),
    ]
    assert 0 < runs[1]["mean_gate"] < 1
    assert json.loads(file.read_text())["runs"] == runs
    assert picture.stat().st_size > 10_000
    assert noise_sweep.main([*options[:2]]) == runs  # the table alone
    assert "pats          0.001      0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other arguments"):
        noise_sweep.main([*options, "--", "--seed", "4"])


def test_dtypes_are_compared(pretrained: Path, tmp_path: Path) -> None:
    """With a learning rate too small for a bfloat16 that rounds to nearest."""
    text = str(pretrained.parent / "text.txt")
    out, picture = tmp_path / "runs.json", tmp_path / "runs.png"
    files = ["--model_name_or_path", str(pretrained), "--text", text, "--heldout_text", text]
    quick = ["--steps", "10", "--evaluations", "2", "--seeds", "7", "--max_seq_length", "32"]
    rates = ["--learning_rates", "1e-5", "--noise_scale", "1e-6", "--heldout_sequences", "8"]
    runs = low_precision.main([*files, *quick, *rates, "--out", str(out), "--plot", str(picture)])
    of = {run["storage"]: run for run in runs}
    assert list(of) == list(low_precision.STORAGES)
    assert {tuple(run["steps"]) for run in runs} == {(0, 5, 10)}
    # In ten steps float32 moves everything that had a gradient; a spacing is 2^-8 of a weight.
    exact, stochastic, nearest = (of[f"{name}"] for name in list(of)[:3])
    assert exact["moved_share"] > 0.5
    assert nearest["moved_share"] < 0.2 * stochastic["moved_share"] < 0.2 * exact["moved_share"]
    assert exact["sens_ratio"] == 1.0
    assert stochastic["sens_ratio"] == pytest.approx(1.0, abs=0.02)
    assert stochastic["heldout_loss"] == pytest.approx(exact["heldout_loss"], abs=0.02)
    assert json.loads(out.read_text())["runs"] == runs
    assert picture.stat().st_size > 10_000


def test_sensitivities_are_compared(pretrained: Path, data: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "fidelity.json", tmp_path / "fidelity.png"
    files = ["--model_name_or_path", str(pretrained), "--task_name", "sst2", "--data_dir", str(data)]
    quick = ["--steps", "4", "--at", "1,4", "--batch_size", "4", "--max_seq_length", "32"]
    entries = moments_fidelity.main([*files, *quick, "--out", str(out), "--plot", str(picture)])
    assert [(e["seed"], e["step"], e["comparison"]) for e in entries] == [
        (seed, step, name) for seed in (1, 2) for step in (1, 4) for name in moments_fidelity.COMPARISONS
    ]
    kinds = {e["comparison"]: e["kinds"] for e in entries if e["step"] == 4}
    for comparison in ("moments", "averages of longer memory", "moments, to averages of their memory"):
        assert 0.5 < kinds[comparison]["all"]["rank"] < 1
    # In the first step the moments' uncertainty is 0, and so is every gate; averages are averages.
    first = {e["comparison"]: e["kinds"]["all"] for e in entries if e["step"] == 1}
    assert first["moments"]["gate_a"] == 0 < first["moments"]["gate_b"]
    assert first["averages of longer memory"]["rank"] == pytest.approx(1.0, abs=1e-3)
    assert {"all", "word embeddings", "feed-forward", "LayerNorm"} <= set(kinds["moments"])
    assert json.loads(out.read_text())["entries"] == entries
    assert picture.stat().st_size > 10_000
    with pytest.raises(ValueError, match="two or more"):
        moments_fidelity.main([*files, *quick, "--seeds", "1", "--out", str(out)])
