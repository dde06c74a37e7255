"""A server over `faulty_engine`, whose tokenizer raises at one token. argv: MODEL FORWARD_ID TEXT_ID."""

import sys
from pathlib import Path

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.serve import served_model
from orcaserve.serve.frontend import HttpOptions
from orcaserve.serve.server import run
from orcaserve.serve.tokenizer import Tokenizer

ENGINE = Path(__file__).with_name("faulty_engine.py")


class RaisingTokenizer(Tokenizer):
    def text_bytes(self, id: int) -> bytes:
        if id == raises_on:
            raise RuntimeError("a fault of the detokenizer")
        return super().text_bytes(id)


def say(info: EngineInfo, url: str) -> None:
    print(url, flush=True)


if __name__ == "__main__":
    model, forward_id, text_id = sys.argv[1:]
    raises_on = int(text_id)
    served_model.Tokenizer = RaisingTokenizer
    code = run(
        EngineOptions(model=model, threads=1, kv_memory=8 << 20, check=True),
        HttpOptions(port=0, log_level="critical"),
        command=[sys.executable, str(ENGINE), "--raise-on", forward_id],
        on_ready=say,
    )
    sys.exit(code)
