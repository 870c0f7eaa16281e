"""Makes `few.ts`: the first two sequences of each speaker in the training set of JapaneseVowels, from the package `aeon`.

pip install --no-deps aeon; python tests/data/vowels/make.py
"""

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    spec = importlib.util.find_spec("aeon")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"
    head, _, body = (folder / "JapaneseVowels_TRAIN.ts").read_text(encoding="utf-8").partition("@data")
    lines = body.split()
    few = [line for n in range(1, 10) for line in [one for one in lines if one.endswith(f":{n}")][:2]]
    (HERE / "few.ts").write_text("\n".join([head + "@data", *few, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
