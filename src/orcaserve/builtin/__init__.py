"""The model that is shipped with the package: where its folder is and what it is called."""

from pathlib import Path
from typing import Final

MODEL_DIR: Final = Path(__file__).with_name("model")
NAME: Final = "orcaserve-tiny"
