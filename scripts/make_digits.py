"""Write `repshift_cli/assets/digits.npz` from scikit-learn's copy of the UCI handwritten digits (CC BY 4.0).

Run once; the file is committed, so that users do not need scikit-learn.

    python scripts/make_digits.py
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TARGET = Path(__file__).resolve().parents[1] / "repshift_cli" / "assets" / "digits.npz"


def main() -> None:
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    np.savez_compressed(TARGET, images=images, labels=digits.target.astype(np.uint8))
    print(f"{TARGET}: {len(images)} digits, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
