"""An engine process of the tests: the real one in everything but the model, which is a random trigram.

Its logits depend on the last three tokens alone. It samples by seed, choice and position, knows logit bias, and gives
log-probabilities with alternatives, of the prompt too. `--step-seconds S` makes iterations last, `--load-seconds S` the
start; `--vocab N`, `--blocks N`, `--max-model-len N`; `--fail MESSAGE` ends the start; `--nan-on TOKEN` fails every row
whose prompt holds that token.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from orcaserve.core.batch import Batch, RowResult, ScheduledRequest, StepResult
from orcaserve.core.config import EngineInfo, EngineOptions, ModelError
from orcaserve.core.request import NewRequest, TokenLogprobs
from orcaserve.engine.executor import Executor, Pending
from orcaserve.serve.engine_process import Lost, Progress, main


def logprobs_after(token_ids: list[int], vocab: int) -> np.ndarray:
    """float64[vocab], each a float32."""
    tail = token_ids[-3:]
    logits = 3 * np.random.default_rng([len(tail), *tail]).standard_normal(vocab)
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32).astype(np.float64)


def entry(logprobs: np.ndarray, token_id: int, num_top: int) -> TokenLogprobs:
    order = np.argsort(-logprobs, kind="stable")
    rank = int(np.flatnonzero(order == token_id)[0]) + 1
    top = tuple((int(id), float(logprobs[id])) for id in order[:num_top])
    return TokenLogprobs(token_id, float(logprobs[token_id]), rank, top)


class NgramExecutor:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.known: dict[int, tuple[NewRequest, list[int]]] = {}

    def submit(self, batch: Batch) -> Pending:
        time.sleep(self.options.step_seconds)
        for id in batch.freed:
            del self.known[id]
        for new in batch.new:
            self.known[new.id] = (new, list(new.token_ids))
        return Done(StepResult(tuple(self.run(row) for row in batch.rows)))

    def run(self, row: ScheduledRequest) -> RowResult:
        new, tokens = self.known[row.id]
        tokens += row.token_ids
        if self.options.nan_on in new.token_ids:
            return RowResult(id=row.id, error="the model produced NaN")
        params, vocab = new.params, self.options.vocab
        prompt = ()
        if params.prompt_logprobs is not None:
            last = min(row.start + row.num_tokens, new.num_prompt - 1)
            prompt = tuple(
                entry(logprobs_after(tokens[:at], vocab), tokens[at], params.prompt_logprobs)
                for at in range(row.start + 1, last + 1)
            )
        if not row.samples:
            return RowResult(id=row.id, prompt_logprobs=prompt)
        logprobs = logprobs_after(tokens, vocab)
        scores = logprobs.copy()
        for id, addend in params.logit_bias:
            scores[id] += addend
        if params.temperature > 0:
            uniform = np.random.default_rng([new.seed, new.choice, len(tokens)]).random(vocab)
            scores = scores / params.temperature - np.log(-np.log(uniform))
        token = int(scores.argmax())
        given = None if params.logprobs is None else entry(logprobs, token, params.logprobs)
        return RowResult(id=row.id, token_id=token, logprobs=given, prompt_logprobs=prompt)


class Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


def build(options: EngineOptions, progress: Progress, on_lost: Lost) -> tuple[Executor, EngineInfo]:
    given = parser.parse_args(sys.argv[1:])
    progress("weights", 0, 1)
    time.sleep(given.load_seconds)
    if given.fail is not None:
        raise ModelError(given.fail)
    progress("weights", 1, 1)
    info = EngineInfo(
        architecture="trigram",
        dtype="float64",
        vocab_size=given.vocab,
        max_model_len=given.max_model_len,
        block_size=options.block_size,
        num_blocks=given.blocks,
        profile="trigram",
    )
    return NgramExecutor(given), info


parser = argparse.ArgumentParser()
parser.add_argument("--vocab", type=int, default=400)
parser.add_argument("--blocks", type=int, default=1024)
parser.add_argument("--max-model-len", type=int, default=512)
parser.add_argument("--step-seconds", type=float, default=0.0)
parser.add_argument("--load-seconds", type=float, default=0.0)
parser.add_argument("--fail")
parser.add_argument("--nan-on", type=int)
parser.add_argument("fds", type=int, nargs=2)

if __name__ == "__main__":
    given = parser.parse_args()
    sys.exit(main(*given.fds, build=build))
