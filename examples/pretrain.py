"""Pretrains a small BERT on text files, to have a model to fine-tune if no pretrained weights are available.

python examples/pretrain.py --text wiki_AA_00-39.gz --heldout_text wiki_AA_62.gz --output_dir runs/pretrained
python examples/run_glue.py --model_name_or_path runs/pretrained --task_name sst2 --max_seq_length 64

It trains WordPiece on the text, then the model learns to fill in masked tokens. Files are plain text with
blank lines between documents, or in WikiExtractor's `<doc ...>` format; both may be compressed (.gz). Besides
its own arguments, it takes all of `transformers.TrainingArguments`.
"""

import gzip
import html
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    BertTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import MaskedLMOutput

from run_glue import bert_config

ALPHABET = 200  # characters with their own tokens; a word with any other character is [UNK]
SHORTEST = 16  # fewest tokens in a sequence; shorter ends of documents are left out


@dataclass
class PretrainingArguments:
    """The text, and the model's sizes."""

    text: list[str] = field(metadata={"help": "Files to train on"})
    heldout_text: list[str] = field(default_factory=list, metadata={"help": "Files to evaluate on"})
    max_characters: int | None = field(default=None, metadata={"help": "Characters to use, from the start"})
    vocab_size: int = field(default=8000, metadata={"help": "Largest number of tokens"})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens in a sequence"})
    hidden_size: int = field(default=128, metadata={"help": "Width"})
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers"})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads"})
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout of hidden states and attention; saved with the model"}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens to mask"})


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults for a short run of a small model."""

    output_dir: str | None = field(
        default="runs/pretrained", metadata={"help": "Folder for model and tokenizer"}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the text"})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sequences per device and step"})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Sequences per device and step"})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps; below 1, a share of all steps"})
    save_strategy: str = field(default="no", metadata={"help": "When to save a checkpoint: no, steps, epoch"})
    logging_steps: float = field(default=100, metadata={"help": "Steps; below 1, a share of all steps"})


class Arguments(NamedTuple):
    model: PretrainingArguments
    training: RunArguments


class BertForMaskedLM(transformers.BertForMaskedLM):
    """transformers' model, with the head, the slowest part of a small model, only at the masked tokens."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **kwargs: Any
    ) -> MaskedLMOutput:
        hidden = self.bert(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        masked = labels != -100
        loss = cross_entropy(self.cls(hidden[masked]), labels[masked])
        return MaskedLMOutput(loss=loss)  # pyright: ignore[reportArgumentType]


def documents(path: str | Path) -> Iterator[str]:
    """The texts of a file, without markup. Documents with only a title are left out."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        wiki = file.readline().startswith("<doc ")
        file.seek(0)
        title = 1 if wiki else 0  # the first line of a document
        lines: list[str] = []
        for line in (*file, "</doc>" if wiki else ""):
            line = line.strip()
            if line.startswith("<doc "):
                lines = []
            elif line == "</doc>" or not (line or wiki):
                if len(lines) > title:
                    yield html.unescape("\n".join(lines))
                lines = []
            elif line:
                lines.append(line)


def read(paths: Sequence[str], max_characters: int | None = None) -> list[str]:
    """The documents of all files, in order, until they have `max_characters` characters."""
    texts: list[str] = []
    total = 0
    for path in paths:
        for text in documents(path):
            if max_characters is not None and total >= max_characters:
                return texts
            texts.append(text)
            total += len(text)
    if not texts:
        raise ValueError(f"no text in {', '.join(map(str, paths)) or 'no file'}")
    return texts


def train_tokenizer(texts: Sequence[str], arguments: PretrainingArguments) -> BertTokenizer:
    """BERT's WordPiece on the most frequent characters. The same text gives the same vocabulary."""
    untrained = BertTokenizer()
    counts = Counter[str]()
    for text in texts:
        counts.update(untrained.backend_tokenizer.normalizer.normalize_str(text))
    alphabet = sorted(character for character, _ in counts.most_common(ALPHABET) if not character.isspace())
    trained = untrained.train_new_from_iterator(
        texts,
        arguments.vocab_size,
        new_special_tokens=[f"##{character}" for character in alphabet],  # see run_glue.train_tokenizer
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    return BertTokenizer(vocab=trained.get_vocab(), model_max_length=arguments.max_seq_length)


def sequences(texts: Sequence[str], tokenizer: BertTokenizer, length: int) -> Dataset:
    """Every document cut into pieces of `length` tokens."""

    def cut(rows: dict[str, list[str]]) -> dict[str, Any]:
        pieces = tokenizer(
            rows["text"],
            truncation=True,
            max_length=length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
            return_token_type_ids=False,
        )
        return {name: pieces[name] for name in ("input_ids", "attention_mask", "special_tokens_mask")}

    rows = Dataset.from_dict({"text": list(texts)}).map(cut, batched=True, remove_columns=["text"])
    return rows.filter(lambda ids: len(ids) >= min(SHORTEST, length), input_columns="input_ids")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains and saves. The result has the held-out loss before and after, None without held-out text."""
    parser = HfArgumentParser(Arguments.__annotations__.values())  # pyright: ignore[reportArgumentType]
    model_arguments, training = Arguments(
        *parser.parse_args_into_dataclasses(args=list(sys.argv[1:] if argv is None else argv))
    )
    set_seed(training.seed)
    texts = read(model_arguments.text, model_arguments.max_characters)
    tokenizer = train_tokenizer(texts, model_arguments)
    length = model_arguments.max_seq_length
    data = sequences(texts, tokenizer, length)
    heldout = read(model_arguments.heldout_text) if model_arguments.heldout_text else []
    model = BertForMaskedLM(bert_config(model_arguments, tokenizer, length))
    trainer = Trainer(
        model,
        training,
        train_dataset=data,
        eval_dataset=sequences(heldout, tokenizer, length) if heldout else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=model_arguments.mlm_probability, seed=training.seed
        ),
    )

    def heldout_loss() -> float | None:
        return trainer.evaluate()["eval_loss"] if heldout else None

    before = heldout_loss()
    trained = trainer.train().metrics
    result = {
        "parameters": model.num_parameters(),
        "sequences": len(data),
        "heldout_loss": {"before": before, "after": heldout_loss()},
        "train": trained,
        "log_history": trainer.state.log_history,
    }
    trainer.save_model()
    file = Path(str(training.output_dir)) / "pretraining.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"held-out loss: {before} -> {result['heldout_loss']['after']}; all results: {file}")
    return result


if __name__ == "__main__":
    main()
