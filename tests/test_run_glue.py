"""The example that fine-tunes on GLUE: its readers, grammar and metrics, and every method end to end."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import disable_progress_bars
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import TrainerState

import glue_data
import glue_methods
import grammar
import run_glue
from glue_data import TASKS

disable_progress_bars()

pytestmark = pytest.mark.usefixtures("threads")  # the examples set torch's count

TINY = ("--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "1")
SHORT = ("--max_train_samples", "48", "--max_eval_samples", "24", "--per_device_train_batch_size", "8")
QUICK = (*TINY, *SHORT, "--eval_strategy", "no", "--disable_tqdm", "true", "--logging_steps", "1")


def finetune(output: Path, *arguments: str, steps: int = 3) -> dict[str, Any]:
    return run_glue.main([*QUICK, "--max_steps", str(steps), "--output_dir", str(output), *arguments])


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as raised:
        run_glue.main(arguments)
    return str(raised.value)


# Files, as GLUE has them

MNLI = "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
FILES = {
    # task: its train file, its texts and labels
    "cola": (
        # no header, no newline at the end
        'gj04\t1\t\tHe said "no" to\'t.\ngj04\t0\t*\tThey drank "the pub.',
        {"sentence": ['He said "no" to\'t.', 'They drank "the pub.'], "label": [1, 0]},
    ),
    "sst2": (
        "sentence\tlabel\nit 's a charming journey . \t1\n` bleak '' and \" desperate \t0\n",
        {"sentence": ["it 's a charming journey . ", "` bleak '' and \" desperate "], "label": [1, 0]},
    ),
    "mrpc": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\t" A , \tB " .\n0\t3\t4\tC\t"D"\n',
        {"sentence1": ['" A , ', "C"], "sentence2": ['B " .', '"D"'], "label": [1, 0]},
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tnews\tMSRvid\t2012\t0001\tnone\tnone\tA plane.\tAn air plane.\t5.000\n"
        "1\tnews\tMSRvid\t2012\t0002\tnone\tnone\tA dog.\tA saw.\t0\n",
        {"sentence1": ["A plane.", "A dog."], "sentence2": ["An air plane.", "A saw."], "label": [5.0, 0.0]},
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow so?\t1\n7\tbroken\n"
        "1\t3\t4\tWho?\tWhen?\t0\n",
        {"question1": ["Why?", "Who?"], "question2": ["How so?", "When?"], "label": [1, 0]},
    ),
    "mnli": (
        f"{MNLI}0\t1\t1n\tfiction\tHe left.\tHe stayed.\tneutral\tcontradiction\n"
        "1\t2\t2e\tfiction\tIt rains.\tWater falls.\tneutral\tentailment\n",
        {
            "premise": ["He left.", "It rains."],
            "hypothesis": ["He stayed.", "Water falls."],
            "label": [2, 0],
        },
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tWhen?\tIn 1990.\tentailment\n1\tWho?\tNo.\tnot_entailment\n",
        {"question": ["When?", "Who?"], "sentence": ["In 1990.", "No."], "label": [0, 1]},
    ),
    "rte": (
        'index\tsentence1\tsentence2\tlabel\n0\tA "B\tC\tnot_entailment\n1\tD\tE\tentailment\n',
        {"sentence1": ['A "B', "D"], "sentence2": ["C", "E"], "label": [1, 0]},
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t1\n1\tC\tD\t0\n",
        {"sentence1": ["A", "C"], "sentence2": ["B", "D"], "label": [1, 0]},
    ),
}


def write(folder: Path, task: str, text: str | None = None, gz: bool = False) -> Path:
    """Writes the task's files, all with the same rows."""
    folder.mkdir(parents=True, exist_ok=True)
    content = (FILES[task][0] if text is None else text).encode()
    for stem in TASKS[task].files.values():
        if gz:
            (folder / f"{stem}.tsv.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{stem}.tsv").write_bytes(content)
    return folder


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("gz", [False, True])
def test_files_are_read_as_glue_writes_them(tmp_path: Path, task: str, gz: bool) -> None:
    write(tmp_path / TASKS[task].folder, task, gz=gz)
    for folder in (tmp_path, tmp_path / TASKS[task].folder):
        found, data = glue_data.load(task, str(folder))
        assert found is TASKS[task]
        assert list(data) == list(found.files)
        for rows in data.values():
            assert rows.to_dict() == FILES[task][1]


def test_rows_that_lack_a_field_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    glue_data.load("qqp", str(write(tmp_path, "qqp")))
    assert "train.tsv: 1 rows" in caplog.text


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("sst2", FILES["rte"][0], r"train.tsv: no column 'sentence' \(it has 'index', 'sentence1'"),
        (
            "rte",
            "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tperhaps\n",
            "tsv:2: label 'perhaps' is not one",
        ),
        ("stsb", FILES["stsb"][0].replace("5.000", "high"), "tsv:2: label 'high' is not a number"),
        ("sst2", "sentence\tlabel\n", "train.tsv: no rows"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, task: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glue_data.load(task, str(write(tmp_path, task, text)))


def test_the_hub_is_asked_for_glue(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> dict[str, str]:
        asked.append((*arguments, options))
        return dict.fromkeys(("train", "validation_matched", "validation_mismatched", "test_matched"), "rows")

    monkeypatch.setattr(glue_data, "load_dataset", load_dataset)
    _, data = glue_data.load("mnli", None, "cache")
    assert asked == [("nyu-mll/glue", "mnli", {"cache_dir": "cache"})]
    assert list(data) == ["train", "validation_matched", "validation_mismatched"]


# The grammar


@pytest.fixture(scope="module")
def sentences() -> list[list[tuple[str, int]]]:
    return grammar.sentences(0, (6000, 1000))


def test_the_grammar_is_deterministic(sentences: list[list[tuple[str, int]]]) -> None:
    assert grammar.sentences(0, (6000, 1000)) == sentences
    assert grammar.sentences(1, (6000, 1000)) != sentences


def test_the_grammars_sets_are_disjoint_and_balanced(sentences: list[list[tuple[str, int]]]) -> None:
    every = [sentence for drawn in sentences for sentence, _ in drawn]
    assert len(set(every)) == len(every) == 7000  # so none is acceptable here and unacceptable there
    for drawn in sentences:
        assert Counter(label for _, label in drawn) == {0: len(drawn) // 2, 1: len(drawn) // 2}


def test_single_words_do_not_tell(sentences: list[list[tuple[str, int]]]) -> None:
    train, validation = sentences
    words = [{word for s, label in train if label == kind for word in s.lower().split()} for kind in (0, 1)]
    assert {word.strip(".?") for word in words[0]} == {word.strip(".?") for word in words[1]}
    counts = CountVectorizer()
    classifier = LogisticRegression(max_iter=500)
    classifier.fit(counts.fit_transform([s for s, _ in train]), [label for _, label in train])
    # Chance is 0.5 with a standard error of 0.016 over 1,000 sentences.
    score = classifier.score(counts.transform([s for s, _ in validation]), [label for _, label in validation])
    assert score == pytest.approx(0.5, abs=4 * 0.016)


@pytest.mark.parametrize("paradigm", grammar.PARADIGMS)
def test_a_pair_differs_little(paradigm: Any) -> None:
    """Only in the order of its words, or in one word."""
    words = grammar.Words(grammar.random.Random(0))
    for _ in range(50):
        good, bad = (Counter(sentence.split()) for sentence in paradigm(words))
        assert sum((good - bad).values()) == sum((bad - good).values()) <= 1


# Metrics


def test_metrics_have_their_known_values() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])  # 0 1 1 0 1
    labels = np.array([0, 1, 0, 1, 1])  # 2 true positives, 1 false, 1 true negative, 1 false
    assert TASKS["sst2"].score(labels, logits) == {"accuracy": 0.6}
    assert TASKS["mrpc"].score(labels, logits) == pytest.approx({"f1": 2 / 3, "accuracy": 0.6})
    # (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)
    assert TASKS["cola"].score(labels, logits) == pytest.approx({"matthews": 1 / 6, "accuracy": 0.6})


def test_metrics_of_regression() -> None:
    scores = np.array([0.0, 1.0, 2.0, 4.0])
    outputs = np.array([[0.0], [1.0], [4.0], [16.0]])  # the same order, another curve
    measured = TASKS["stsb"].score(scores, outputs)
    assert measured == pytest.approx({"pearson": np.corrcoef(scores, outputs[:, 0])[0, 1], "spearman": 1.0})
    for nothing in (1.0, np.nan):
        assert TASKS["stsb"].score(scores, np.full((4, 1), nothing)) == {"pearson": 0.0, "spearman": 0.0}


# Methods


def test_every_method_with_two_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ("adamw", "noise", "noisytune", "pats")
    result = finetune(tmp_path, "--method", ",".join(methods), "--seeds", "1,2")
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert [(run["method"], run["seed"]) for run in result["runs"]] == [
        (method, seed) for seed in (1, 2) for method in methods
    ]
    assert result["samples"] == {"train": 48, "validation": 24}
    assert result["arguments"]["method"]["noise_scale"] == 1e-3
    assert result["versions"]["torch"] == torch.__version__
    for run in result["runs"]:
        losses = [entry["loss"] for entry in run["log_history"] if "loss" in entry]
        assert len(losses) == 3
        assert np.isfinite(losses).all()
        assert run["train"]["train_runtime"] > 0
        assert (tmp_path / f"{run['method']}-{run['seed']}" / "model.safetensors").exists()
    assert result["parameters"] == sum(
        tensor.numel() for tensor in run_glue_model(tmp_path / "adamw-1").state_dict().values()
    )
    spread = result["summary"]["pats"]["validation"]["matthews"]
    values = [run["metrics"]["validation"]["matthews"] for run in result["runs"] if run["method"] == "pats"]
    assert spread["values"] == values
    assert (spread["mean"], spread["std"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    printed = capsys.readouterr().out.rpartition("train s")[2]
    assert all(method in printed for method in methods)


def run_glue_model(folder: Path) -> nn.Module:
    return run_glue.AutoModelForSequenceClassification.from_pretrained(folder)


def test_without_noise_every_method_is_adamw(tmp_path: Path) -> None:
    """The methods differ only by their noise: weights, data and order are the same."""
    arguments = ("--noise_scale", "0", "--noisytune_lambda", "0", "--seeds", "1")
    methods = ("adamw", "noise", "noisytune", "pats")
    finetune(tmp_path, "--method", ",".join(methods), *arguments)
    models = [run_glue_model(tmp_path / f"{name}-1").state_dict() for name in methods]
    for model in models:
        # Softmax ignores it, so its gradient is only rounding errors, of which AdamW makes steps of lr.
        del model["bert.encoder.layer.0.attention.self.key.bias"]
    for other in models[1:]:
        # PATSAdamW's arithmetic may round otherwise than torch's: three steps of at most lr = 1e-3 each.
        torch.testing.assert_close(other, models[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["noise", "pats"])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, method: str) -> None:
    arguments = ("--method", method, "--seed", "1", "--save_strategy", "steps", "--save_steps", "2")
    finetune(tmp_path, *arguments, steps=4)
    folder = tmp_path / f"{method}-1"
    whole = run_glue_model(folder).state_dict()
    resumed = tmp_path / "resumed"
    finetune(resumed, *arguments, "--resume_from_checkpoint", str(folder / "checkpoint-2"), steps=4)
    again = run_glue_model(resumed / f"{method}-1").state_dict()
    assert all(again[name].equal(whole[name]) for name in whole)


def test_true_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    arguments = ("--output_dir", str(tmp_path), "--resume_from_checkpoint", "true")
    training = run_glue.parse(arguments).training.of_run("pats", 1)
    assert run_glue.checkpoint(training) is None
    for step in (2, 10):
        (tmp_path / "pats-1" / f"checkpoint-{step}").mkdir(parents=True)
    assert run_glue.checkpoint(training) == str(tmp_path / "pats-1" / "checkpoint-10")


def test_the_tokenizer_is_the_same_every_time() -> None:
    """The trainer's own numbering of pieces changes from call to call."""
    rows = glue_data.generated(counts=(400, 10))["train"]
    vocabularies = [run_glue.train_tokenizer(glue_data.GRAMMAR_TASK, rows, 150).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert len(vocabularies[0]) == 150


def test_a_pair_task_from_a_configuration_file_in_bfloat16(tmp_path: Path) -> None:
    """Regression, gradient accumulation and a pretrained model, all from JSON."""
    pair = write(tmp_path / "glue" / "STS-B", "stsb")
    finetune(tmp_path / "first", "--task_name", "stsb", "--data_dir", str(pair), "--method", "adamw")
    configuration = {
        "model_name_or_path": str(tmp_path / "first" / "adamw-42"),
        "task_name": "stsb",
        "data_dir": str(tmp_path / "glue"),
        "method": "pats",
        "bf16": True,
        "use_cpu": True,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "eval_strategy": "no",
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "second"),
    }
    file = tmp_path / "configuration.json"
    file.write_text(json.dumps(configuration))
    result = run_glue.main([str(file)])
    assert set(result["summary"]["pats"]["validation"]) == {"pearson", "spearman"}
    assert result["arguments"]["training"]["learning_rate"] == 2e-5  # what a pretrained model gets
    assert result["arguments"]["method"]["noise_scale"] == 1e-5
    assert result["runs"][0]["seed"] == 42


def test_both_of_mnlis_validation_sets_are_evaluated(tmp_path: Path) -> None:
    result = finetune(
        tmp_path / "out",
        "--task_name",
        "mnli",
        "--data_dir",
        str(write(tmp_path, "mnli")),
        "--method",
        "adamw",
    )
    assert list(result["summary"]["adamw"]) == ["validation_matched", "validation_mismatched"]


def test_noise_is_as_big_everywhere() -> None:
    model = nn.Linear(100, 100)
    before = [param.detach().clone() for param in model.parameters()]
    callback = glue_methods.NoiseCallback(1e-2, seed=3)
    callback.on_pre_optimizer_step(None, TrainerState(), None, model=model)
    added = [param.detach() - old for param, old in zip(model.parameters(), before, strict=True)]
    # 10,000 draws: the standard deviation of their standard deviation is 0.7 %.
    assert added[0].std().item() == pytest.approx(1e-2, rel=0.04)
    assert added[1].abs().min() > 0


def test_noisytune_scales_with_each_matrix() -> None:
    model = nn.ModuleDict({"wide": nn.Linear(100, 100), "one": nn.Linear(1, 1)})
    wide, one = model["wide"].weight, model["one"].bias
    before, single, std = wide.detach().clone(), one.item(), wide.std().item()
    glue_methods.noisytune_(model, 0.15, seed=0)
    added = (wide.detach() - before).abs()
    assert added.max().item() == pytest.approx(0.075 * std, rel=0.01)  # the most of 10,000 uniform draws
    assert one.item() == single


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task_name", "colla"), "Unknown task: 'colla' (known: cola, sst2, mrpc,"),
        (
            ("--method", "adamw,sam"),
            "Unknown method: 'sam' (known: adamw, noise, isotropic, noisytune, neft",
        ),
        (("--seeds", "1;2"), "Invalid seeds: '1;2' (integers, separated by commas)"),
        (("--noise_scale", "-2"), "Invalid noise_scale: -2.0 (must be >= 0)"),
        (("--data_dir", "somewhere"), "--data_dir somewhere needs a --task_name: one of cola,"),
        (("--resume_from_checkpoint", "somewhere"), "--resume_from_checkpoint PATH is for one run"),
        (("no-such-file.json",), "no-such-file.json"),
    ],
)
def test_a_bad_argument_says_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    assert message in refusal(*arguments)


def test_a_folder_without_the_task_says_where_it_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "RTE", "rte")
    (tmp_path / "RTE" / "dev.tsv").unlink()
    for task, folder in (("cola", tmp_path), ("rte", tmp_path), ("rte", tmp_path / "missing")):
        assert refusal("--task_name", task, "--data_dir", str(folder)) == (
            f"run_glue.py: {task}: not all of train.tsv[.gz], dev.tsv[.gz] found in "
            f"{folder / TASKS[task].folder} nor {folder}"
        )


def test_a_hub_out_of_reach_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(glue_data, "load_dataset", load_dataset)
    message = "nyu-mll/glue, rte, could not be loaded from the hub: no route. --data_dir reads local files."
    assert message in refusal("--task_name", "rte")
