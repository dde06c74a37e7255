"""A `Job` that wants nothing in particular, for tests to say what they want of it."""

from orcaserve.core.request import SamplingParams
from orcaserve.serve.detokenize import StopStrings
from orcaserve.serve.job import Job, Prompt

JOB = Job(
    prompts=(Prompt((1, 2), "", SamplingParams(max_tokens=500)),),
    n=1,
    end_token_ids=(),
    stops=StopStrings([]),
    min_tokens=0,
    cache_salt="",
    skip_special_tokens=True,
    echo=False,
    logprobs=None,
    prompt_logprobs=None,
    return_token_ids=False,
    include_usage=False,
    include_timing=False,
)
